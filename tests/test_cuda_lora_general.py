"""The factors that lora_forward and lora_backward_dx take beside the plain op, on a device, by compare.py's policy:

y = m ∘ (x W0ᵀ + scaling · (S ∘ gate) Bᵀ) + bias,  dx = dy W0 + drop'((dS ∘ gate) A),  S and dS as columns of wider matrices
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from compare import BF16, F16, F32, Case, Dtypes, assert_within_bound, error, make_case
from cuda_structs import TILES, Dropout, LoraBackwardDx, LoraForward, call, empty, laid_out, matrix, strides
from ptx.build import REPOSITORY
from ptx.device import Device, Run
from torch import Tensor

from lora_ops import reference

pytestmark = pytest.mark.cuda

DTYPES = [Dtypes(t, a) for t in (BF16, F16) for a in (t, F32)]
# (M, K, N, r): few rows; beyond a large tile in every direction, more ranks than an mma's
SHAPES = [(3, 24, 40, 5), (130, 136, 136, 20)]
GATES = ["none", "rank", "token"]


@pytest.fixture(scope="module")
def gemms(nvcc: str) -> Device:
    return Device([REPOSITORY / "csrc" / "cuda" / f"lora_{op}.cu" for op in ("forward", "backward_dx")])


def gate_of(case: Case, kind: str) -> Tensor | None:
    """Both signs, and zero: a gate that is shut."""
    M, r = case.x.shape[0], case.lora_A.shape[0]
    if kind == "none":
        return None
    gate = torch.randn((r,) if kind == "rank" else (M, r), generator=torch.Generator().manual_seed(r))
    gate[..., r // 2] = 0
    return gate


def scale_of(case: Case, dtype: torch.dtype) -> Tensor:
    return torch.rand(case.weight.shape[0], generator=torch.Generator().manual_seed(1)).add(0.5).to(dtype)


def columns_of_wider(t: Tensor, offset: int) -> Tensor:
    """t as columns of a matrix that is NaN elsewhere: the stacked S of layers that share x."""
    wide = torch.full((t.shape[0], t.shape[1] + 2 * offset), torch.nan)
    return wide[:, offset : offset + t.shape[1]].copy_(t)


def put(run: Run, t: Tensor | None) -> Tensor | None:
    return None if t is None else run.register(t, readonly=True)


def forward(
    run: Run,
    case: Case,
    *,
    tile: str = "automatic",
    layout: str = "plain",
    gate: Tensor | None = None,
    m: Tensor | None = None,
    offset: int = 0,
    base: Tensor | None = None,
) -> Tensor:
    """With an offset, S is the columns from there on of a wider matrix. With `base`, y holds it and the weight is absent."""
    (M, K), N, r = case.x.shape, case.weight.shape[0], case.lora_A.shape[0]
    S = (case.x.double() @ case.lora_A.double().T).float()
    x, weight = (None, None) if base is not None else (laid_out(case.x, layout), laid_out(case.weight, layout, apart=8))
    y = empty(M, N, case.x.dtype, layout) if base is None else laid_out(base, layout)
    S = columns_of_wider(S, offset)
    gate, m, bias, lora_B = (None if t is None else t.clone() for t in (gate, m, case.bias, case.lora_B))
    for t in (x, weight, lora_B, bias, S, gate, m):
        put(run, t)
    S_at, S_stride = strides(S)
    matrices = map(matrix, (x, weight, lora_B, bias, y))
    call(run, "lora_forward", LoraForward(
        M, K, N, r, *matrices, S_at, case.scaling, TILES[tile], S_stride, *strides(gate), matrix(m)
    ))  # fmt: skip
    return y


def assert_right_forward(y: Tensor, case: Case, gate: Tensor | None, m: Tensor | None) -> None:
    def value(case: Case, dtype: torch.dtype | None) -> Tensor:
        x, weight, A, B, bias = (
            None if t is None else t.to(dtype or t.dtype) for t in (case.x, case.weight, case.lora_A, case.lora_B, case.bias)
        )
        S = F.linear(x.to(A.dtype), A)
        S = S if gate is None else S * gate.to(S.dtype)
        result = F.linear(x, weight)
        result = (result + F.linear(S, B) * case.scaling).to(result.dtype)
        result = result if m is None else result * m.to(result.dtype)
        return result if bias is None else result + bias

    assert_within_bound({"y": error(y, value(case, None), value(case, torch.float64))})


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_forward(gemms: Device, dtypes: Dtypes, gate: str) -> None:
    """Every tile, scales in either dtype or none, with a bias and without."""
    settings = zip(
        itertools.product(("small", "medium", "large"), SHAPES), itertools.cycle((None, F32, dtypes.x)), strict=False
    )
    for i, ((tile, shape), scale) in enumerate(settings):
        case = make_case(shape, dtypes, bias=i % 2 == 0)
        g, m = gate_of(case, gate), None if scale is None else scale_of(case, scale)
        with gemms.run(arch=(80, 90)[i % 2]) as run:
            y = forward(run, case, tile=tile, gate=g, m=m)
        assert_right_forward(y, case, g, m)


@pytest.mark.parametrize("layout", ["padded", "odd"])
def test_forward_of_every_rank(gemms: Device, layout: str) -> None:
    for r, gate in zip((1, 2, 4, 7, 16, 17, 36, 100), itertools.cycle(GATES[1:]), strict=False):
        case = make_case((20, 32, 24, r), Dtypes(BF16, F32), bias=True)
        g, m = gate_of(case, gate), scale_of(case, F32)
        with gemms.run() as run:
            y = forward(run, case, layout=layout, gate=g, m=m, offset=r % 5)
        assert_right_forward(y, case, g, m)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_forward_of_base_product_in_y(gemms: Device, dtypes: Dtypes) -> None:
    """y = m ∘ (y + scaling · (S ∘ gate) Bᵀ) + bias"""
    for shape, layout in zip(SHAPES, ("odd", "plain"), strict=True):
        case = make_case(shape, dtypes, bias=True)
        g, m, base = gate_of(case, "token"), scale_of(case, F32), (case.x.double() @ case.weight.double().T).to(case.x.dtype)
        with gemms.run() as run:
            y = forward(run, case, gate=g, m=m, base=base, layout=layout)
        assert_right_forward(y, case, g, m)


@pytest.mark.parametrize("offset", [1, 4])
def test_strides_and_neutral_factors_change_nothing(gemms: Device, offset: int) -> None:
    """S as columns that are read one by one or four at a time; a gate and a scale of ones."""
    for r in (3, 16):
        case = make_case((70, 40, 72, r), Dtypes(BF16, F32), bias=True)
        results = []
        for at, factor in ((0, False), (offset, False), (0, True)):
            with gemms.run() as run:
                ones = {"gate": torch.ones(r), "m": torch.ones(72)} if factor else {}
                results.append(forward(run, case, offset=at, **ones))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def backward_dx(
    run: Run, case: Case, *, tile: str = "automatic", gate: Tensor | None = None, offset: int = 0, base: Tensor | None = None
) -> Tensor:
    (M, K), N, r, p = case.x.shape, case.weight.shape[0], case.lora_A.shape[0], case.dropout_p
    dS = columns_of_wider((case.scaling * (case.dy.double() @ case.lora_B.double())).float(), offset)
    dx = torch.empty(M, K, dtype=case.dy.dtype) if base is None else base.clone()
    dy, weight = (None, None) if base is not None else (case.dy.clone(), case.weight.clone())
    lora_A, gate, seed = (None if t is None else t.clone() for t in (case.lora_A, gate, case.seed))
    for t in (dy, weight, lora_A, dS, gate, seed):
        put(run, t)
    dropout = Dropout(None, 0, 1.0) if seed is None else Dropout(seed.data_ptr(), reference.dropout_threshold(p), 1 / (1 - p))
    dS_at, dS_stride = strides(dS)
    call(run, "lora_backward_dx", LoraBackwardDx(
        M, K, N, r, *map(matrix, (dy, weight, lora_A, dx)), dS_at, dropout, TILES[tile], dS_stride, *strides(gate)
    ))  # fmt: skip
    return dx


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_backward_dx(gemms: Device, dtypes: Dtypes, gate: str) -> None:
    for i, (tile, shape) in enumerate(itertools.product(("small", "medium", "large"), SHAPES)):
        case = make_case(shape, dtypes, dropout_p=i % 2 / 4)
        g = gate_of(case, gate)
        base = None if i % 3 else (case.dy.double() @ case.weight.double()).to(case.dy.dtype)
        with gemms.run(arch=(80, 90)[i % 2]) as run:
            dx = backward_dx(run, case, tile=tile, gate=g, offset=(0, 4, 3)[i % 3], base=base)
        keep = 1 if case.seed is None else reference.dropout_keep(case.seed, case.dropout_p, *case.x.shape) / (1 - 0.25)

        def value(case: Case, dtype: torch.dtype | None) -> Tensor:
            dy, weight, A, B = (t.to(dtype or t.dtype) for t in (case.dy, case.weight, case.lora_A, case.lora_B))
            dS = (dy.to(B.dtype) * case.scaling) @ B
            dS = dS if g is None else dS * g.to(dS.dtype)  # noqa: B023
            low_rank = (dS @ A) * (keep.to(A.dtype) if isinstance(keep, Tensor) else keep)  # noqa: B023
            return dy @ weight + low_rank.to(dy.dtype)

        assert_within_bound({"dx": error(dx, value(case, None), value(case, torch.float64))})
