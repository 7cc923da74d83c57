import os
import shutil
import sys
from collections.abc import Iterator

import pytest
import torch
from ptx.build import REPOSITORY
from ptx.device import Device

import lora_ops

sys.path.insert(0, str(REPOSITORY / "tools"))

from cuda_code import disassembles

NO_NVCC = "CUDA kernels were NOT tested: nvcc was not found"
NO_DISASSEMBLER = "MACHINE CODE of CUDA kernels was NOT looked at: cuobjdump or nvdisasm was not found"


@pytest.fixture(scope="session", autouse=True)
def the_forced_isa_runs() -> None:
    """A suite that was told to test an ISA tests it."""
    forced = os.environ.get("LORA_OPS_CPU_ISA")
    assert not forced or lora_ops.build_info()["isa"] == forced


@pytest.fixture(autouse=True)
def global_state(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests begin with the same generator and leave the thread count as it was. Beside the executor there is nothing but small
    products, whose threads would only wait for each other."""
    threads = torch.get_num_threads()
    if request.node.get_closest_marker("cuda"):
        torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_compiled_code() -> Iterator[None]:
    """What a test compiles is forgotten after it."""
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def nvcc() -> str:
    path = shutil.which("nvcc")
    if path is None:
        pytest.skip(NO_NVCC)
    return path


@pytest.fixture(scope="session")
def disassembler(nvcc: str) -> None:
    """What tools/cuda_code.py reads machine code with."""
    if not disassembles():
        pytest.skip(NO_DISASSEMBLER)


@pytest.fixture(scope="session")
def executor() -> Device:
    """The device without host code: needs no nvcc."""
    return Device(sources=[])


@pytest.fixture(scope="session")
def device(nvcc: str) -> Device:
    """The kernels of csrc/cuda on a device that runs PTX on the CPU."""
    device = Device()
    device.library_path(80)
    device.prepare(90)  # by the other core, while tests run
    return device


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    for reason in (NO_NVCC, NO_DISASSEMBLER):
        if any(reason in of for of in skipped):
            terminalreporter.section(reason, red=True)
