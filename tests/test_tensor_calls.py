"""csrc/tensor_calls.cpp: what fits is done with tensors as they come, bit for bit like the long way; the rest is left to it."""

import pytest
import torch
from compare import BF16, F16, F32, Dtypes, fused_lora, make_case, run
from four_bit import fused_qlora, make_quantised_case

import lora_ops
from lora_ops import _C, ops

pytestmark = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__") or ops.base_on_torch(F32),
    reason="this torch has no table of functions for its tensors, or the base product is torch's",
)

SHAPE = (5, 96, 48, 8)


@pytest.fixture
def taken(monkeypatch):
    """How many calls of either kind were done as they came."""
    counts = {"forward_of_tensors": 0, "backward_of_tensors": 0}

    def counting(name):
        call = getattr(_C, name)

        def count(*args):
            done = call(*args)
            counts[name] += done is not None
            return done

        return count

    for name in counts:
        monkeypatch.setattr(_C, name, counting(name))
    return counts


def the_long_way(monkeypatch):
    for name in ("forward_of_tensors", "backward_of_tensors"):
        monkeypatch.setattr(_C, name, lambda *args: None)


@pytest.mark.parametrize("dtypes", [Dtypes(F32, F32), Dtypes(BF16, F32), Dtypes(BF16, BF16), Dtypes(F16, F32)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("fused", [fused_lora, fused_qlora])
def test_bit_for_bit(monkeypatch, taken, fused, dtypes, dropout_p):
    make = make_case if fused is fused_lora else make_quantised_case
    case = make(SHAPE, dtypes, bias=True, dropout_p=dropout_p)
    done = everything(fused, case)
    assert taken == {"forward_of_tensors": 2, "backward_of_tensors": 1}
    the_long_way(monkeypatch)
    asked = everything(fused, case)
    assert done.keys() == asked.keys() == {"y", "dx", "dA", "dB", "dbias"}
    for name in done:
        assert torch.equal(done[name], asked[name]) and done[name].dtype == asked[name].dtype, name


def everything(fused, case):
    results = {}
    for backward in (False, True):
        torch.manual_seed(1)
        results |= run(fused, case, backward=backward)
    return results


def arguments(**other):
    case = make_case(SHAPE, Dtypes(F32, F32), bias=True)
    given = {
        "x": case.x,
        "weight": case.weight,
        "lora_A": case.lora_A,
        "lora_B": case.lora_B,
        "bias": case.bias,
        "panels": None,
    }
    given |= {"dropout_p": 0.0, "scaling": 0.5} | other
    return tuple(given[name] for name in ("x", "weight", "lora_A", "lora_B", "bias", "panels", "scaling", "dropout_p"))


def call(x, weight, A, B, bias, panels, scaling, dropout_p):
    return _C.forward_of_tensors(x, (weight,), A, B, bias, panels, (0, 0, 1.0), scaling, dropout_p, 1)


M, K, N, r = SHAPE


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.randn(2, 3, K)},
        {"x": torch.randn(2, 1, 3, 1, K)},
        {"x": torch.randn(K)},
        {"x": torch.randn(M, 2 * K)[:, K:]},
        {"x": torch.randn(4, M, 2 * K)[:, :, :K]},
        {"x": torch.randn(1, K).expand(1, K)},
        {"weight": torch.randn(K, N).t()},
        {"weight": torch.randn(N, 2 * K)[:, :K]},
        {"bias": None},
        {"weight": torch.nn.Parameter(torch.randn(N, K), requires_grad=False)},
        {"panels": True},
    ],
    ids=lambda other: str({name: getattr(t, "shape", t) for name, t in other.items()}),
)
def test_what_fits(monkeypatch, other):
    if "panels" in other:
        other = {"weight": (weight := torch.randn(N, K)), "panels": lora_ops.pack_weight(weight, F32)}
    args = arguments(**other)
    done = call(*args)
    assert done is not None
    the_long_way(monkeypatch)
    *tensors, panels, scaling, dropout_p = args
    expected = torch.ops.lora_ops.lora_forward(*tensors, panels, None, scaling, dropout_p)
    assert all(torch.equal(a, b) and a.shape == b.shape for a, b in zip(done, expected, strict=True))
    assert not done[0]._is_view()


class Sub(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.randn(0, K)},
        {"x": torch.randn(M, K + 1)},
        {"x": torch.randn(K, M).t()},
        {"x": torch.randn(3, 2, K).transpose(0, 1)},
        {"x": torch.randn(1, K).expand(3, K)},
        {"x": torch.randn(M, K, dtype=torch.float64)},
        {"x": torch.ones(M, K, dtype=torch.int32)},
        {"x": torch.randn(M, K).as_subclass(Sub)},
        {"x": torch.randn(M, K, device="meta")},
        {"x": torch.randn(M, K).to_sparse()},
        {"x": torch.tensor(1.0)},
        {"weight": torch.randn(N, K + 1)},
        {"weight": torch.randn(N)},
        {"weight": torch.randn(N, K, dtype=BF16)},
        {"weight": torch.randn(2 * N, 2 * K)[::2, ::2]},
        {"lora_A": torch.randn(r, K + 1)},
        {"lora_A": torch.randn(r + 1, K)},
        {"lora_A": torch.randn(0, K)},
        {"lora_A": torch.randn(K, r).t()},
        {"lora_A": torch.randn(r, K, dtype=F16)},
        {"lora_B": torch.randn(N + 1, r)},
        {"lora_B": torch.randn(N, r, dtype=BF16)},
        {"lora_B": torch.randn(r, N).t()},
        {"bias": torch.randn(N + 1)},
        {"bias": torch.randn(1, N)},
        {"bias": torch.randn(2 * N)[::2]},
        {"panels": torch.randn(5)},
        {"scaling": float("nan")},
        {"scaling": float("inf")},
        {"dropout_p": 1.0},
        {"dropout_p": -0.1},
        {"dropout_p": float("nan")},
    ],
    ids=lambda other: str({name: (tuple(t.shape), t.dtype) if isinstance(t, torch.Tensor) else t for name, t in other.items()}),
)
def test_what_does_not_fit_is_left_to_the_long_way(other):
    assert call(*arguments(**other)) is None


def test_a_gradient_that_does_not_fit(taken):
    """A gradient whose columns are not neighbours: it is copied first."""
    case = make_case(SHAPE, Dtypes(F32, F32), bias=True)
    x, A, B = (t.clone().requires_grad_() for t in (case.x, case.lora_A, case.lora_B))
    dy = torch.randn(N, M)
    results = []
    for gradient in (dy.t(), dy.t().contiguous()):
        y = lora_ops.lora_linear(x, case.weight, A, B, scaling=0.5)
        results.append(torch.autograd.grad(y, (x, A, B), gradient))
    assert taken == {"forward_of_tensors": 2, "backward_of_tensors": 1}
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
