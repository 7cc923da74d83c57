"""Gates that learn on other data than A and B."""

import copy

import pytest
import torch
from low_rank_models import F64, batch, gated, layers, loss_of, train, trainable
from torch import nn

from lora_ops.methods import autolora, autolora_ranks, bilora, hypergradient, low_rank_paths
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


def test_bilora_names_what_does_not_fit():
    with pytest.raises(ValueError, match="gate must be one of"):
        bilora(gated(R), lambda: None, lambda: None, gate="relu")


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
