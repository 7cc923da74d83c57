"""What the kernels do to memory, counted by the tests' device: each op runs through its real launch code.

Two ways to count. What accesses move, as if there were no cache: what a tiling implies. And what a launch touches at least once,
which no cache can save: what is compared with eager PyTorch, whose kernels are taken to read and write every operand once.
"""

import importlib.machinery
import importlib.util
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from ptx.device import Counters, Device, Launch, Run, Traffic  # noqa: E402

from lora_ops.cuda import ops  # noqa: E402

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SM_COUNT = 108  # an A100's: fixes how sums are split


class Shape(NamedTuple):
    M: int
    K: int
    N: int
    r: int

    def __str__(self) -> str:
        return f"{self.M} x {self.K} x {self.N}, r = {self.r}"


class Tile(NamedTuple):
    """Of gemm.cuh, as launch_typed picks it for `shape`."""

    rows: int
    columns: int
    warps_m: int
    shape: Shape

    @property
    def warps_n(self) -> int:
        return 4 // self.warps_m


TILES = {
    "small": Tile(32, 64, 1, Shape(32, 512, 384, 16)),
    "medium": Tile(64, 64, 2, Shape(256, 512, 384, 16)),
    "large": Tile(128, 128, 2, Shape(1280, 1280, 1280, 16)),
}


class Kernels:
    """All kernels and the extension's bindings on a device that counts."""

    def __init__(self) -> None:
        cuda = ROOT / "csrc" / "cuda"
        self.device = Device([*sorted(cuda.glob("*.cu")), cuda / "bindings.cpp"])
        path = str(self.device.library_path(80))
        loader = importlib.machinery.ExtensionFileLoader("_C_cuda", path)
        extension = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C_cuda", loader, origin=path))
        loader.exec_module(extension)
        self.target = ops.Target(extension, SM_COUNT, 0)


class Operands(NamedTuple):
    x: Tensor
    weight: Tensor
    A: Tensor
    B: Tensor
    dy: Tensor


def operands(shape: Shape, dtype: torch.dtype, adapter: torch.dtype, transposed: bool = False) -> Operands:
    """Zeros: what is counted does not depend on values."""
    M, K, N, r = shape
    weight = torch.zeros(K, N, dtype=dtype).T if transposed else torch.zeros(N, K, dtype=dtype)
    x, dy = torch.zeros(M, K, dtype=dtype), torch.zeros(M, N, dtype=dtype)
    return Operands(x, weight, torch.zeros(r, K, dtype=adapter), torch.zeros(N, r, dtype=adapter), dy)


class Moved(NamedTuple):
    """What one kernel of an op did to one tensor."""

    kernel: str
    tensor: str
    bytes: int  # of the tensor
    traffic: Traffic


class Counted(NamedTuple):
    counters: Counters
    launches: list[Launch]
    moved: list[Moved]
    total: Traffic


def count(kernels: Kernels, shape: Shape, dtype: torch.dtype, adapter: torch.dtype, backward: bool) -> Counted:
    """Forward, or backward without it, with everything that it can give but dbias."""
    with kernels.device.run() as run:
        t = operands(shape, dtype, adapter)
        S = torch.zeros(shape.M, shape.r)
        if backward:
            dx, dA, dB, _ = ops.backward(
                kernels.target, t.dy, t.x, t.weight, t.A, t.B, S, None, 1.0, 0.0, True, True, True, False, False
            )
            named = {**t._asdict(), "S": S, "dx": dx, "dA": dA, "dB": dB}
        else:
            y, S = ops.forward(kernels.target, t.x, t.weight, t.A, t.B, None, None, 1.0, 0.0, False)
            named = {**t._asdict(), "S": S, "y": y}
    return Counted(run.counters, run.launches, list(_moved(run, named)), run.traffic())
