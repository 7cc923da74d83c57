"""Tensors that lie where a kernel's mistake shows: amid NaN, or just before a page that may not be touched."""

import ctypes
import mmap
from dataclasses import replace

import torch
from compare import Case, assert_same, fused_lora, run
from torch import Tensor

MARGIN = 37  # elements on each side: odd, and more than a vector


class Poisoned:
    """A matrix (rows, cols), contiguous columns, inside a larger one that is NaN throughout."""

    def __init__(self, rows: int, cols: int, dtype: torch.dtype) -> None:
        self.whole = torch.full((rows + 2 * MARGIN, cols + 2 * MARGIN), torch.nan, dtype=dtype)
        self.inside = self.whole[MARGIN : MARGIN + rows, MARGIN : MARGIN + cols]

    def holds(self, t: Tensor) -> Tensor:
        return self.inside.copy_(t)

    def is_intact(self) -> bool:
        """Whether everything around the matrix is NaN still, and nothing inside it is."""
        outside = torch.ones(self.whole.shape, dtype=torch.bool)
        outside[MARGIN : MARGIN + self.inside.shape[0], MARGIN : MARGIN + self.inside.shape[1]] = False
        return bool(self.whole[outside].isnan().all() and self.inside.isfinite().all())


def poisoned(t: Tensor) -> Tensor:
    """A matrix's copy amid NaN."""
    return Poisoned(*t.shape, t.dtype).holds(t)


def guarded(t: Tensor) -> Tensor:
    """A contiguous copy that ends at a page without access: to read one element further is a segmentation fault."""
    size = t.numel() * t.element_size()
    pages = -(-size // mmap.PAGESIZE) + 1
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
    start = (pages - 1) * mmap.PAGESIZE
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory, start))
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    inside = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=start - size)
    return inside.view(t.shape).copy_(t)


def assert_nothing_behind_is_read(case: Case, *, backward: bool) -> None:
    """With every input at the end of its memory, both orientations of the weight, results are the same."""
    names = ("x", "weight", "lora_A", "lora_B", "bias", "dy")
    guards = replace(case, **{name: guarded(getattr(case, name)) for name in names})
    for weight, guard in ((case.weight, guards.weight), (case.weight.T.contiguous().T, guarded(case.weight.T).T)):
        unguarded = replace(case, weight=weight)
        actual = run(fused_lora, replace(guards, weight=guard), backward=backward)
        assert_same(actual, run(fused_lora, unguarded, backward=backward), unguarded, backward=backward)
