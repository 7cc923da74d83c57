"""Methods whose A and B are the layer's own, by their equations."""

import pytest
import torch
from factored_layers import K, N, R, assert_close, assert_computes, factored, fresh, is_base, linear, make_x, trainable

from lora_ops import FactoredLinear, factors


@pytest.mark.parametrize("zero_B", [True, False])
def test_a_gate_lies_between_a_and_b(zero_B):
    layer = factored(lambda base: factors.gated(base, R, gate=0.5, zero_B=zero_B))
    assert trainable(layer.factors) == {"gate": (R,), "pair.lora_A": (R, K), "pair.lora_B": (N, R)}
    pair = layer.factors.pair
    assert_computes(layer, pair.lora_B @ torch.diag(layer.factors.gate) @ pair.lora_A)


def test_gates_that_are_zero_can_go_with_their_ranks():
    """AdaLoRA, SoRA, ALoRA: pruning is lossless."""
    layer = factored(lambda base: factors.gated(base, R))
    f, x = layer.factors, make_x()
    f.gate.data[1:3] = 0
    kept = f.gate != 0
    pair = factors.Pair(f.pair.lora_A.data[kept], f.pair.lora_B.data[:, kept])
    base = linear()
    base.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    smaller = FactoredLinear(base, factors.Gated(pair, gate=f.gate.data[kept]), scaling=layer.scaling)
    assert_close(smaller(x), layer(x))


def test_a_mask_is_a_truncation():
    """DyLoRA at rank b: the first b ranks, times r / b."""
    b, layer = 3, factored(lambda base: factors.gated(base, R))
    f = layer.factors
    f.gate.data = (torch.arange(R) < b).double() * (R / b)
    f.gate.requires_grad_(False)
    root = (R / b) ** 0.5
    x = make_x()
    delta = (f.pair.lora_B[:, :b] * root) @ (f.pair.lora_A[:b] * root)
    y = layer(x)
    assert_close(y, x @ (layer.weight + layer.scaling * delta).T + layer.bias)
    dA, dB = torch.autograd.grad(y.sum(), [f.pair.lora_A, f.pair.lora_B])
    assert (dA[b:] == 0).all() and (dB[:, b:] == 0).all() and (dA[:b] != 0).any()


@pytest.mark.parametrize(("make", "name"), [(factors.trilora, "gate"), (factors.flora, "core")])
def test_starts_at_the_base(make, name):
    layer = fresh(lambda base: make(base, R))
    assert is_base(layer)
    pair, middle = layer.factors.pair, getattr(layer.factors, name)
    layer(make_x()).square().sum().backward()
    assert (pair.lora_A.grad == 0).all() and (pair.lora_B.grad == 0).all() and (middle.grad != 0).all()


def test_a_zero_gate_is_the_base_and_trains_alone():
    test_starts_at_the_base(factors.trilora, "gate")
    layer = factored(lambda base: factors.trilora(base, R))
    pair = layer.factors.pair
    assert_computes(layer, (pair.lora_B * layer.factors.gate) @ pair.lora_A)


def test_a_zero_core_is_the_base_and_trains_alone():
    test_starts_at_the_base(factors.flora, "core")
    layer = factored(lambda base: factors.flora(base, R))
    pair, core = layer.factors.pair, layer.factors.core
    assert core.shape == (R, R)
    assert_computes(layer, pair.lora_B @ core.T @ pair.lora_A)


@pytest.mark.parametrize("core", [False, True])
def test_asymmetric_lora_projects_the_gradient(core):
    """A has orthonormal rows and stays; one SGD step from zero is the full gradient step, projected."""
    layer = fresh(lambda base: factors.asymmetric(base, R, core=core))
    assert is_base(layer)
    pair = layer.factors.pair
    A, B = pair.lora_A, pair.lora_B.detach().clone()
    assert_close(A.detach() @ A.detach().T, torch.eye(R, dtype=torch.float64), 1e-6)  # made in fp32
    name, trained = ("core", layer.factors.core) if core else ("pair.lora_B", pair.lora_B)
    assert list(trainable(layer.factors)) == [name]
    x, dy = make_x(), torch.randn(13, N, dtype=torch.float64)
    layer(x).backward(dy)
    with torch.no_grad():
        trained -= 0.1 * trained.grad
    gradient = dy.T @ x
    projected = gradient @ A.T @ A
    assert_close(layer.delta_weight(), -0.1 * (B @ B.T @ projected if core else projected).detach())


def test_aflora_starts_at_the_base_and_folds():
    """d and b of the method: one is the gate, the other multiplies B's rows, not the output."""
    layer = fresh(lambda base: factors.aflora(base, R))
    assert is_base(layer)
    assert_close(layer.factors.gate.detach(), torch.full((R,), 0.1, dtype=torch.float64), 1e-7)
    layer = factored(lambda base: factors.aflora(base, R))
    f, x = layer.factors, make_x()
    d, b = f.gate, f.B_scale
    y = x @ layer.weight.T + layer.scaling * ((((x @ f.pair.lora_A.T) * d) @ f.pair.lora_B.T) * b) + layer.bias
    assert_close(layer(x), y)
    assert_computes(layer, torch.diag(b) @ f.pair.lora_B @ torch.diag(d) @ f.pair.lora_A)


def test_an_output_scale_multiplies_all_but_the_bias():
    layer = factored(lambda base: factors.ia3(base))
    assert trainable(layer.factors) == {"out_scale": (N,)}
    assert_computes(layer, torch.zeros(N, K, dtype=torch.float64), out_scale=layer.factors.out_scale)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: factors.gated(linear(), 0), "r must be an integer >= 1, got 0"),
        (lambda: factors.asymmetric(linear(), N + 1), f"r must be at most min\\(N, K\\) = {N}, got {N + 1}"),
        (
            lambda: factors.Gated(factors.tied_pair(N, K, R), gate=torch.ones(R + 1)),
            "gate must have shape \\(4,\\), got \\(5,\\)",
        ),
        (lambda: factors.Gated(factors.tied_pair(N, K, R), N + 1, K), "pair must be of at least"),
        (lambda: factors.Pair(torch.ones(3, K), torch.ones(N, 2)), "lora_A must be \\(r, K\\) and lora_B \\(N, r\\)"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
