"""What must be moved and multiplied at least, by these kernels and by eager PyTorch, and how long a data sheet takes for it.

Every kernel reads and writes each of its operands once, caches are perfect, and a kernel takes the larger of flop / peak and
bytes / bandwidth. BOUNDS, not measurements: no kernel reaches a data sheet's peak.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from lora_ops.doctor import PEAKS  # noqa: E402

GPUS = {"A100 80GB SXM": "A100-SXM4-80GB", "H100 SXM": "H100 80GB HBM3", "RTX 4090": "GeForce RTX 4090"}


class Shape(NamedTuple):
    M: int
    K: int
    N: int
    r: int

    def __str__(self) -> str:
        return f"{self.M} x {self.K} x {self.N}"


SHAPES = [Shape(M, K, N, 16) for M, K, N in ((512, 4096, 4096), (4096, 4096, 4096), (8192, 4096, 14336), (8192, 8192, 8192))]
ROWS = (1, 4, 16, 64, 256, 1024, 4096)  # of the figure's curve, with K = N = 4096


class Work(NamedTuple):
    name: str
    flop: float
    bytes: float

    def seconds(self, gpu: str) -> float:
        peak, bandwidth = PEAKS[GPUS[gpu]]
        return max(self.flop / peak, self.bytes / bandwidth)


def product(shape: Shape) -> float:
    """flop of the base product."""
    return 2.0 * shape.M * shape.K * shape.N


def weight_bytes(shape: Shape, quantized: bool) -> float:
    """In 16 bits, or in 4 with a byte of scale per 64; what is per 256 of those is left out."""
    return shape.K * shape.N * (1 / 2 + 1 / 64 if quantized else 2)


def base_bytes(shape: Shape, quantized: bool = False) -> float:
    """That the bare product reads and writes; dy W0 as much as x W0ᵀ."""
    M, K, N, _ = shape
    return 2.0 * (M * K + M * N) + weight_bytes(shape, quantized)


def kernels(shape: Shape, adapter: torch.dtype, backward: bool, quantized: bool = False) -> list[Work]:
    """Ours, without partial sums: those depend on the GPU."""
    M, K, N, r = shape
    x, y, W, S = 2 * M * K, 2 * M * N, weight_bytes(shape, quantized), 4 * M * r
    A, B = r * K * adapter.itemsize, N * r * adapter.itemsize
    if not backward:
        return [
            Work("lora_down", 2 * M * K * r, x + A + S),
            Work("lora_forward", 2 * M * N * (K + r), x + W + S + B + y),
        ]
    return [
        Work("lora_backward_up", 4 * M * N * r, y + B + S + S + B),
        Work("lora_backward_dx", 2 * M * K * (N + r), y + W + S + A + x),
        Work("lora_backward_down", 2 * M * K * r, x + S + A),
    ]


class _Operations(TorchDispatchMode):
    """What eager PyTorch runs, except views."""

    def __init__(self) -> None:
        super().__init__()
        self.work: list[Work] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if all(r.alias_info is None for r in func._schema.returns):
            read, written = ([t for t in tree_leaves(side) if isinstance(t, torch.Tensor)] for side in ((args, kwargs), out))
            name = func.overloadpacket.__name__
            flop = 2.0 * read[0].shape[0] * read[0].shape[1] * read[1].shape[1] if name == "mm" else 0.0
            self.work.append(Work(name, flop, sum(t.nbytes for t in (*read, *written))))
        return out


def eager(shape: Shape, adapter: torch.dtype, backward: bool, quantized: bool = False) -> list[Work]:
    """The kernels of a bf16 layer under PEFT, forward or backward: as autograd runs them, on tensors without memory. A weight
    in 4 bits is first written in 16."""
    M, K, N, r = shape

    def empty(*size: int, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta", requires_grad=grad)

    x, W, dy = empty(M, K), empty(N, K, grad=False), empty(M, N, grad=False)
    A, B = empty(r, K, dtype=adapter), empty(N, r, dtype=adapter)
    with _Operations() as forward:
        y = F.linear(x, W)
        y = (y + F.linear(F.linear(x.to(adapter), A), B) * 2.0).to(y.dtype)
    decode = [Work("dequantize", 0.0, weight_bytes(shape, True) + W.nbytes)] if quantized else []
    if not backward:
        return decode + forward.work
    with _Operations() as gradients:
        torch.autograd.grad(y, (x, A, B), dy)
    return decode + gradients.work


def seconds(work: list[Work], gpu: str) -> float:
    return sum(w.seconds(gpu) for w in work)


# --- tables and the figure --------------------------------------------------------------------------------------------


def bounds() -> list[str]:
    lines = [
        "| M x K x N | " + " | ".join(f"{gpu}, {p}" for gpu in GPUS for p in ("forward", "backward")) + " |",
        "|---" * (1 + 2 * len(GPUS)) + "|",
    ]
    for shape in SHAPES:
        cells = []
        for gpu in GPUS:
            bare = Work("", product(shape), base_bytes(shape)).seconds(gpu)
            for backward in (False, True):
                ours, theirs = (seconds(side(shape, torch.bfloat16, backward), gpu) for side in (kernels, eager))
                cells.append(f"{ours * 1e6:.0f} µs ({ours / bare - 1:+.0%}; eager {theirs / bare - 1:+.0%})")
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    return lines


def figure(folder: Path) -> None:
    """cuda_bounds.png and .svg: the forward op under each GPU's roof."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "cuda_bounds"
    import matplotlib.pyplot as plt
    from report import written

    chart, axes = plt.subplots(1, len(GPUS), figsize=(5.5 * len(GPUS), 5), sharey=True)
    shapes = [Shape(M, 4096, 4096, 16) for M in ROWS]
    for ax, (gpu, name) in zip(axes, GPUS.items(), strict=True):
        peak, bandwidth = PEAKS[name]
        intensity = [0.5, 5000]
        ax.plot(
            [intensity[0], peak / bandwidth, intensity[1]],
            [intensity[0] * bandwidth / 1e12, peak / 1e12, peak / 1e12],
            color="black",
            lw=1.5,
        )
        sides = (
            ("lora_ops: 2 kernels", kernels, False, "^"),
            ("eager: 5 kernels", eager, False, "s"),
            ("lora_ops, W0 in 4 bits: 2 kernels", kernels, True, "v"),
            ("eager, W0 in 4 bits: 6 kernels", eager, True, "D"),
        )
        for label, side, quantized, marker in sides:
            points = []
            for shape in shapes:
                work = side(shape, torch.bfloat16, False, quantized)
                points.append(
                    (sum(w.flop for w in work) / sum(w.bytes for w in work), product(shape) / seconds(work, gpu) / 1e12)
                )
            ax.plot(*zip(*points, strict=True), marker, label=label, alpha=0.8, markersize=5)
            if side is kernels and not quantized:
                for M, (across, up) in zip(ROWS, points, strict=True):
                    ax.annotate(str(M), (across, up), xytext=(0, 6), textcoords="offset points", fontsize=8, ha="center")
        ax.set(xscale="log", yscale="log", title=f"{gpu}: {peak / 1e12:.0f} Tflop/s, {bandwidth / 1e12:.2f} TB/s")
        ax.set_xlabel("flop per byte of global memory, each operand of a kernel moved once")
        ax.grid(alpha=0.3, which="both")
        ax.legend(loc="lower right")
    axes[0].set_ylabel("Tflop/s of the base product")
    chart.suptitle(
        "BOUND from data sheets, NOT MEASURED: forward, bf16, K = N = 4096, r = 16; numbers at the points: M", fontweight="bold"
    )
    chart.tight_layout()
    for suffix in ("png", "svg"):
        with written(folder / f"cuda_bounds.{suffix}") as temporary:
            chart.savefig(temporary, format=suffix, dpi=100, metadata={"Date": None} if suffix == "svg" else None)
    plt.close(chart)
