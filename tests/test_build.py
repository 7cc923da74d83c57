"""What was built: the extension's dependencies, its OpenMP runtime, and what build_info says of it."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import lora_ops
from lora_ops import _C

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and ELF")


def python(code: str, **variables: str) -> str:
    """The output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_build_info():
    """The installed package's version, a compiler, ISAs with generic among them, and whether a CUDA extension lies beside."""
    info = lora_ops.build_info()
    assert info["version"] == lora_ops.__version__ == version("lora_ops")
    assert re.match(r"(gcc|clang) \d+", info["compiler"])
    assert "generic" in info["isas_built"]
    assert info["cuda"] is any(Path(_C.__file__).parent.glob("_C_cuda*.so"))


@linux
def test_extension_knows_nothing_of_torch():
    """A library that is linked leaves its name in the file, and so do the C++ symbols of one that is called."""
    binary = Path(_C.__file__).read_bytes()
    for name in (b"libtorch", b"libc10", b"libpython", b"N2at", b"N3c10"):
        assert name not in binary, name
    assert b"libgomp.so.1\0" in binary


@linux
@pytest.mark.parametrize("imports", ["import torch, lora_ops", "import lora_ops, torch", "import lora_ops._C"])
def test_one_openmp_runtime_whatever_is_imported_first(imports):
    code = f"""
{imports}
import torch
import lora_ops
lora_ops.lora_linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1), scaling=1.0)
print({{line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "libiomp" in line}})
"""
    libraries = eval(python(code))
    assert len(libraries) == 1, libraries


@linux
def test_threads_are_torchs_and_follow_set_num_threads():
    code = """
import os, torch, lora_ops

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
x, w, a, b = torch.randn(256, 512), torch.randn(512, 512), torch.randn(8, 512), torch.randn(512, 8)
start, counts = threads(), []
for n in (1, 2, 4):
    torch.set_num_threads(n)
    lora_ops.lora_linear(x, w, a, b, scaling=1.0)
    counts.append(threads() - start)
torch.ones(10_000_000).exp_()  # torch's own parallel loop: the same four threads
counts.append(threads() - start)
print(counts)
"""
    assert eval(python(code, OMP_NUM_THREADS="1")) == [0, 1, 3, 3]
