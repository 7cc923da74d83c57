"""The machine's own bounds, measured in the run that quotes them."""

import time
from collections.abc import Callable

import torch

from lora_ops import _C


def _best(flops_or_bytes: Callable[[], float], rounds: int) -> float:
    best = 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        work = flops_or_bytes()
        best = max(best, work / (time.perf_counter() - start))
    return best


def peak_flops(dtype: torch.dtype) -> float:
    """flop/s of one core's fastest multiply-add loop that serves `dtype`: fp32, or bf16 pairs where those are faster."""
    kinds = (False, True) if dtype == torch.bfloat16 else (False,)
    return max(_best(lambda kind=kind: _C.multiply_adds(kind, 200_000), 15) for kind in kinds)


def read_bandwidth(nbytes: int) -> float:
    """bytes/s at which one core reads `nbytes` again and again in order (from wherever they then lie)."""
    buffer = torch.ones(max(nbytes // 4, 1024))

    def read() -> float:
        _C.read_all(buffer.data_ptr(), buffer.numel())
        return buffer.numel() * 4.0

    return _best(read, 15)
