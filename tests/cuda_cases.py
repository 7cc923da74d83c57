"""Small launches of each kernel of csrc/cuda, by source and template arguments: what the mutation run of tools/ looks at.

Together they take every branch of a kernel that the host can reach: rings of buffers go round, in the first block of a grid and
in others, every copy of an unrolled loop meets an end of the matrix, and dropout meets a number that equals its threshold.

A kernel of a new source takes a function in _OPS, from the kernel to its cases.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import compare
import four_bit
import skinny
import test_cuda_lora_backward_dx as dx
import test_cuda_lora_backward_up as up
import test_cuda_lora_forward as forward
import test_cuda_ops
import test_cuda_qlora_backward_dx as qdx
import test_cuda_qlora_forward as qforward
import torch
from compare import BF16, F16, F32, Dtypes
from ptx.device import Counters, Device, Run
from skinny import Dropout, normal, products, strided
from torch import Tensor

from lora_ops import quantize_nf4, reference
from lora_ops.cuda import ops
from lora_ops.qlora_ops import weight_of


class Counts(NamedTuple):
    """Of a launch of whole tiles."""

    mma: int
    copied: int  # bytes, by cp.async; 0 where rows are not aligned

    def check(self, counters: Counters) -> None:
        copies = counters.matching("cp.async")
        assert counters.bank_conflicts == []
        assert counters.mma_count == self.mma
        assert copies.total("global_bytes") == self.copied
        for some in (copies, counters.matching("st.global")):
            assert some.total("sectors") == some.total("ideal_sectors")


class Case(NamedTuple):
    launch: Callable[[Run], dict[str, Tensor]]
    eager: dict[str, Tensor]
    exact: dict[str, Tensor]  # eager's very tensors where every bit is wanted
    counts: Counts | None = None

    def check(self, results: dict[str, Tensor], counters: Counters) -> None:
        for name, actual in results.items():
            eager, exact = self.eager[name], self.exact[name]
            if eager is exact:
                assert torch.equal(actual, exact), f"{name} has other bits"
            else:
                compare.assert_within_bound({name: compare.error(actual, eager, exact)})
        if self.counts is not None:
            self.counts.check(counters)


class Kernel(NamedTuple):
    source: str
    name: str  # lora_down_kernel<Bf16, float, 16, true>

    @property
    def arguments(self) -> list[str]:
        return re.findall(r"[^<>,\s]+", self.name.partition("<")[2])

    @property
    def type(self) -> torch.dtype:
        return {"Bf16": BF16, "Half": F16, "float": F32}[self.arguments[0]]


# --- dropout at its threshold -----------------------------------------------------------------------------------------

M_DROPPED, SEED = 64, 0x123456789ABCDEF


def thresholds(columns: int) -> Iterator[float]:
    """Values of p, each the very number that one element of (64, columns) has: of every eighth row, every pair of columns that
    a warp's eight lanes side by side share in fragments, and every fourth of those that they share in rows of memory."""
    bits = reference.dropout_bits(torch.tensor(SEED), M_DROPPED, columns)
    for row in range(0, M_DROPPED, 8):
        for col in (c for c in range(columns) if c % 8 < 2):
            yield int(bits[row + col // 8 % 8, col]) / 65536


# --- skinny products --------------------------------------------------------------------------------------------------


class Skinny(NamedTuple):
    """Shapes of a kernel whose tiles are 64 x `columns`, and which has `most` ranks per block."""

    kernel: Kernel
    columns: int

    @property
    def dtypes(self) -> Dtypes:
        return Dtypes(self.kernel.type, F32 if self.kernel.arguments[1] == "float" else self.kernel.type)

    @property
    def most(self) -> int:
        return int(self.kernel.arguments[2])

    @property
    def vector(self) -> bool:
        return self.kernel.arguments[3] == "true"

    def laid_out(self, t: Tensor) -> Tensor:
        """Rows that begin at multiples of 16 bytes, or that do not."""
        return strided(t, 0, -t.shape[1] % 8) if self.vector else strided(t, 1, 1 + t.shape[1] % 2)

    def shapes(self) -> Iterator[tuple[int, int, int, int, Dropout | None]]:
        """(rows, columns, rank, SMs, dropout). The first are whole tiles."""
        columns, most = self.columns, self.most
        least = {16: 0, 32: 16, 64: 32}[most]  # below it, another kernel has fewer ranks per block
        yield 2 * 64, 2 * columns, most, 1, Dropout(0.25)
        yield 64 + 2, 4 * columns + 40, 100 if most == 64 else most - 4, 8, None
        yield 4 * 64 + 37, 24, most - 8, 2, None
        for i in range(16):  # every pair of up to four tiles each way; an end in each eighth of a tile, and of its ranks
            rows, wide = 64 * (i % 4) + 8 * (i % 8) + 3 * i % 8 + 1, columns * ((i + i // 4) % 4) + columns // 16 * i
            rank = least + 4 * (i % ((most - least) // 4) + 1) if self.vector else least + (5 * i + 1) % (most - least) + 1
            beyond = 64 * (most == 64 and i % 2)
            yield rows, wide + (0 if self.vector else 7 * i % 16 + 1) or 8, rank + beyond, i % 5 // 2 + 1, (None, Dropout(0.6))[i // 2 % 2]

    def threshold_cases(self) -> Iterator[Dropout]:
        return (Dropout(p, SEED) for p in thresholds(128))


def _down(kernel: Kernel, _: Device) -> Iterator[Case]:
    skinny_ = Skinny(kernel, 128)
    dtypes = skinny_.dtypes
    for i, (M, columns, r, sm_count, dropout) in enumerate(skinny_.shapes()):
        K = -(-columns // 8) * 8 if skinny_.vector else columns  # A is contiguous
        r = r - M % 4 if skinny_.vector and r <= 64 else r  # nor does anything else depend on its rows
