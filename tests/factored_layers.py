"""Layers with factor providers, in fp64: what the tests of them share."""

import torch
from torch import nn

from lora_ops import FactoredLinear

K, N, M, R = 24, 20, 13, 4


def linear(n=N, k=K, dtype=torch.float64):
    return nn.Linear(k, n, dtype=dtype)


def make_x(*leading, k=K, dtype=torch.float64):
    return torch.randn(*(leading or (M,)), k, dtype=dtype)


def factored(make, base=None, scaling=0.75, **options):
    """A layer whose provider does something: what trains is random."""
    return randomised(fresh(make, base, scaling=scaling, **options))


def fresh(make, base=None, **options):
    """A layer as its method starts."""
    base = base or linear()
    return FactoredLinear(base, make(base), **options)


def randomised(module, std=0.5):
    for p in module.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=std)
    return module


def assert_close(actual, expected, tolerance=1e-11):
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert (actual - expected).abs().max() <= tolerance * max(1.0, expected.abs().max()), (actual - expected).abs().max()


def assert_computes(layer, delta, x=None, out_scale=1.0):
    """y = out_scale ∘ (x (W0 + scaling · delta)ᵀ) + bias, of the layer and of the merged layer, and its gradients, where
    `delta` was made from the layer's own parameters by the method's equation."""
    x = make_x() if x is None else x
    y = x @ (layer.weight + layer.scaling * delta).T * out_scale + layer.bias
    trained = [p for p in layer.parameters() if p.requires_grad]
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad(y, trained, dy, retain_graph=True)
    mine = layer(x)
    assert_close(mine, y)
    for ours, theirs in zip(torch.autograd.grad(mine, trained, dy), wanted, strict=True):
        assert theirs.abs().max() > 0
        assert_close(ours, theirs)
    weight = layer.weight
    layer.merge()
    assert not torch.equal(layer.weight, weight)
    assert_close(layer(x), y.detach())
    layer.unmerge()
    assert layer.weight is weight


def is_base(layer):
    """Whether the layer is W0 alone, bit for bit."""
    layer.merge()
    same = torch.equal(layer.weight, layer.unmerged_weight)
    layer.unmerge()
    return same


def trainable(module):
    return {name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad}
