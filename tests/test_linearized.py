"""L-LoRA: layers that act by their adapter's first derivative."""

import pytest
import torch
from tiny_models import K, Mlp, N, injected, llama, tokens
from torch import Tensor, nn
from torch.func import jvp

from lora_ops import FactoredLinear, lora_layers
from lora_ops.compose import LinearizedFactors, linearize

F64 = torch.float64
R, S = 3, 1.7


def layer_and_x(B0_is_zero: bool) -> tuple[FactoredLinear, Tensor]:
    torch.manual_seed(0)
    B0 = torch.zeros(N, R, dtype=F64) if B0_is_zero else torch.randn(N, R, dtype=F64)
    factors = LinearizedFactors(torch.randn(R, K, dtype=F64), B0)
    return FactoredLinear(nn.Linear(K, N, dtype=F64), factors, scaling=S), torch.randn(7, K, dtype=F64)


def moved(layer: FactoredLinear, dA: Tensor, dB: Tensor) -> FactoredLinear:
    f = layer.factors
    f.lora_A.data, f.lora_B.data = f.A0 + dA, f.B0 + dB
    return layer


def steps() -> tuple[Tensor, Tensor]:
    return torch.randn(R, K, dtype=F64), torch.randn(N, R, dtype=F64)


@pytest.mark.parametrize("B0_is_zero", [False, True])
def test_is_the_first_order_taylor_expansion(B0_is_zero: bool) -> None:
    layer, x = layer_and_x(B0_is_zero)
    f = layer.factors

    def lora(A: Tensor, B: Tensor) -> Tensor:
        return nn.functional.linear(x, layer.weight, layer.bias) + S * (x @ A.T) @ B.T

    dA, dB = steps()
    at_0, along = jvp(lora, (f.A0, f.B0), (dA, dB))
    torch.testing.assert_close(moved(layer, dA, dB)(x), at_0 + along, rtol=1e-12, atol=1e-11)
    assert not torch.allclose(lora(f.A0 + dA, f.B0 + dB), at_0 + along, rtol=0.1)
    assert torch.equal(moved(layer, 0 * dA, 0 * dB)(x), layer(x))


def test_what_several_add_is_the_sum_of_what_each_adds() -> None:
    layer, x = layer_and_x(False)
    (A1, B1), (A2, B2) = steps(), steps()
    at_0 = moved(layer, 0 * A1, 0 * B1)(x)
    both = moved(layer, 0.3 * A1 + A2, 0.3 * B1 + B2)(x) - at_0
    each = 0.3 * (moved(layer, A1, B1)(x) - at_0) + (moved(layer, A2, B2)(x) - at_0)
    torch.testing.assert_close(both, each, rtol=1e-11, atol=1e-11)


def test_gradients_are_those_at_the_start() -> None:
    layer, x = layer_and_x(False)
    upstream = torch.randn(7, N, dtype=F64)
    found = []
    for scale in (0.0, 1.0):
        moved(layer, *(scale * d for d in steps()))
        found.append(torch.autograd.grad(layer(x), [layer.factors.lora_A, layer.factors.lora_B], upstream))
    for before, after in zip(*found, strict=True):
        torch.testing.assert_close(before, after, rtol=1e-12, atol=1e-12)


def test_a_model_starts_as_it_was() -> None:
    torch.manual_seed(0)
    model = injected(llama().to(F64))
    before = model(input_ids=tokens()).logits
    linearize(model)
    assert not list(lora_layers(model))
    torch.testing.assert_close(model(input_ids=tokens()).logits, before, rtol=1e-11, atol=1e-11)
    trained = {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}


def test_quantised_layers_and_a_start_from_zero() -> None:
    torch.manual_seed(0)
    model = injected(Mlp(), quant="nf4", target_modules=["first", "block.0"])
    x = torch.randn(5, 12)
    for _, layer in lora_layers(model):
        nn.init.zeros_(layer.lora_B["default"])
    before = model(x)
    linearize(model)
    assert torch.equal(model(x), before)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.requires_grad} == {"lora_B"}


def test_errors() -> None:
    with pytest.raises(ValueError, match="no linear layer with LoRA"):
        linearize(Mlp())
    with pytest.raises(ValueError, match="got 'other'"):
        linearize(injected(Mlp()), "other")
    with pytest.raises(ValueError, match="DoRA"):
        linearize(injected(Mlp(), use_dora=True))
