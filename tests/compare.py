"""The one tolerance of the suite: a kernel may lose what eager PyTorch loses in that dtype, measured against fp64.

    oracle   lora_ops.reference in float64, on the inputs as they are (already rounded)
    eager    what a PEFT user runs: the frozen layer plus lora_B(lora_A(dropout(x))) · scaling, gradients by autograd
    error    max |result - oracle|
    bound    1.5 · error of eager + 1 ulp of the result's dtype at the oracle's largest magnitude

and over a grid of shapes the median of error / eager's error is at most 1. NaN and infinities are where eager has them.
On a GPU (LORA_OPS_TEST_GPU=1, or tensors there), fp32 results are given 6 ulp: tensor cores cut their sums off, every 16
values of k, where eager's arithmetic rounds.

Training runs that differ by rounding alone drift apart step by step; their losses lie within LOSS of each other.
"""

import functools
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lora_ops
from lora_ops import ops, reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ON_GPU = os.environ.get("LORA_OPS_TEST_GPU") == "1"
LOSS = 0.01  # at every step, of the loss


class Dtypes(NamedTuple):
    """Of x, weight and bias, and of A and B."""

    x: torch.dtype
    adapter: torch.dtype

    def __str__(self) -> str:
        return "-".join({F32: "f32", BF16: "bf16", F16: "f16"}.get(t, "f64") for t in self)


DTYPES = [Dtypes(F32, F32), Dtypes(BF16, BF16), Dtypes(BF16, F32), Dtypes(F16, F16), Dtypes(F16, F32)]

# (M, K, N, r): around the tiles of every ISA (14 x 32, 6 x 16, 4 x 8), around 40 rows, where dot products give way to
# tiles, around dropout's groups of 128 columns, r up to beyond K and N.
SMALL = [
    (0, 33, 16, 4), (1, 1, 1, 1), (1, 2, 3, 4), (1, 33, 1, 1), (1, 128, 129, 16), (1, 300, 33, 100), (1, 576, 300, 8),
    (2, 3, 2, 1), (2, 129, 31, 8), (2, 48, 576, 64), (3, 1, 127, 1), (3, 16, 33, 4), (3, 31, 1, 8), (3, 127, 48, 16),
    (13, 32, 32, 8), (13, 129, 16, 64), (13, 300, 129, 1), (14, 16, 31, 16), (14, 33, 127, 4), (14, 576, 48, 100),
    (15, 3, 2, 16), (15, 31, 300, 8), (15, 128, 33, 1), (15, 576, 576, 16), (40, 127, 32, 4), (40, 300, 48, 64),
    (41, 1, 33, 1), (41, 32, 16, 8), (41, 33, 31, 16), (41, 128, 128, 4), (41, 300, 129, 100), (41, 576, 300, 16),
    (100, 2, 129, 8), (100, 16, 576, 4), (100, 48, 3, 1), (100, 127, 1, 8), (100, 129, 127, 16), (100, 300, 33, 64),
    (257, 3, 16, 100), (257, 31, 48, 16), (257, 128, 300, 8), (257, 129, 32, 1),
]  # fmt: skip
# Reductions and rows that are split into blocks.
LARGE = [(50, 2048, 500, 16), (640, 5000, 33, 8), (640, 17, 5000, 4)]
SHAPES = SMALL + LARGE
# Around tiles and dot products, one block and several; for what the whole grid need not run.
FEW = [(1, 300, 33, 4), (1, 33, 300, 4), (3, 129, 17, 1), (15, 48, 129, 16), (41, 127, 33, 100), (100, 33, 65, 8)]

every_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids=str)
few_shapes = pytest.mark.parametrize("shape", FEW, ids=str)


@dataclass(frozen=True)
class Case:
    x: Tensor  # (M, K)
    weight: Tensor  # (N, K)
    lora_A: Tensor  # (r, K)  # noqa: N815
    lora_B: Tensor  # (N, r)  # noqa: N815
    bias: Tensor | None  # (N,)
    dy: Tensor  # (M, N)
    scaling: float = 0.75
    dropout_p: float = 0.0
    generator: int = 0  # what torch.manual_seed is given before lora_linear draws its dropout seed

    @property
    def seed(self) -> Tensor | None:
        if self.dropout_p == 0.0:
            return None
        torch.manual_seed(self.generator)
        return torch.randint(0, 2**62, (), dtype=torch.int64)


