"""Factors that layers share."""

import pytest
import torch
from factored_layers import K, N, R, assert_close, assert_computes, fresh, is_base, linear, make_x, randomised, trainable
from torch import nn

from lora_ops import FactoredLinear, factors

SHAPES = [(N, K), (N - 3, K), (N, K - 5)]  # the pair's, and smaller ones


def layers_with(make, shared):
    layers = []
    for n, k in SHAPES:
        base = linear(n, k)
        layers.append(FactoredLinear(base, make(base, shared)))
    return randomised(nn.ModuleList(layers))


def slices(layer):
    pair = layer.factors.pair
    return pair.lora_A[:, : layer.in_features], pair.lora_B[: layer.out_features]


def assert_gradients_are_summed(layers, shared):
    """Of every shared parameter, the sum over layers of what each layer alone gives."""
    x = make_x()
    parameters = [p for p in shared.parameters() if p.requires_grad]
    apart = [torch.autograd.grad(layer(x[:, : layer.in_features]).square().sum(), parameters) for layer in layers]
    sum(layer(x[:, : layer.in_features]).square().sum() for layer in layers).backward()
    for i, p in enumerate(parameters):
        assert all(of_layer[i].abs().max() > 0 for of_layer in apart)
        assert_close(p.grad, sum(of_layer[i] for of_layer in apart))


def test_shared_factors_get_the_sum_of_the_layers_gradients():
    shared = factors.tied_pair(N, K, R)
    layers = layers_with(factors.tied_lora, shared)
    for layer in layers:
        A, B = slices(layer)
        delta = torch.diag(layer.factors.B_scale) @ B @ torch.diag(layer.factors.gate) @ A
        assert_computes(layer, delta, make_x(k=layer.in_features))
    assert_gradients_are_summed(layers, shared)


def test_tied_lora_s_parameters():
    """1 - 1/32 of LoRA's are saved by tying 32 layers; with vectors, r + N more in each."""
    shared, base = factors.tied_pair(N, K, R), nn.Linear(K, N)
    lora = 32 * R * (N + K)
    model = nn.ModuleList(FactoredLinear(base, factors.tied_lora(base, shared, vectors=False)) for _ in range(32))
    tied = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 1 - tied / lora == 0.96875
    layer = FactoredLinear(base, factors.tied_lora(base, shared))
    assert is_base(layer)
    assert trainable(layer.factors) == {"gate": (R,), "B_scale": (N,), "pair.lora_A": (R, K), "pair.lora_B": (N, R)}


def test_lotr_shares_its_sides_and_not_its_core():
    shared = factors.lotr_pair(N, K, R)
    layers = layers_with(factors.lotr, shared)
    assert len({layer.factors.core for layer in layers}) == len(SHAPES)
    for layer in layers:
        A, B = slices(layer)
        assert_computes(layer, B @ layer.factors.core.T @ A, make_x(k=layer.in_features))
    assert_gradients_are_summed(layers, shared)
    assert is_base(fresh(lambda base: factors.lotr(base, shared)))


def test_layers_of_lora_drop_share_one_adapter():
    """One provider in several layers: the shared LoRA trains, by the sum of their gradients."""
    shared = factors.Gated(factors.tied_pair(N, K, R))
    layers = nn.ModuleList(FactoredLinear(linear(), shared, scaling=0.5) for _ in range(3))
    randomised(layers)
    for layer in layers:
        assert_computes(layer, shared.pair.lora_B @ shared.pair.lora_A)
    assert_gradients_are_summed(layers, shared)
    assert sum(p.numel() for p in layers.parameters() if p.requires_grad) == R * (N + K)


def test_vera_is_rebuilt_from_its_seed():
    """Two vectors a layer train and are saved, r + N numbers; the matrices come from the seed."""
    base = linear()
    layer = FactoredLinear(base, factors.vera(base, factors.Pair.seeded(N + 7, K + 9, R, seed=3)))
    assert is_base(layer)
    assert trainable(layer.factors) == {"gate": (R,), "B_scale": (N,)}
    randomised(layer)
    assert set(layer.state_dict()) == {"weight", "bias", "factors.gate", "factors.B_scale"}
    other = FactoredLinear(linear(), factors.vera(base, factors.Pair.seeded(N + 7, K + 9, R, seed=3)))
    other.load_state_dict(layer.state_dict())
    x = make_x()
    assert torch.equal(other(x), layer(x))
    A, B = slices(layer)
    assert_computes(layer, torch.diag(layer.factors.B_scale) @ B @ torch.diag(layer.factors.gate) @ A, x)
    other = FactoredLinear(linear(), factors.vera(base, factors.Pair.seeded(N + 7, K + 9, R, seed=4)))
    other.load_state_dict(layer.state_dict())
    assert not torch.allclose(other(x), layer(x))


def test_widest():
    layers = [nn.Linear(3, 9), nn.Linear(7, 2)]
    assert factors.widest(layers) == (9, 7)
    with pytest.raises(ValueError, match="linears must hold at least one layer"):
        factors.widest([])
