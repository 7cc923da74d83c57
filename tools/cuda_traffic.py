"""What the kernels do to memory, counted by the tests' device: each op runs through its real launch code.

Bytes are counted in two ways. Moved by every access, as if there were no cache: what a tiling implies. And touched at least
once by a launch, which no cache saves: what can be compared with eager PyTorch, each of whose kernels reads and writes its
operands once at least.
"""

import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from cuda_bounds import ROOT, Shape, base_bytes, eager
from cuda_code import demangled
from torch import Tensor

sys.path.insert(0, str(ROOT / "tests"))

from ptx.device import Counters, Device, Launch, Run, Traffic

from lora_ops import quantize_nf4
from lora_ops.cuda import ops
from lora_ops.qlora_ops import Weight, weight_of

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SM_COUNT = 108  # an A100's; it fixes how sums are split
SMALL, MEDIUM, LARGE = Shape(32, 512, 384, 16), Shape(256, 512, 384, 16), Shape(1280, 1280, 1280, 16)
# (shape, backward, quantized): each tile that the launch code picks, and whole tiles all of them.
CASES = [(shape, backward, False) for shape in (SMALL, MEDIUM, LARGE) for backward in (False, True)]
CASES += [(SMALL, False, True), (MEDIUM, False, True), (MEDIUM, True, True)]


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


class Moved(NamedTuple):
    """What one kernel did to one tensor."""

    kernel: str
    tensor: str
    bytes: int  # of the tensor
    read: int
    written: int


class Counted(NamedTuple):
    shape: Shape
    adapter: torch.dtype
    backward: bool
    quantized: bool
    counters: Counters
    launches: list[Launch]
    moved: list[Moved]
    total: Traffic


def label(entry: str, backward: bool) -> str:
    """lora_down, or lora_forward Tile<64, 64, 64, 2, 3>: which op runs a GEMM is not in its name."""
    name = demangled([entry])[entry]
    tile = re.search(r"Tile<.*?>", name)
    if name.startswith("gemm_") and tile:
        return f"{'qlora' if '4bit' in name else 'lora'}_{'backward_dx' if backward else 'forward'} {tile[0]}"
    return name.split("<")[0].removesuffix("_kernel")


def count(kernels: Kernels, shape: Shape, adapter: torch.dtype, backward: bool, quantized: bool = False) -> Counted:
    """The op's forward, or its backward with everything but dbias. Zeros: what is counted does not depend on values."""
    M, K, N, r = shape
    with kernels.device.run() as run:
        x, dy = torch.zeros(M, K, dtype=BF16), torch.zeros(M, N, dtype=BF16)
        A, B = torch.zeros(r, K, dtype=adapter), torch.zeros(N, r, dtype=adapter)
        tensors = {"x": x, "A": A, "B": B}
        W: Tensor | Weight
        if quantized:
            W = registered_4bit(run, N, K)
            tensors |= {"W0's codes": W.codes, "W0's scales": W.absmax}
        else:
            W = tensors["W0"] = torch.zeros(N, K, dtype=BF16)
        if backward:
            S = torch.zeros(M, r)
            dx, dA, dB, _ = ops.backward(kernels.target, dy, x, W, A, B, S, None, 1.0, 0.0, True, True, True, False, False)
            tensors |= {"dy": dy, "S": S, "dx": dx, "dA": dA, "dB": dB}
        else:
            y, S = ops.forward(kernels.target, x, W, A, B, None, None, 1.0, 0.0, False)
            tensors |= {"y": y, "S": S}
        moved = list(_moved(run, tensors, backward))
    return Counted(shape, adapter, backward, quantized, run.counters, run.launches, moved, run.traffic())


def registered_4bit(run: Run, N: int, K: int, quant_type: str = "nf4") -> Weight:
    qweight = quantize_nf4(torch.ones(N, K), quant_type=quant_type)
    for t in vars(qweight).values():
        if isinstance(t, Tensor):
            run.register(t, readonly=True)
    return weight_of(qweight)


def _moved(run: Run, tensors: dict[str, Tensor], backward: bool) -> Iterator[Moved]:
    for entry in dict.fromkeys(launch.entry for launch in run.launches):
        for name, t in tensors.items():
            traffic = run.traffic(t, entry)
            if traffic.read or traffic.written:
                yield Moved(label(entry, backward), name, t.nbytes, traffic.read, traffic.written)


