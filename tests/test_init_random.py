"""Initialisations that look at nothing but shapes."""

import pytest
import torch
from initialised import K, N, R, linear, nearness, peft_layer, product, started, started_as_peft_s, with_peft
from torch import nn

import lora_ops
from lora_ops import FusedLoraLinear


def first_gradients(layer: FusedLoraLinear) -> tuple[torch.Tensor, torch.Tensor]:
    layer(torch.randn(9, K)).square().sum().backward()
    return tuple(p.grad for p in (layer.lora_A["default"], layer.lora_B["default"]))  # type: ignore[return-value]


@pytest.mark.parametrize(("init", "zero"), [("init_a", "B"), ("init_b", "A"), (True, "B"), ("gaussian", "B"), ("default", "B")])
def test_one_factor_is_zero_and_the_other_gets_the_first_gradient(init: bool | str, zero: str) -> None:
    """...none, that is: where one factor is zero, the other one's gradient is."""
    layer = started(init)
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    dA, dB = first_gradients(layer)
    none, moves = (A, B) if zero == "A" else (B, A)
    assert not none.any()
    assert moves.all()
    of_none, of_moves = (dA, dB) if zero == "A" else (dB, dA)
    assert not of_moves.any()
    assert of_none.any()


def test_where_both_factors_are_zero_nothing_ever_trains() -> None:
    layer = started("init_a")
    nn.init.zeros_(layer.lora_A["default"])
    assert not any(gradient.any() for gradient in first_gradients(layer))


@pytest.mark.parametrize(
    ("init", "factor", "deviation"),
    [("init_a", "lora_A", 500**-0.5), ("init_b", "lora_B", 50**-0.5), ("offset", "lora_B", 50**-0.5)],
)
def test_deviations(init: str, factor: str, deviation: float) -> None:
    values = getattr(FusedLoraLinear(500, 400, 50, init_lora_weights=init), factor)["default"].detach()
    assert abs(values.std() / deviation - 1) < 5 / (2 * values.numel()) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offset_leaves_the_output_where_it_was(dtype: torch.dtype) -> None:
    """Up to the rounding of W0 − s B A, and both factors move."""
    base = linear(dtype)
    x = torch.randn(9, K, dtype=dtype)
    before = base(x)
    layer = started("offset", base)
    assert product(layer).norm() > 0.5 * base.weight.float().norm()
    assert nearness(layer(x), before) < 4 * torch.finfo(dtype).eps
    assert torch.equal(layer.original_weight, base.weight)
    if dtype == torch.float32:
        assert all(gradient.any() for gradient in first_gradients(layer))


def test_orthogonal_is_peft_s() -> None:
    base = linear()
    _, A, B = peft_layer(with_peft(nn.Sequential(base), init_lora_weights="orthogonal"))
    layer = started_as_peft_s("orthogonal", base)
    assert nearness(layer.lora_A["default"], A) < 1e-5
    assert nearness(layer.lora_B["default"], B) < 1e-5
    assert product(layer).abs().max() < 1e-6
    assert all(gradient.any() for gradient in first_gradients(layer))
    with pytest.raises(ValueError, match="r must be even"):
        FusedLoraLinear(K, N, 3, init_lora_weights="orthogonal")


def test_a_generator_decides() -> None:
    for init in ("default", "gaussian", "init_a", "init_b", "offset", "orthogonal", "pissa_niter_1"):
        torch.manual_seed(0)
        first, again, other = (
            lora_ops.init.find(init)(linear().weight, R, 1.0, generator=torch.Generator().manual_seed(seed))
            for seed in (1, 1, 2)
        )
        assert torch.equal(first.lora_A, again.lora_A)
        assert torch.equal(first.lora_B, again.lora_B)
        assert not (torch.equal(first.lora_A, other.lora_A) and torch.equal(first.lora_B, other.lora_B))
