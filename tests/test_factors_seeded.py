"""Coefficients of random directions that a seed makes anew."""

import pytest
import torch
from factored_layers import (
    K,
    N,
    R,
    assert_close,
    assert_computes,
    factored,
    fresh,
    is_base,
    linear,
    make_x,
    randomised,
    trainable,
)
from torch import nn

from lora_ops import FactoredLinear, factors
from lora_ops.factors import directions


def all_directions(count, shape, seed):
    return torch.cat(list(directions.directions(count, shape, seed, torch.float64)))


@pytest.fixture(params=[1 << 20, 300], ids=["one block", "many blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(directions, "_BLOCK", request.param)


def test_directions_have_the_scale_of_one(blocks):
    found = all_directions(500, (R, K), 3)
    assert found.shape == (500, R, K)
    assert 0.99 * 500**-0.5 < found.abs().max() <= 500**-0.5
    assert abs(found.mean()) < 1e-3
    assert len(found.unique(dim=0)) == 500


def test_nola_is_rebuilt_from_seed_and_coefficients(blocks):
    bases = 40
    layer = factored(lambda base: factors.Nola(base, R, bases=bases, seed=7))
    f = layer.factors
    assert trainable(f) == {"alpha": (bases,), "beta": (bases,)}
    assert set(layer.state_dict()) == {"weight", "bias", "factors.alpha", "factors.beta"}
    A = f.A0 + torch.einsum("k,kij->ij", f.alpha, all_directions(bases, (R, K), 8))
    B = torch.einsum("k,kij->ij", f.beta, all_directions(bases, (N, R), 9))
    assert_computes(layer, B @ A)  # with dalpha_k = <dA, A_k>, dbeta_k = <dB, B_k>
    base = linear()
    other = FactoredLinear(base, factors.Nola(base, R, bases=bases, seed=7), scaling=layer.scaling)
    assert is_base(other)
    other.load_state_dict(layer.state_dict())
    x = make_x()
    assert torch.equal(other(x), layer(x))


def test_nola_keeps_no_bases(monkeypatch):
    """What the backward keeps does not depend on how many there are, nor does what lives in between."""
    monkeypatch.setattr(directions, "_BLOCK", 5000)
    kept = []
    for bases in (64, 512):
        layer, sizes = fresh(lambda base, bases=bases: factors.Nola(base, R, bases=bases), nn.Linear(256, 256)), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            layer(torch.randn(2, 256))
        kept.append(sum(sizes))
    assert kept[0] == kept[1] > 0
    blocks = [block.numel() for block in directions.directions(512, (R, 256), 0)]
    assert max(blocks) <= 5000 and sum(blocks) == 512 * R * 256


@pytest.mark.parametrize("r", [None, R])
def test_intrinsic_dimension_gets_the_projected_gradient(r, blocks):
    """dtheta = Pᵀ dθ, summed over layers; θ the weight, or A and B."""
    d, bases = 30, [linear(), linear(N - 3, K)]
    shared = factors.Theta(d)
    layers = [
        FactoredLinear(base, factors.IntrinsicDimension(base, shared, seed=i, r=r), scaling=1.0) for i, base in enumerate(bases)
    ]
    assert all(is_base(layer) for layer in layers)
    randomised(shared)
    x, total = make_x(), 0
    for i, layer in enumerate(layers):
        n = layer.out_features
        if r is None:
            P = all_directions(d, (n, K), i)
            delta = torch.einsum("k,kij->ij", shared.theta, P)
            assert_computes(layer, delta, x)
            dtheta = torch.einsum("kij,ij->k", P, 2 * layer(x).T @ x)
        else:
            P = all_directions(d, (R * (K + n),), i)
            moved = shared.theta @ P
            A, B = layer.factors.A0 + moved[: R * K].view(R, K), moved[R * K :].view(n, R)
            assert_computes(layer, B @ A, x)
            g = 2 * layer(x).T @ x
            dtheta = P @ torch.cat([(B.T @ g).flatten(), (g @ A.T).flatten()])
        total = total + dtheta.detach()
    sum(layer(x).square().sum() for layer in layers).backward()
    assert_close(shared.theta.grad, total)


def test_as_many_numbers_as_weights_is_full_fine_tuning():
    """d = D: whatever the weight is to become, some theta gives it."""
    base = linear(3, 4)
    layer = FactoredLinear(base, factors.IntrinsicDimension(base, factors.Theta(12), seed=0))
    target = torch.randn(3, 4, dtype=torch.float64)
    P = all_directions(12, (3, 4), 0).flatten(1)
    layer.factors.shared.theta.data.copy_(torch.linalg.solve(P.T, target.flatten()))
    assert_close(layer.delta_weight(), target, 1e-9)
