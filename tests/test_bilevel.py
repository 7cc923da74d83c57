"""Gates that learn on other data than A and B."""

import copy
import math

import pytest
import torch
from low_rank_models import F64, batch, gated, layers, loss_of, train, trainable
from torch import nn

from lora_ops.methods import autolora, autolora_ranks, bilora, binary_entropy, hypergradient, low_rank_paths
from lora_ops.methods.learned_gates import GATES

R, XI = 4, 0.3


def one_layer():
    """A layer whose loss, in plain PyTorch, autograd can differentiate twice."""
    model = nn.Sequential(gated(R)[0])
    with torch.no_grad():
        model[0].factors.gate.copy_(torch.randn(R, dtype=F64))
    data = [(batch()[0], torch.randn(32, 16, dtype=F64)) for _ in range(2)]
    return model, data


def eager(model, data, A, B, gate):
    x, y = data
    layer = model[0]
    return (nn.functional.linear(x, layer.weight, layer.bias) + ((x @ A.T) * gate) @ B.T - y).square().mean()


def test_hypergradient_is_the_exact_one():
    model, (train_data, validation_data) = one_layer()
    path = low_rank_paths(model)[0]
    A, B, gate = (t.detach().clone().requires_grad_() for t in (path.lora_A, path.lora_B, path.gate))
    steps = torch.autograd.grad(eager(model, train_data, A, B, gate), (A, B), create_graph=True)
    loss = eager(model, validation_data, A - XI * steps[0], B - XI * steps[1], gate)
    (exact,) = torch.autograd.grad(loss, gate)
    losses = (lambda: loss_of(model, train_data)), (lambda: loss_of(model, validation_data))
    (found,) = hypergradient([path.gate], [path.lora_A, path.lora_B], *losses, XI, eps=1e-4)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-9)
    (first_order,) = hypergradient([path.gate], [path.lora_A, path.lora_B], *losses, 0.0)
    assert (first_order - exact).abs().max() > 1e-2  # what the unrolled step is worth
    assert torch.equal(path.lora_A, A)
    assert torch.equal(path.lora_B, B)


def test_without_unrolling_it_is_alternating_descent():
    model, (train_data, validation_data) = one_layer()
    other = copy.deepcopy(model)
    method = bilora(
        model, lambda: loss_of(model, train_data), lambda: loss_of(model, validation_data), orthogonality_weight=0.0
    )
    train(model, torch.optim.SGD(trainable(model), lr=0.1), train_data, 5, method)
    path = low_rank_paths(other)[0]
    for _ in range(5):
        inner = torch.autograd.grad(loss_of(other, train_data), (path.lora_A, path.lora_B))
        (outer,) = torch.autograd.grad(loss_of(other, validation_data), path.gate)
        with torch.no_grad():
            for p, g in zip((path.lora_A, path.lora_B, path.gate), (*inner, outer), strict=True):
                p.sub_(0.1 * g)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("gate", list(GATES))
def test_bilora_trains_with_any_gate(gate):
    model, data, validation = gated(R), batch(), batch()
    losses = (lambda: loss_of(model, data)), (lambda: loss_of(model, validation))
    method = bilora(model, *losses, gate=gate, unroll_lr=0.05)
    optimizer = torch.optim.AdamW(trainable(model), lr=2e-2)
    first = loss_of(model, data).item()
    before = layers(model)[0].factors.gate.detach().clone()
    train(model, optimizer, data, 15, method)
    gates = layers(model)[0].factors.gate
    assert loss_of(model, data).item() < first
    assert (gates - before).abs().min() > 0
    if gate == "sigmoid":
        assert ((gates > 0) & (gates < 1)).all()


@pytest.mark.parametrize("unroll_lr", [0.0, XI])
def test_entropy_is_a_term_of_the_outer_loss(unroll_lr):
    """Its gradient comes on top of the gates', and A and B do not see it."""
    model, (train_data, validation_data) = one_layer()
    other, found = copy.deepcopy(model), []
    for m, weight in ((model, 0.5), (other, 0.0)):
        losses = (lambda m=m: loss_of(m, train_data)), (lambda m=m: loss_of(m, validation_data))
        method = bilora(m, *losses, gate="sigmoid", unroll_lr=unroll_lr, entropy_weight=weight)
        loss_of(m, train_data).backward()
        method.on_backward(1)
        path = low_rank_paths(m)[0]
        found.append([m[0].factors.parametrizations.gate.original.grad, path.lora_A.grad, path.lora_B.grad])
    z = model[0].factors.parametrizations.gate.original.detach()
    g = z.sigmoid()
    of_entropy = -0.5 * z * g * (1 - g) / R  # dH/dg = log((1 - g) / g) = -z
    torch.testing.assert_close(found[0][0] - found[1][0], of_entropy)
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][2], found[1][2])


def test_entropy_makes_gates_binary():
    model, data, validation = gated(R), batch(), batch()
    losses = (lambda: loss_of(model, data)), (lambda: loss_of(model, validation))
    method = bilora(model, *losses, gate="sigmoid", entropy_weight=50.0)
    for layer in layers(model):
        nn.init.normal_(layer.factors.parametrizations.gate.original)
    optimizer = torch.optim.Adam(trainable(model), lr=0.2)
    train(model, optimizer, data, 60, method)
    gates = torch.cat([layer.factors.gate for layer in layers(model)])
    assert torch.minimum(gates, 1 - gates).max() < 0.01
    assert 0 < int((gates > 0.5).sum()) < 3 * R
    assert binary_entropy([torch.tensor([0.0, 1.0])]) == 0
    assert binary_entropy([torch.tensor([0.5])]).item() == pytest.approx(math.log(2))


def test_bilora_names_what_does_not_fit():
    with pytest.raises(ValueError, match="gate must be one of"):
        bilora(gated(R), lambda: None, lambda: None, gate="relu")
    with pytest.raises(ValueError, match="entropy_weight must be 0"):
        bilora(gated(R), lambda: None, lambda: None, entropy_weight=1.0)


def test_autolora_finds_ranks():
    model, data, validation = gated(R), batch(), batch()
    method = autolora(model, lambda: loss_of(model, data), lambda: loss_of(model, validation), unroll_lr=0.05)
    for layer in layers(model):
        torch.testing.assert_close(layer.factors.gate, torch.full((R,), 1 / R, dtype=F64))
    train(model, torch.optim.AdamW(trainable(model), lr=2e-2), data, 10, method)
    ranks = autolora_ranks(model)
    for name, layer in zip(("0", "2", "4"), layers(model), strict=True):
        gate = layer.factors.gate
        assert gate.sum().item() == pytest.approx(1.0)
        assert ranks[name] == int((gate >= 1 / R).sum()) >= 1
    assert min(ranks.values()) < R