Results = dict[str, Tensor]


Shape = tuple[int, int, int, int]


def make_case(shape: Shape, dtypes: Dtypes, *, bias: bool | None = None, dropout_p: float = 0.0, draw: int = 0) -> Case:
    """Both terms of y near 1, and both terms of dx alike. Without `bias`, every other shape has one."""
    M, K, N, r = shape
    g = torch.Generator().manual_seed((((M * 8191 + K) * 8191 + N) * 127 + r) * 31 + draw)

    def normal(*size: int, std: float, dtype: torch.dtype) -> Tensor:
        return (torch.randn(size, generator=g, dtype=torch.float64) * std).to(dtype)

    has_bias = (M + K + N + r) % 2 == 0 if bias is None else bias
    return Case(
        x=normal(M, K, std=1, dtype=dtypes.x),
        weight=normal(N, K, std=max(K, 1) ** -0.5, dtype=dtypes.x),
        lora_A=normal(r, K, std=max(K, 1) ** -0.5, dtype=dtypes.adapter),
        lora_B=normal(N, r, std=r**-0.5, dtype=dtypes.adapter),
        bias=normal(N, std=1, dtype=dtypes.x) if has_bias else None,
        dy=normal(M, N, std=1, dtype=dtypes.x),
        dropout_p=dropout_p,
        generator=sum(shape) + draw,
    )


def fused_lora(x: Tensor, case: Case, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> Tensor:
    torch.manual_seed(case.generator)
    return lora_ops.lora_linear(
        x, case.weight, lora_A, lora_B, scaling=case.scaling, bias=bias, dropout_p=case.dropout_p, training=True
    )


def eager_lora(x: Tensor, case: Case, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> Tensor:
    """PEFT's `lora.Linear.forward` with the kernel's mask. F.dropout, too, multiplies by keep / (1 - p)."""
    result = F.linear(x, case.weight, bias)
    h = x.to(lora_A.dtype)
    if case.seed is not None:
        keep = reference.dropout_keep(case.seed, case.dropout_p, *x.shape)
        h = h * (keep.to(h.dtype) / (1 - case.dropout_p))
    return (result + F.linear(F.linear(h, lora_A), lora_B) * case.scaling).to(result.dtype)


def run(lora: Callable[..., Tensor], case: Case, *, backward: bool) -> Results:
    """y alone, or the gradients alone: dx, dA, dB and, with a bias, dbias."""
    if not backward:
        with torch.no_grad():
            return {"y": lora(case.x, case, case.lora_A, case.lora_B, case.bias)}
    inputs = {"dx": case.x, "dA": case.lora_A, "dB": case.lora_B, "dbias": case.bias}
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in inputs.items()}
    y = lora(leaves["dx"], case, leaves["dA"], leaves["dB"], leaves["dbias"])
    wanted = {name: t for name, t in leaves.items() if t is not None}
    return dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), case.dy), strict=True))


def oracle(case: Case, *, backward: bool) -> Results:
    """y, or every gradient, in float64."""
    wide = [None if t is None else t.double() for t in (case.x, case.weight, case.lora_A, case.lora_B, case.bias)]
    x, weight, lora_A, lora_B, bias = wide
    settings = (case.scaling, case.dropout_p, case.seed)
    y, S = reference.lora_forward(x, weight, lora_A, lora_B, bias, *settings)
    if not backward:
        return {"y": y}
    dx, dA, dB, dbias = reference.lora_backward(case.dy.double(), x, weight, lora_A, lora_B, S, *settings)
    return {"dx": dx, "dA": dA, "dB": dB, "dbias": dbias}


class Error(NamedTuple):
    kernel: float
    eager: float
    ulp: float

    @property
    def within_bound(self) -> bool:
        return self.kernel <= 1.5 * self.eager + self.ulp

    @property
    def ratio(self) -> float:
        if self.eager == 0:
            return 0.0 if self.kernel == 0 else math.inf
        return self.kernel / self.eager


