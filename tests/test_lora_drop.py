"""Layers whose LoRA does little share one."""

import pytest
import torch
from low_rank_models import batch, gated, layers, loss_of, mlp, plain, train, trainable
from torch import nn

import lora_ops
from lora_ops.methods import lora_drop, output_energy

R = 4


def test_energy_is_that_of_lora_s_outputs():
    model, (x, _) = plain(R, lora_alpha=12), batch()
    layers(model)[1].set_scaling("default", 4)
    energy = output_energy(model, lambda: [model(x[:20]), model(x[20:])])
    expected, h = [], x
    for layer, act in zip(layers(model), (model[1], model[3], nn.Identity()), strict=True):
        expected.append((h @ layer.delta_weight().T).square().sum().item())
        h = act(layer(h))
    assert list(energy.values()) == pytest.approx([e / sum(expected) for e in expected])
    assert all(not layer._forward_pre_hooks for layer in layers(model))


def square(shares):
    """Layers of one shape, with these shares of the energy, all fed the same."""
    model = nn.ModuleList([nn.Linear(8, 8, dtype=torch.float64) for _ in shares])
    lora_ops.add_lora(model, lora_ops.LoraConfig(r=2, target_modules=[str(i) for i in range(len(shares))]))
    A, B, x = torch.randn(2, 8), torch.randn(8, 2), torch.randn(16, 8, dtype=torch.float64)
    for share, layer in zip(shares, model, strict=True):
        layer.lora_A["default"].data.copy_(A)
        layer.lora_B["default"].data.copy_(B * share**0.5)
    return model, lambda: [layer(x) for layer in model]


@pytest.mark.parametrize(
    ("threshold", "kept"),
    [(0.9, ["2", "0", "4", "1"]), (0.84, ["2", "0", "4"]), (0.3, ["2"]), (1.0, ["2", "0", "4", "1", "3"])],
)
def test_shares_what_does_little(threshold, kept):
    """The smallest set of the most important layers that reaches the threshold keeps its own; the others share one."""
    model, run = square([0.25, 0.1, 0.4, 0.05, 0.2])
    assert lora_drop(model, run, threshold) == kept
    own = [model[int(i)].lora_A["default"] for i in kept]
    rest = [layer.lora_A["default"] for i, layer in enumerate(model) if str(i) not in kept]
    assert len({id(p) for p in own}) == len(kept)
    assert len({id(p) for p in rest}) == min(len(rest), 1)
    assert not {id(p) for p in own} & {id(p) for p in rest}
    assert len(trainable(model)) == 2 * (len(kept) + min(len(rest), 1))
    assert not any(layer.lora_B["default"].any() for layer in model)  # begun anew


def test_shared_parameters_get_the_sum_of_gradients():
    model, run = square([0.5, 0.3, 0.1, 0.1])
    lora_drop(model, run, 0.6)
    x = torch.randn(16, 8, dtype=torch.float64)
    B = model[2].lora_B["default"]
    grads = [torch.autograd.grad(model[i](x).square().mean(), B)[0] for i in (2, 3)]
    sum(layer(x).square().mean() for layer in model).backward()
    torch.testing.assert_close(B.grad, sum(grads))
    assert model[3].lora_B["default"] is B


def test_other_shapes_do_not_share():
    model, data = plain(R), batch()
    lora_drop(model, lambda: model(data[0]), 0.01)
    assert len(trainable(model)) == 6  # (16, 12), (16, 16) and (6, 16)
    train(model, torch.optim.SGD(trainable(model), lr=0.1), data, 2)
    assert loss_of(model, data).isfinite()


def test_lora_drop_names_what_does_not_fit():
    model, (x, _) = plain(R, trained=False), batch()
    with pytest.raises(RuntimeError, match="zero"):
        lora_drop(model, lambda: model(x))
    with pytest.raises(ValueError, match="threshold"):
        lora_drop(plain(R), lambda: None, 0.0)
    with pytest.raises(ValueError, match="one active adapter"):
        lora_drop(gated(R), lambda: None)
    with pytest.raises(ValueError, match="LoRA"):
        lora_drop(mlp(), lambda: None)
