"""PiSSA, MiLoRA, OLoRA and LoRA-XS: decompositions of the weight."""

import pytest
import torch
from initialised import (
    F64,
    K,
    N,
    R,
    alignment,
    linear,
    nearness,
    peft_layer,
    product,
    same_up_to_signs,
    started,
    started_as_peft_s,
    with_peft,
)  # fmt: skip
from torch import nn

import lora_ops
from lora_ops import FactoredLinear, FusedLoraLinear
from lora_ops.init import LoraXS, lora_xs, low_rank

DTYPES = [torch.float32, torch.bfloat16]


def rounded_by_peft(dtype: torch.dtype) -> float:
    """How far PEFT's A and B may be: it rounds them to the weight's dtype, after it has subtracted what they were before."""
    return max(1e-5, torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pissa_is_peft_s(dtype: torch.dtype) -> None:
    base = linear(dtype)
    weight, A, B = peft_layer(with_peft(nn.Sequential(base), init_lora_weights="pissa"))
    layer = started("pissa", base)
    assert nearness(layer.weight, weight) < torch.finfo(dtype).eps
    assert layer.weight.dtype == dtype
    eps = rounded_by_peft(dtype)
    assert same_up_to_signs(layer.lora_A["default"], A) < eps
    assert same_up_to_signs(layer.lora_B["default"].T, B.T) < eps


def test_fast_pissa_is_peft_s() -> None:
    """From the same random start, which shows; after many iterations it does not."""
    base = linear()
    weight, A, B = peft_layer(with_peft(nn.Sequential(base), seed=3, init_lora_weights="pissa_niter_4"))
    layer = started_as_peft_s("pissa_niter_4", base, seed=3)
    assert nearness(layer.weight, weight) < 1e-6
    assert nearness(layer.lora_A["default"], A) < 1e-4
    assert nearness(layer.lora_B["default"], B) < 1e-4
    exact = started("pissa", base).lora_A["default"]
    assert alignment(A, exact) < 0.99
    assert alignment(started("pissa_niter_100", base).lora_A["default"], exact) > 1 - 1e-5


@pytest.mark.parametrize("lora_alpha", [R, R / 2, 2 * R])
def test_pissa_at_any_scaling(lora_alpha: float) -> None:
    """The layer starts as W0, what trains is the best approximation of rank r, and the two factors are of one size."""
    base = linear(F64)
    S = torch.linalg.svdvals(base.weight.detach())
    layer = FusedLoraLinear.from_linear(base, R, lora_alpha=lora_alpha, init_lora_weights="pissa")
    assert nearness(layer.weight + product(layer), base.weight) < 1e-14
    assert abs((base.weight - product(layer)).norm() - S[R:].norm()) < 1e-12
    assert abs(layer.lora_A["default"].norm() / layer.lora_B["default"].norm() - 1) < 1e-12


def test_milora_leaves_the_principal_part() -> None:
    base = linear(F64)
    S = torch.linalg.svdvals(base.weight.detach())
    layer = started("milora", base)
    assert nearness(layer.weight + product(layer), base.weight) < 1e-14
    assert nearness(torch.linalg.svdvals(layer.weight)[:-R], S[:-R]) < 1e-12
    assert torch.linalg.svdvals(layer.weight)[-R:].max() < 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
def test_olora_is_peft_s(dtype: torch.dtype) -> None:
    base = linear(dtype)
    weight, A, B = peft_layer(with_peft(nn.Sequential(base), init_lora_weights="olora"))
    layer = started("olora", base)
    assert nearness(layer.weight, weight) < torch.finfo(dtype).eps
    eps = rounded_by_peft(dtype)
    assert nearness(layer.lora_A["default"], A) < eps
    assert nearness(layer.lora_B["default"], B) < eps
    Q = layer.lora_B["default"]
    assert (Q.T @ Q - torch.eye(R)).abs().max() < 1e-5


def test_lora_xs_trains_a_core_between_singular_vectors() -> None:
    base = linear(F64)
    W0 = base.weight.detach().clone()
    U, S, Vh = torch.linalg.svd(W0, full_matrices=False)
    factors = LoraXS(base.weight, R)
    layer = FactoredLinear(base, factors, scaling=1.0)
    x = torch.randn(9, K, dtype=F64)
    assert nearness(layer(x), base(x)) < 1e-3
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"factors.core"}
    assert factors.core.numel() == R * R
    assert 0 < factors.core.std() < 1e-4
    nn.init.eye_(factors.core)
    assert nearness(layer(x) - base(x), x @ ((U[:, :R] * S[:R]) @ Vh[:R]).T) < 1e-12
    layer(x).square().sum().backward()
    assert factors.core.grad is not None
    assert factors.core.grad.abs().min() > 0
    assert torch.equal(base.weight, W0)
    core = lora_xs(W0, R, 1.0).core
    assert core is not None
    assert core.shape == (R, R)