def error(actual: Tensor, eager: Tensor, exact: Tensor) -> Error:
    """Asserts dtype, shape and the places of NaN and infinities, and measures the rest.

    The places are the exact result's: where a row of x is infinite, oneDNN's AMX product has NaN in other rows too.
    """
    assert (actual.dtype, actual.shape) == (eager.dtype, eager.shape)
    on_gpu = ON_GPU or actual.is_cuda
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(actual), kind(exact.to(eager.dtype))), f"{kind.__name__} in other places than the exact result"
    info, finite = torch.finfo(eager.dtype), eager.isfinite() & actual.isfinite()
    actual, eager, exact = (t[finite].double() for t in (actual, eager, exact))
    if exact.numel() == 0:
        return Error(0.0, 0.0, 0.0)
    _, exponent = math.frexp(exact.abs().max().item())
    ulp = info.eps * max(2.0 ** (exponent - 1), info.smallest_normal)
    if on_gpu and info.dtype == "float32":
        ulp *= 6
    return Error((actual - exact).abs().max().item(), (eager - exact).abs().max().item(), ulp)


def errors(case: Case, *, backward: bool, fused: Callable[..., Tensor] = fused_lora) -> dict[str, Error]:
    actual, eager = run(fused, case, backward=backward), run(eager_lora, case, backward=backward)
    exact = oracle(case, backward=backward)
    assert actual.keys() == eager.keys()
    return {name: error(actual[name], eager[name], exact[name]) for name in actual}


def assert_same(actual: Results, expected: Results, case: Case, *, backward: bool) -> None:
    """Bit for bit: the operands' strides and addresses change nothing. Torch's own products do depend on them; where the base
    product is torch's, both are as near to fp64 as eager."""
    assert actual.keys() == expected.keys()
    if ops.base_on_torch(case.x.dtype):
        eager, exact = run(eager_lora, case, backward=backward), oracle(case, backward=backward)
        for results in (actual, expected):
            assert_within_bound({name: error(results[name], eager[name], exact[name]) for name in results})
    else:
        for name in actual:
            assert torch.equal(actual[name], expected[name]), name


def draws(shape: Shape) -> int:
    """How many cases a shape is drawn: the largest of a handful of rounding errors says little of who makes them."""
    M, K, N, r = shape
    return 1 if M == 0 else min(8, max(1, 64 // min(M * K, M * N, M * r, r * K, N * r)))


@functools.cache
def shape_errors(
    shape: Shape, dtypes: Dtypes, *, backward: bool, dropout_p: float = 0.0, transposed: bool = False
) -> dict[str, Error]:
    """The largest errors over a shape's cases, measured once for the shape and for the median.

    With `transposed`, weight is a view of stride (1, N).
    """
    drawn = []
    for i in range(draws(shape)):
        case = make_case(shape, dtypes, dropout_p=dropout_p, draw=i)
        if transposed:
            case = replace(case, weight=case.weight.T.contiguous().T)
        drawn.append(errors(case, backward=backward))
    return {name: Error(*map(max, zip(*(e[name] for e in drawn), strict=True))) for name in drawn[0]}


def assert_within_bound(measured: dict[str, Error]) -> None:
    for name, e in measured.items():
        assert e.within_bound, f"{name}: error {e.kernel:.3g}, eager's {e.eager:.3g}, ulp {e.ulp:.3g}"


def assert_median(measured: Iterable[dict[str, Error]], names: Iterable[str]) -> None:
    """Over a grid of cases, errors are no larger than eager's."""
    measured = list(measured)
    for name in names:
        median = statistics.median(e[name].ratio for e in measured)
        assert median <= 1.0, f"{name}: median of error / eager's error over {len(measured)} cases is {median:.3f}"


def assert_same_losses(actual: Sequence[float], expected: Sequence[float]) -> None:
    """Of two training runs, step by step. A run that learns next to nothing could not tell a wrong one."""
    assert len(actual) == len(expected)
    assert expected[-1] < 0.8 * expected[0], f"the loss only goes from {expected[0]:.4f} to {expected[-1]:.4f}"
    for step, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert abs(ours / theirs - 1) <= LOSS, f"step {step}: loss {ours:.5f}, expected {theirs:.5f} +- {LOSS:.0%}"