def implied(kernel: str, shape: Shape, launches: list[Launch]) -> dict[str, int]:
    """How often the tiling says that a kernel reads a tensor. Results are written once."""
    tile = re.search(r"Tile<(\d+), (\d+), \d+, (\d+), \d+>", kernel)
    if tile:
        rows, columns, warps_m = map(int, tile.groups())
        tiles_m = -(-shape.M // rows)
        weight = {"W0's codes": tiles_m} if kernel.startswith("qlora") else {"W0": tiles_m}
        if "forward" in kernel:
            tiles_n = -(-shape.N // columns)
            return {"x": tiles_n, **weight, "S": tiles_n * (4 // warps_m), "B": tiles_m * warps_m}
        return {"dy": -(-shape.K // columns), **weight, "A": tiles_m * warps_m}
    grid = next(launch.grid for launch in launches if kernel in launch.entry)
    return {
        "lora_down": {"x": grid[2], "A": grid[0]},
        "lora_backward_up": {"dy": grid[2], "B": grid[1], "S": grid[0]},
        "lora_backward_down": {"x": grid[2]},
    }.get(kernel, {})


def launched(kernels: Kernels) -> dict[str, Launch]:
    """A launch of every kernel that an op picks, by its name: every dtype, rank, tile, layout and alignment."""
    small = [(1, 8, 8), (40, 8, 8), (40, 9, 9)]
    shapes = [Shape(*size, r) for size in small for r in (8, 24, 40)] + [Shape(1280, 8, 1280, 8), Shape(1280, 1280, 8, 8)]
    with kernels.device.run() as run:
        for dtype, adapter in ((BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)):
            for M, K, N, r in shapes:
                x, dy, S = torch.zeros(M, K, dtype=dtype), torch.zeros(M, N, dtype=dtype), torch.zeros(M, r)
                A, B = torch.zeros(r, K, dtype=adapter), torch.zeros(N, r, dtype=adapter)
                for W in (torch.zeros(N, K, dtype=dtype), torch.zeros(K, N, dtype=dtype).T):
                    ops.forward(kernels.target, x, W, A, B, None, None, 1.0, 0.0, False)
                    ops.backward(kernels.target, dy, x, W, A, B, S, None, 1.0, 0.0, *[True] * 4, False)
        for quant_type in ("nf4", "fp4"):
            W = registered_4bit(run, 8, 128, quant_type)
            for dtype in (BF16, F16, F32):
                ops.dequantize(kernels.target, W, 128, dtype)
            for dtype in (BF16, F16):
                A, B = torch.zeros(4, 128, dtype=dtype), torch.zeros(8, 4, dtype=dtype)
                for M in (1, 33, 65, 129):
                    x, dy, S = torch.zeros(M, 128, dtype=dtype), torch.zeros(M, 8, dtype=dtype), torch.zeros(M, 4)
                    ops.forward(kernels.target, x, W, A, B, None, None, 1.0, 0.0, False)
                    ops.backward(kernels.target, dy, x, W, A, B, S, None, 1.0, 0.0, *[True] * 4, False)
        names = demangled({launch.entry for launch in run.launches})
        return {names[launch.entry]: launch for launch in run.launches}


# --- tables -----------------------------------------------------------------------------------------------------------


def wavefronts(counted: list[Counted]) -> list[str]:
    lines = [
        "| kernel | M x K x N | mma | ldmatrix | cp.async | other shared | global sectors |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in counted:
        for entry in dict.fromkeys(launch.entry for launch in c.launches):
            mine = c.counters.matching(entry=entry)
            groups = [mine.matching(o) for o in ("ldmatrix", "cp.async")]
            groups.append(Counters(i for i in mine if not i.opcode.startswith(("ldmatrix", "cp.async"))))
            cells = [f"{g.total('wavefronts')} / {g.total('ideal_wavefronts')}" for g in groups]
            cells.append(f"{mine.total('sectors')} / {mine.total('ideal_sectors')}")
            name = label(entry, c.backward)
            lines.append(f"| {name} | {c.shape} | {mine.mma_count} | " + " | ".join(cells) + " |")
    return lines


def per_tensor(counted: list[Counted]) -> list[str]:
    lines = ["| kernel | M x K x N | tensor | bytes | read | the tiling implies | written |", "|---|---|---|---|---|---|---|"]
    for c in counted:
        for m in c.moved:
            times = implied(m.kernel, c.shape, c.launches).get(m.tensor)
            cells = [f"{n / m.bytes:.2f} x".replace(".00", "") if n else "" for n in (m.read, m.written)]
            says = f"{times} x" if times and m.read else ""
            lines.append(f"| {m.kernel} | {c.shape} | {m.tensor} | {m.bytes} | {cells[0]} | {says} | {cells[1]} |")
    return lines


def fusion(counted: list[Counted]) -> list[str]:
    lines = [
        "| pass | M x K x N | W0; A and B | eager, at least | here, counted | saved | beyond the bare product: eager | here |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in counted:
        theirs = sum(w.bytes for w in eager(c.shape, c.adapter, c.backward, c.quantized))
        ours, bare = c.total.distinct_read + c.total.distinct_written, base_bytes(c.shape, c.quantized)
        what = f"{'4 bits' if c.quantized else 'bf16'}; {'fp32' if c.adapter == F32 else 'bf16'}"
        lines.append(
            f"| {'backward' if c.backward else 'forward'} | {c.shape} | {what} | {theirs / 1e6:.2f} MB | {ours / 1e6:.2f} MB "
            f"| {1 - ours / theirs:.0%} | {(theirs - bare) / 1e6:.2f} MB | {(ours - bare) / 1e6:.2f} MB |"
        )
    return lines
