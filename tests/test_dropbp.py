"""Branches without backward."""

import pytest
import torch
from torch import nn

import lora_ops
from lora_ops.methods import DropBP, drop_backward

WIDTH = 16


class Residual(nn.Module):
    def __init__(self, branches: int = 3) -> None:
        super().__init__()
        self.branches = nn.ModuleList([lora_ops.FusedLoraLinear(WIDTH, WIDTH, 4) for _ in range(branches)])
        for branch in self.branches:
            nn.init.normal_(branch.lora_B["default"], std=0.3)

    def forward(self, x):
        for branch in self.branches:
            x = x + branch(x).tanh()
        return x


def grads(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    model(x).square().mean().backward()
    return x.grad, [None if p.grad is None else p.grad.clone() for p in model.parameters() if p.requires_grad]


def test_dropped_branches_have_no_backward():
    """The output is the same, bit for bit; the gradient passes around the branch; nothing is saved for it."""
    model, x = Residual(1), torch.randn(8, WIDTH)
    y = model(x)
    method = DropBP(model.branches, 1.0)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropped = model(x)
    assert torch.equal(dropped, y)
    assert not saved
    dx, of_parameters = grads(model, x)
    torch.testing.assert_close(dx, 2 * y / y.numel())
    assert of_parameters == [None, None]
    model.eval()
    assert grads(model, x)[1] != [None, None]
    model.train()
    method.remove()
    assert grads(model, x)[1] != [None, None]


def test_drop_backward_in_a_model_of_ones_own():
    layer, x = lora_ops.FusedLoraLinear(WIDTH, WIDTH, 4), torch.randn(8, WIDTH, requires_grad=True)
    y = drop_backward(x, layer(x), 1.0)
    torch.testing.assert_close(y, x + layer(x))
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert layer.lora_B["default"].grad is None
    drop_backward(x, layer(x), 1.0, training=False).sum().backward()
    assert layer.lora_B["default"].grad is not None
    with pytest.raises(ValueError, match="p must be"):
        drop_backward(x, x, 1.5)


def test_rates_are_what_is_dropped():
    model, x = Residual(2), torch.randn(4, WIDTH, requires_grad=True)
    DropBP(model.branches, [0.25, 0.75], generator=torch.Generator().manual_seed(0))
    dropped = [0, 0]
    for _ in range(400):
        model.zero_grad()
        model(x).sum().backward()
        for i, branch in enumerate(model.branches):
            dropped[i] += branch.lora_B["default"].grad is None
    assert [n / 400 for n in dropped] == pytest.approx([0.25, 0.75], abs=0.06)


def test_an_error_in_a_branch_leaves_gradients_on():
    model = Residual(1)
    DropBP(model.branches, 1.0)
    with pytest.raises(ValueError):
        model(torch.randn(2, WIDTH + 1))
    assert torch.is_grad_enabled()


def test_sensitivity_is_what_a_dropped_branch_changes():
    model, x = Residual(), torch.randn(8, WIDTH)
    method = DropBP(model.branches, 0.0)
    _, whole = grads(model, x)
    found = method.sensitivity(lambda: grads(model, x)[1])
    for i, branch in enumerate(model.branches):
        method.rates = [float(branch is other) for other in model.branches]
        _, without = grads(model, x)
        expected = sum(
            (a - (torch.zeros_like(a) if b is None else b)).square().sum() for a, b in zip(whole, without, strict=True)
        )
        assert found[i] == pytest.approx(expected.item())
    assert min(found) > 0


def test_rates_go_where_little_is_lost():
    method = DropBP(Residual().branches)
    assert method.allocate([1.0, 1.0, 1.0], 0.5) == [0.5, 0.5, 0.5]
    assert method.allocate([1e-9, 1.0, 1.0], 0.3) == [0.9, 0.0, 0.0]
    rates = method.allocate([1.0, 2.0, 4.0], 0.5)
    assert sum(rates) == pytest.approx(1.5)
    assert rates == sorted(rates, reverse=True)
    rates = method.allocate([1.0, 2.0, 4.0], 0.5, cost=[1.0, 1.0, 8.0])
    assert sum(c * p for c, p in zip((1, 1, 8), rates, strict=True)) >= 5
    assert method.allocate([1.0, 2.0, 3.0], 0.9) == [0.9] * 3
    with pytest.raises(ValueError, match="target"):
        method.allocate([1.0, 1.0, 1.0], 0.95)
    with pytest.raises(ValueError, match="rate must be"):
        DropBP(Residual().branches, [0.5])
