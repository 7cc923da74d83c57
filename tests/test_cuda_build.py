"""The CUDA extension as it is shipped: it builds without a GPU, needs no CUDA library, and nobody notices it without one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ptx.build import REPOSITORY

pytestmark = pytest.mark.cuda

LOAD = """
import importlib.machinery, importlib.util, os, sys
sys.setdlopenflags(os.RTLD_NOW)  # every symbol is looked up now
loader = importlib.machinery.ExtensionFileLoader("_C_cuda", {path!r})
extension = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C_cuda", loader))
loader.exec_module(extension)
"""


def setup(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **variables}, capture_output=True, text=True)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.fixture(scope="module")
def extension(nvcc: str) -> Path:
    """Built for one architecture and in haste, for its host code and symbols; again only where a source has changed."""
    work = REPOSITORY / "build" / "cuda80"
    done = setup(
        *("build_ext", "--build-lib", str(work / "lib"), "--build-temp", str(work)),
        LORA_OPS_CUDA="1",
        LORA_OPS_CUDA_ARCHS="80",
        NVCC_APPEND_FLAGS="-Xcicc -O0 -Xptxas -O0",
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (built,) = (work / "lib" / "lora_ops").glob("_C_cuda*")
    return built


def test_no_spills_on_the_newest_architecture(nvcc, tmp_path):
    """Of the kernels that come closest. All of them, everywhere: docs/cuda_report.csv."""
    command = [nvcc, "-std=c++17", "-O3", "-gencode=arch=compute_120,code=sm_120", "-Xptxas", "-warn-spills,-Werror", "-cubin"]
    source = REPOSITORY / "csrc" / "cuda" / "lora_forward.cu"
    done = subprocess.run([*command, source, "-o", tmp_path / "kernels.cubin"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_has_no_unresolved_symbol_and_needs_no_cuda_library(extension):
    done = python(LOAD.format(path=str(extension)))
    assert done.returncode == 0, done.stderr
    binary = extension.read_bytes()
    for name in (b"libcudart", b"libtorch", b"libc10", b"libpython"):
        assert name not in binary, name
    if shutil.which("readelf"):
        needed = subprocess.run(["readelf", "-d", str(extension)], capture_output=True, text=True).stdout
        assert "NEEDED" in needed and "cuda" not in needed.lower().replace(extension.name.lower(), "")


def test_without_a_driver_a_launch_is_a_clear_error(extension):
    code = LOAD.format(path=str(extension)) + (
        "import ctypes\n"
        "if os.path.exists('/dev/nvidia0'): print('a GPU'), sys.exit()\n"
        "m = (256, 8, 1, 1)\n"
        "try: extension.lora_forward(8, 8, 8, 8, m, m, m, None, m, 256, 1.0, 0)\n"
        "except RuntimeError as e: print(e)\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() == "a GPU":
        pytest.skip("there is a GPU")
    assert "lora_forward failed with cudaError" in done.stdout and "driver" in done.stdout and "M = 8" in done.stdout


def test_is_not_imported_for_cpu_tensors():
    code = (
        "import sys, torch, lora_ops\n"
        "lora_ops.lora_linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1), scaling=1.0)\n"
        "lora_ops.build_info()\n"
        "print([m for m in sys.modules if '_C_cuda' in m])"
    )
    assert python(code).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"LORA_OPS_CUDA": "yes"}, ["LORA_OPS_CUDA", '"yes"', "0, 1 or auto"]),
        ({"LORA_OPS_CUDA": "1", "LORA_OPS_CUDA_ARCHS": "70"}, ["LORA_OPS_CUDA_ARCHS", '"70"']),
        ({"LORA_OPS_CUDA": "1", "LORA_OPS_CUDA_ARCHS": "80;81"}, ["LORA_OPS_CUDA_ARCHS", '"80;81"']),
    ],
)
def test_unknown_choice_is_an_error_by_name(nvcc, variables, words, tmp_path):
    done = setup("build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "work"), **variables)
    assert done.returncode != 0
    assert all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "lora_ops").exists()