def test_low_rank_is_the_nearest_of_its_rank_in_the_weighted_norm() -> None:
    """As many random changes of it as you like are not nearer, and the plain one is not either."""
    M, row_w, col_w = linear(F64).weight.detach(), torch.rand(N, dtype=F64) + 0.1, torch.rand(K, dtype=F64) + 0.1

    def error(U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor) -> float:
        return (row_w[:, None] * (M - (U * S) @ Vh) * col_w).norm().item()

    U, S, Vh = low_rank(M, R, row_w, col_w)
    best = error(U, S, Vh)
    assert best < 0.99 * error(*low_rank(M, R))
    for _ in range(20):
        assert error(U + 1e-3 * torch.randn_like(U), S, Vh + 1e-3 * torch.randn_like(Vh)) > best
    exact = torch.linalg.svdvals(row_w[:, None] * M * col_w)[R:].norm()
    assert abs(best - exact) < 1e-12


def test_conv1d_and_its_transposed_weight() -> None:
    from tiny_models import conv1d

    conv = conv1d()
    x = torch.randn(9, conv.nx)
    before = conv(x)
    layer = FusedLoraLinear.from_linear(conv, R, init_lora_weights="pissa")
    assert nearness(layer(x), before) < 1e-5
    assert layer.state_dict()["weight"].shape == (conv.nx, conv.nf)
    assert product(layer).norm() > 0.1


BAD = [
    (lambda: started("pissa", lora_bias=True), "init_lora_weights must be True or False with lora_bias"),
    (lambda: FusedLoraLinear(8, 6, 7, init_lora_weights="olora"), "r must be at most min(N, K) = 6"),
    (lambda: FusedLoraLinear(8, 6, 2, lora_alpha=-1, init_lora_weights="pissa"), "scaling must be a finite number > 0"),
    (lambda: FusedLoraLinear(8, 6, 2, init_lora_weights="lora_ga"), 'for "lora_ga" see lora_ops.init'),
    (lambda: FusedLoraLinear(8, 6, 2, init_lora_weights="milora_niter_3"), "init_lora_weights must be True, False, "),
    (lambda: lora_ops.init.pissa(torch.ones(3), 1, 1.0), "weight must be (N, K)"),
    (lambda: lora_ops.init.pissa(torch.ones(3, 4), 0, 1.0), "r must be an integer >= 1, got 0"),
    (lambda: lora_ops.init.lora_ga(torch.ones(3, 4), 1, 1.0), "G must be given for 'lora_ga'"),
    (lambda: lora_ops.init.lora_ga(torch.ones(3, 4), 1, 1.0, G=torch.ones(4, 3)), "G must be (N, K) with weight (3, 4)"),
    (lambda: lora_ops.init.eva(torch.ones(3, 4), 1, 1.0, X=torch.ones(9, 3)), "X must be (M, K) with weight (3, 4)"),
    (lambda: lora_ops.init.corda(torch.ones(3, 4), 1, 1.0), "X must be given for 'corda'"),
    (lambda: lora_ops.FusedLoraEmbedding(9, 4, 2, init_lora_weights="pissa"), 'must be True, False or "gaussian" for an'),
    (lambda: lora_ops.FusedLoraConv1d(4, 4, 1, 2, init_lora_weights="pissa"), 'must be True, False or "gaussian" for an'),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_arguments(make, message) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert message in str(caught.value)
    with pytest.raises(TypeError, match="has no option 'iter'"):
        lora_ops.init.pissa(torch.ones(3, 4), 1, 1.0, iter=3)
