"""Mixtures in one layer beside the sum of their experts, written out."""

import compare
import pytest
import torch
from tiny_models import K, N
from torch import Tensor, nn

from lora_ops import Adapter, FactoredLinear, FusedLoraLinear
from lora_ops.compose import AttentionalMixture, LoraMixture, MixtureOfVectors, SoftmaxRouter, load_balancing_loss

F64 = torch.float64
EXPERTS, R = 4, 3


def linear() -> nn.Linear:
    return nn.Linear(K, N, dtype=F64)


def rows() -> Tensor:
    return torch.randn(2, 5, K, dtype=F64, requires_grad=True)


def mixture(shared_A: bool, **options) -> FactoredLinear:
    torch.manual_seed(0)
    factors = LoraMixture(K, N, EXPERTS, R, shared_A=shared_A, **options).to(F64)
    nn.init.normal_(factors.lora_B)
    nn.init.normal_(factors.router.weight)
    return FactoredLinear(linear(), factors, scaling=1.7)


def assert_same(layer: nn.Module, x: Tensor, y: Tensor, expected: Tensor) -> None:
    """Outputs, and the gradients of x and of all that trains."""
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    upstream = torch.randn_like(y)
    actual, exact = (torch.autograd.grad(out, trained, upstream) for out in (y, expected))
    for a, e in zip(actual, exact, strict=True):
        assert e.abs().sum() > 0
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("shared_A", [False, True], ids=["MoLORA", "HydraLoRA"])
def test_is_the_weighted_sum_of_its_experts(shared_A: bool, top_k: int | None) -> None:
    layer, x = mixture(shared_A, router=SoftmaxRouter(K, EXPERTS, top_k)), rows()
    f = layer.factors
    g = (x @ f.router.weight.T).softmax(-1)
    if top_k is not None:
        kept = torch.zeros_like(g).scatter(-1, g.topk(top_k).indices, 1.0)
        g = g * kept / (g * kept).sum(-1, keepdim=True)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    for k in range(EXPERTS):
        A = f.lora_A if shared_A else f.lora_A[R * k : R * (k + 1)]
        expected = expected + g[..., k : k + 1] * (1.7 * (x @ A.T) @ f.lora_B[:, R * k : R * (k + 1)].T)
    assert_same(layer, x, layer(x), expected)


