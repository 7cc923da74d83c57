"""One small launch of a kernel, and what must come out of it."""

import re
from collections.abc import Callable
from typing import NamedTuple

import compare
import torch
from compare import BF16, F16, F32, Dtypes
from ptx.device import Counters, Run
from skinny import normal
from torch import Tensor

F64 = torch.float64
Results = dict[str, Tensor]


class Counts(NamedTuple):
    """Of a launch of whole tiles, of rows that are aligned."""

    mma: int
    copied: int  # bytes, by cp.async
    vectors: bool = False  # nothing is loaded but neighbours, side by side

    def check(self, counters: Counters) -> None:
        copies, loads, stores = (counters.matching(opcode) for opcode in ("cp.async", "ld.global", "st.global"))
        assert counters.bank_conflicts == [], "bank conflicts"
        assert counters.mma_count == self.mma, f"{counters.mma_count} mma of {self.mma}"
        copied = copies.total("global_bytes")
        assert copied == self.copied, f"{copied} bytes copied of {self.copied}"
        for some in (copies, stores, *[loads] * self.vectors):
            assert some.total("sectors") == some.total("ideal_sectors"), "sectors"


class Case(NamedTuple):
    launch: Callable[[Run], Results]
    exact: Callable[[], Results]  # in any dtype that holds it: every bit of what it rounds to is wanted, unless
    eager: Callable[[], Results] | None = None  # where numbers are such that sums round, and compare.py's policy holds
    counts: Counts | None = None

    def check(self, results: Results, counters: Counters) -> None:
        exact, eager = self.exact(), self.eager and self.eager()
        for name, actual in results.items():
            assert untouched_beside(actual), f"what lies beside {name} was written to"
            if eager is None:
                wrong = int((actual != exact[name].to(actual.dtype)).sum())
                assert wrong == 0, f"{wrong} elements of {name} have other bits"
            else:
                compare.assert_within_bound({name: compare.error(actual, eager[name], exact[name])})
        if self.counts is not None:
            self.counts.check(counters)


def untouched_beside(t: Tensor) -> bool:
    """Whether a view that a kernel wrote still lies in memory of ones, as the device gives it."""
    storage = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
    beside = torch.ones(len(storage) // t.element_size(), dtype=torch.bool)
    beside.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(False)
    return bool((storage.view(-1, t.element_size())[beside] == 0xFF).all())


class Kernel(NamedTuple):
    source: str
    name: str  # lora_down_kernel<Bf16, float, 16, true>

    @property
    def arguments(self) -> list[str]:
        return re.findall(r"[^<>,\s]+", self.name.partition("<")[2])

    @property
    def type(self) -> torch.dtype:
        return {"Bf16": BF16, "Half": F16, "float": F32}[self.arguments[0]]

    @property
    def dtypes(self) -> Dtypes:
        """Of kernels that are made for a dtype of the adapters."""
        return Dtypes(self.type, F32 if self.arguments[1] == "float" else self.type)

    @property
    def flags(self) -> list[bool]:
        return [a == "true" for a in self.arguments if a in ("true", "false")]

    @property
    def sizes(self) -> list[int]:
        return [int(a) for a in self.arguments if a.isdigit()]


def whole(t: Tensor) -> Tensor:
    """Of numbers of any scale, 1 and 2 with their signs: products and sums are exact, and no wrong one is lost in rounding."""
    return t.sign() * (1 + (t.abs() > t.abs().double().mean())).to(t.dtype) if t.numel() > 0 else t


def whole_normal(*size: int, dtype: torch.dtype, draw: int = 0) -> Tensor:
    return whole(normal(*size, dtype=F64, draw=draw)).to(dtype)


def odd(t: Tensor) -> Tensor:
    """A multiple of whole numbers that takes every bit down to the last."""
    return t * (1 + torch.finfo(t.dtype).eps)


def one_of_each_row(rows: int, columns: int) -> Tensor:
    """(rows, columns) bool, and one of a column where there are no more rows than columns."""
    return (1009 * torch.arange(rows)[:, None] + 11) % columns == torch.arange(columns)


def times(t: Tensor, factor: float) -> Tensor:
    """As a kernel multiplies its fp32 sums."""
    return t.float() * torch.tensor(factor, dtype=F32)
