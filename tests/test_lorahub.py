"""LoRAHub: factors added with weights, and weights found by trying."""

import math

import pytest
import torch
from test_combine import delta, drawn
from tiny_models import Mlp, assert_untouched, injected, snapshot
from torch import nn

from lora_ops import Adapter, LoraConfig, add_adapter, lora_layers, set_adapter
from lora_ops.compose import lorahub, search_weights, weighted_factors


def two_alike() -> nn.Module:
    torch.manual_seed(0)
    model = injected(Mlp())
    return add_adapter(model, LoraConfig(r=4, init_lora_weights=False), "other")


def test_composes_with_cross_terms() -> None:
    a, b = drawn((4, 4), (1.5, 1.5), torch.float64)
    composed = weighted_factors([a, b], [0.7, -0.4])
    cross = 1.5 * 0.7 * -0.4 * (a.lora_B @ b.lora_A + b.lora_B @ a.lora_A)
    torch.testing.assert_close(delta(composed), 0.49 * delta(a) + 0.16 * delta(b) + cross, rtol=1e-12, atol=1e-12)
    for weights, alone in (([1.0, 0.0], a), ([0.0, 1.0], b)):
        torch.testing.assert_close(delta(weighted_factors([a, b], weights)), delta(alone), rtol=1e-13, atol=1e-13)


def test_the_search_finds_a_minimum_within_its_bounds() -> None:
    asked = []

    def loss(w: list[float]) -> float:
        asked.append(w)
        return (w[0] - 0.5) ** 2 + (w[1] + 9) ** 2

    g = torch.Generator().manual_seed(0)
    w, value = search_weights(loss, 2, steps=200, generator=g)
    assert asked[0] == [0.0, 0.0]
    assert len(asked) == 200
    assert max(abs(x) for tried in asked for x in tried) == 1.5
    assert w[1] == -1.5
    assert math.isclose(w[0], 0.5 - 0.0125, abs_tol=0.02)  # l1 pulls by 0.05 / 2 / 2
    assert value == loss(w) + 0.05 * (abs(w[0]) + abs(w[1])) / 2
    assert search_weights(lambda w: math.nan if any(w) else 1.0, 2, generator=g) == ([0.0, 0.0], 1.0)
    assert len(asked) == 201
    search_weights(loss, 2, generator=g)
    assert len(asked) == 241


def test_a_model_learns_which_adapter_it_needs() -> None:
    model, x = two_alike(), torch.randn(64, 12)
    set_adapter(model, "other")
    wanted = model(x).detach()
    set_adapter(model, "default")
    g = torch.Generator().manual_seed(0)
    w = lorahub(model, ["default", "other"], "hub", lambda m: (m(x) - wanted).square().mean().item(), steps=120, generator=g)
    assert abs(w[0]) < 0.35
    assert abs(abs(w[1]) - 1) < 0.3  # (-B)(-A) = B A
    for _, layer in lora_layers(model):
        assert layer.active_adapters == ["hub"]
        stock = [Adapter(layer.lora_A[n], layer.lora_B[n], layer.scaling[n]) for n in ("default", "other")]
        torch.testing.assert_close(layer.delta_weight("hub"), delta(weighted_factors(stock, w)).float())


def test_an_error_of_the_loss_leaves_the_model_as_it_was() -> None:
    model = two_alike()
    set_adapter(model, "other")
    before = snapshot(model)

    def fails(_: nn.Module) -> float:
        raise KeyError("no data")

    with pytest.raises(KeyError, match="no data"):
        lorahub(model, ["default", "other"], "hub", fails)
    assert_untouched(model, before)
    assert all(layer.active_adapters == ["other"] for _, layer in lora_layers(model))


def test_errors() -> None:
    model = two_alike()
    add_adapter(model, LoraConfig(r=2), "small")
    before = snapshot(model)
    for names, new, words in (
        (["default", "small"], "hub", r"adapters\[1\] must have A, B and scaling as the first"),
        (["default", "other"], "other", "must be a new name, got 'other'"),
        (["default", "third"], "hub", "got 'third'"),
    ):
        with pytest.raises(ValueError, match=words):
            lorahub(model, names, new, lambda _: 0.0)
        assert_untouched(model, before)
    with pytest.raises(ValueError, match="one for each of 2 adapters"):
        weighted_factors(drawn(), [1.0])
    with pytest.raises(ValueError, match="steps must be"):
        search_weights(lambda _: 0.0, 2, steps=0)
    with pytest.raises(ValueError, match="bound must be positive"):
        search_weights(lambda _: 0.0, 2, bound=-1.0)
    with pytest.raises(ValueError, match="no layer with LoRA"):
        lorahub(Mlp(), ["default"], "hub", lambda _: 0.0)