def test_a_certain_router_is_one_lora() -> None:
    layer, x = mixture(False), rows()
    f = layer.factors
    nn.init.zeros_(f.router.weight)
    f.router.weight.data[2] = 1e6 * x[0, 0].detach()
    alone = FusedLoraLinear(K, N, R, lora_alpha=1.7 * R, dtype=F64)
    alone.weight, alone.bias = layer.weight, layer.bias
    alone.lora_A["default"], alone.lora_B["default"] = f.lora_A[2 * R : 3 * R], f.lora_B[:, 2 * R : 3 * R].contiguous()
    torch.testing.assert_close(layer(x)[0, 0], alone(x)[0, 0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shared_A", [False, True])
def test_starts_as_the_frozen_layer(shared_A: bool) -> None:
    base = linear()
    layer = FactoredLinear(base, LoraMixture.of(base, EXPERTS, R, shared_A=shared_A).to(F64))
    x = rows()
    torch.testing.assert_close(layer(x), base(x), rtol=1e-13, atol=1e-13)
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"factors.lora_A", "factors.lora_B", "factors.router.weight"}
    assert layer.factors.lora_A.shape == ((R if shared_A else EXPERTS * R), K)


def test_half_precision_rows_are_routed_in_fp32() -> None:
    torch.manual_seed(0)
    layer = FactoredLinear(nn.Linear(K, N, dtype=torch.bfloat16), LoraMixture(K, N, EXPERTS, R, std=0.02))
    nn.init.normal_(layer.factors.lora_B)
    x = torch.randn(5, K).bfloat16()
    gate = layer.factors.router(x)
    assert gate.dtype == torch.float32
    torch.testing.assert_close(gate.sum(-1), torch.ones(5))
    y = layer(x)
    assert y.dtype == torch.bfloat16
    exact = x.double() @ layer.weight.double().T + layer.bias.double()
    A, B = (t.detach().double() for t in (layer.factors.lora_A, layer.factors.lora_B))
    exact = exact + ((x.double() @ A.T) * gate.double().repeat_interleave(R, -1)) @ B.T
    eager = nn.functional.linear(x, layer.weight, layer.bias)
    eager = (eager + ((x.float() @ A.float().T) * gate.repeat_interleave(R, -1)) @ B.float().T).bfloat16()
    measured = compare.error(y, eager, exact)
    assert measured.within_bound, measured


@pytest.mark.parametrize("ranks", [(3, 3), (3, 5)], ids=str)
def test_attention_weighs_what_adapters_add(ranks: tuple[int, int]) -> None:
    torch.manual_seed(0)
    adapters = [
        Adapter(torch.randn(r, K, dtype=F64), torch.randn(N, r, dtype=F64), s) for r, s in zip(ranks, (0.5, 2.0), strict=True)
    ]
    layer, x = FactoredLinear(linear(), AttentionalMixture(adapters)), rows()
    f = layer.factors
    nn.init.normal_(f.selector, std=0.02)
    h = [s * (x @ A.T) @ B.T for A, B, s in zip(f.lora_A, f.lora_B, f.scalings, strict=True)]
    h = [torch.zeros_like(h[0]), *h]
    e = torch.stack([torch.zeros_like(h[0][..., 0]), *(h_k @ w for h_k, w in zip(h[1:], f.selector, strict=True))], -1)
    g = e.softmax(-1)
    expected = nn.functional.linear(x, layer.weight, layer.bias) + sum(g[..., k : k + 1] * h_k for k, h_k in enumerate(h))
    assert (g.max(-1).values - g.min(-1).values).min() > 0.01
    assert_same(layer, x, layer(x), expected)
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"factors.selector", "factors.lora_A.1", "factors.lora_B.1"}
    assert f.penalty() == f.selector.abs().sum()


def test_attention_may_choose_one_adapter_or_none() -> None:
    torch.manual_seed(0)
    adapters = [Adapter(torch.randn(R, K, dtype=F64), torch.randn(N, R, dtype=F64), 2.0) for _ in range(2)]
    layer = FactoredLinear(linear(), AttentionalMixture(adapters))
    x = torch.randn(K, dtype=F64)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    added = [2.0 * a.lora_B @ (a.lora_A @ x) for a in adapters]
    for chosen in (0, 1):
        signs = [1e3 if k == chosen else -1e3 for k in range(2)]
        layer.factors.selector.data = torch.stack([s * h for s, h in zip(signs, added, strict=True)])
        torch.testing.assert_close(layer(x), base + added[chosen], rtol=1e-11, atol=1e-11)
    layer.factors.selector.data = torch.stack([-1e3 * h for h in added])
    torch.testing.assert_close(layer(x), base, rtol=1e-11, atol=1e-11)


def test_vectors_scale_the_output() -> None:
    torch.manual_seed(0)
    base, x = linear(), rows()
    z = base(x)
    layer = MixtureOfVectors(base, EXPERTS).to(F64)
    torch.testing.assert_close(layer(x), z, rtol=1e-12, atol=1e-12)
    nn.init.normal_(layer.vectors)
    nn.init.normal_(layer.router.weight)
    g = (z @ layer.router.weight.T).softmax(-1)
    expected = z * sum(g[..., k : k + 1] * layer.vectors[k] for k in range(EXPERTS))
    assert_same(layer, x, layer(x), expected)


def test_balance_is_1_where_every_expert_has_its_share() -> None:
    even = torch.full((8, 4), 0.25)
    assert load_balancing_loss(even, torch.arange(8)[:, None] % 4) == 1.0
    certain = torch.eye(4)[torch.zeros(8, dtype=torch.long)]
    assert load_balancing_loss(certain, torch.zeros(8, 1, dtype=torch.long)) == 4.0


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"top_k must be in \[1, 4\]"):
        SoftmaxRouter(K, 4, 5)
    with pytest.raises(ValueError, match="num_experts must be an integer >= 1, got 0"):
        LoraMixture(K, N, 0)
    with pytest.raises(ValueError, match="at least one adapter"):
        AttentionalMixture([])
