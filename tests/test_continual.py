"""O-LoRA and Online-LoRA."""

import copy

import pytest
import torch
from low_rank_models import F64, batch, layers, loss_of, plain, train, trainable
from torch import nn

import lora_ops
from lora_ops.methods import HardBuffer, LossDetector, OnlineLoRA, o_lora, output_importance

R = 3


def two_tasks():
    model = plain(R)
    lora_ops.add_adapter(model, lora_ops.LoraConfig(r=R, target_modules=["0", "2", "4"]), "second")
    for layer in layers(model):
        nn.init.normal_(layer.lora_B["second"], std=0.3)
    return model


def test_o_lora_is_zero_for_orthogonal_subspaces():
    """A new adapter orthogonal to the old one has no penalty, and does not answer what the old one reads."""
    model, (x, _) = two_tasks(), batch()
    for layer in layers(model):
        Q = torch.linalg.qr(torch.randn(layer.in_features, 2 * R, dtype=F64))[0].T
        layer.lora_A["default"].data, layer.lora_A["second"].data = Q[:R].clone(), Q[R:].clone()
    method = o_lora(model, new="second", old=["default"], lambda1=0.5)
    assert all("second" in name for name, p in model.named_parameters() if p.requires_grad)
    penalty = method.parts[0].term
    assert penalty().item() < 1e-12
    layer = layers(model)[0]
    read_by_old = x @ layer.lora_A["default"].T @ layer.lora_A["default"]
    assert (read_by_old @ layer.delta_weight("second").T).abs().max() < 1e-12
    nn.init.normal_(layer.lora_A["second"])
    expected = (layer.lora_A["default"] @ layer.lora_A["second"].T).abs().sum().item()
    assert penalty().item() == pytest.approx(expected)


def test_o_lora_is_a_term_of_the_loss():
    model, data = two_tasks(), batch()
    other = copy.deepcopy(model)
    method = o_lora(model, "second", ["default"], lambda1=0.5, lambda2=0.1)
    o_lora(other, "second", ["default"])
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    frozen = [layer.lora_A["default"].detach().clone() for layer in layers(model)]
    before = method.parts[0].term().item()
    train(model, optimizer, data, 1, method)
    pairs = [(layer.lora_A["default"], layer.lora_A["second"]) for layer in layers(other)]
    loss = loss_of(other, data) + 0.5 * sum((a @ b.T).abs().sum() for a, b in pairs)
    loss = loss + 0.1 * sum(torch.linalg.vector_norm(p) for p in trainable(other))
    loss.backward()
    torch.optim.SGD(trainable(other), lr=0.1).step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    train(model, optimizer, data, 20, method, first=2)
    assert method.parts[0].term().item() < before
    assert all(torch.equal(layer.lora_A["default"], A) for layer, A in zip(layers(model), frozen, strict=True))


def test_o_lora_begins_with_no_old_task():
    model, data = plain(R), batch()
    train(model, torch.optim.SGD(trainable(model), lr=0.1), data, 1, o_lora(model, "default", []))
    with pytest.raises(ValueError, match="third"):
        o_lora(model, "third", ["default"])


def test_the_detector_sees_a_plateau_after_a_peak():
    """Falls and settles: once. Rises and settles anew: once more. Not in between, and never while it moves."""
    detector, losses = LossDetector(5, mean=1.0, variance=0.01), []
    falling = [3.0, 2.5, 2.0, 1.5, 1.2, 1.0, 0.9, 0.85, 0.82, 0.81, 0.80, 0.80, 0.80, 0.80, 0.80]
    rising = [2.5, 2.2, 1.8, 1.2, 0.9, 0.85, 0.84, 0.83, 0.82, 0.82, 0.82, 0.82]
    losses = falling + rising
    found = [i for i, loss in enumerate(losses) if detector.observe(loss)]
    assert len(found) == 2
    assert 5 < found[0] < len(falling) <= found[1] - 5
    flat = LossDetector(5, mean=1.0, variance=0.01)
    assert [flat.observe(2.0) for _ in range(10)] == [False] * 10
    assert [flat.observe(0.5) for _ in range(10)].count(True) == 1


def test_the_buffer_keeps_the_hardest():
    buffer = HardBuffer(2)
    samples = [torch.tensor(float(i)) for i in range(5)]
    buffer.update(samples[:3], [0.1, 0.9, 0.5])
    assert [s.item() for s in buffer.samples] == [1.0, 2.0]
    buffer.update(samples[3:], [0.2, 0.6, 0.7, 0.1])
    assert [s.item() for s in buffer.samples] == [3.0, 2.0]
    with pytest.raises(ValueError, match="losses"):
        buffer.update(samples[:1], [0.5])


def test_importance_is_autograds_mean():
    model, (x, _) = plain(R), batch(4)
    parameters = trainable(model)
    for power in (1, 2):
        found = output_importance(lambda s: model(s).square().sum(), parameters, list(x), power)
        expected = [torch.zeros_like(p) for p in parameters]
        for sample in x:
            for e, g in zip(expected, torch.autograd.grad(model(sample).square().sum(), parameters), strict=True):
                e += g.abs() ** power / 4
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_online_lora_starts_anew():
    """ΔW is the sum of products, the output stays, the new LoRA learns, and what mattered holds it back."""
    model, data = plain(R), batch()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    method = OnlineLoRA(model, lambda s: model(s).square().sum(), mean=9.0, variance=9.0, window=2, weight=5.0).attach(
        optimizer
    )
    method.buffer.update(list(data[0][:6]), [loss_of(model, (x[None], y[None])).item() for x, y in zip(*data, strict=True)][:6])
    assert len(method.buffer.samples) == 4
    train(model, optimizer, data, 1, method)
    assert not method.observe(1.0)
    before, W0 = model(data[0]).detach(), layers(model)[0].weight.clone()
    delta, importance = (
        layers(model)[0].delta_weight(),
        output_importance(method.objective, trainable(model), method.buffer.samples),
    )
    assert method.observe(1.0)
    torch.testing.assert_close(model(data[0]), before)
    torch.testing.assert_close(layers(model)[0].weight, W0 + delta)
    for a, b in zip(method.importance, importance, strict=True):
        torch.testing.assert_close(a, b)
    start = [p.detach().clone() for p in trainable(model)]
    train(model, optimizer, data, 1, method, first=2)
    moved = [(p - s).abs().max().item() for p, s in zip(trainable(model), start, strict=True)]
    assert max(moved) > 0  # the official reset would leave it dead
    optimizer.zero_grad()
    loss_of(model, data).backward()
    plain_grads = [p.grad.clone() for p in trainable(model)]
    method.on_backward(3)
    for p, s, g, w in zip(trainable(model), start, plain_grads, importance, strict=True):
        torch.testing.assert_close(p.grad, g + 5.0 * w * (p.detach() - s))
