import os
from collections.abc import Iterator

import pytest
import torch

import lora_ops


@pytest.fixture(scope="session", autouse=True)
def the_forced_isa_runs() -> None:
    """A suite that was told to test an ISA tests it."""
    forced = os.environ.get("LORA_OPS_CPU_ISA")
    assert not forced or lora_ops.build_info()["isa"] == forced


@pytest.fixture(autouse=True)
def global_state() -> Iterator[None]:
    """Tests begin with the same generator and leave the thread count as it was."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
