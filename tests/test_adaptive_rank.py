"""AdaLoRA beside PEFT's, dynamic DoRA and SoRA: gates that become zero, and what that costs."""

import copy
from types import SimpleNamespace

import peft
import pytest
import torch
from low_rank_models import F64, batch, gated, layers, loss_of, mlp, train, trainable
from torch import nn

from lora_ops.methods import (
    Allocator,
    CubicSchedule,
    Importance,
    SoRA,
    adalora,
    component_norms,
    drop_zero_ranks,
    dynamic_dora,
    low_rank_paths,
    mean_magnitude,
    top_k,
)

R, TARGET, STEPS = 6, 3, 20


class WithLoss(nn.Module):
    """PEFT regularises what has a loss."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, data) -> SimpleNamespace:
        return SimpleNamespace(loss=loss_of(self.net, data))


def zeroed(model, std=0.02):
    for path in low_rank_paths(model, gated=True):
        nn.init.zeros_(path.gate)
        nn.init.normal_(path.lora_A, std=std)
        nn.init.normal_(path.lora_B, std=std)
    return model


def ranks(model) -> list[int]:
    return [int((path.gate != 0).sum()) for path in low_rank_paths(model, gated=True)]


def adalora_pair(**options):
    scaling = 8 / (R + 1e-5)
    ours, data = zeroed(gated(R, scaling=scaling), std=0.3), batch()
    base = mlp()
    for i in (0, 2, 4):
        base[i].load_state_dict({"weight": ours[i].weight, "bias": ours[i].bias})
    config = peft.AdaLoraConfig(
        init_r=R, lora_alpha=8, target_modules=["net.0", "net.2", "net.4"], beta1=0.85, beta2=0.85, **options
    )
    theirs = peft.get_peft_model(WithLoss(base), config, autocast_adapter_dtype=False)
    for i, layer in zip((0, 2, 4), layers(ours), strict=True):
        target = theirs.base_model.model.net[i]
        target.lora_A["default"].data.copy_(layer.factors.pair.lora_A)
        target.lora_B["default"].data.copy_(layer.factors.pair.lora_B)
        target.lora_E["default"].data.zero_()
    return ours, theirs, data


def test_adalora_is_pefts():
    """The same gates are zero after every step, and all parameters stay the same."""
    ours, theirs, data = adalora_pair(target_r=TARGET, tinit=4, tfinal=5, deltaT=3, total_step=STEPS, orth_reg_weight=0.5)
    method = adalora(ours, TARGET, STEPS, initial=4, final=5, every=3)
    mine = torch.optim.AdamW(trainable(ours), lr=1e-2, weight_decay=0.0)
    factors = [p for name, p in theirs.named_parameters() if "lora_" in name]  # PEFT has the divisor of alpha train, too
    reference = torch.optim.AdamW(factors, lr=1e-2, weight_decay=0.0)
    seen = []
    for step in range(1, STEPS + 1):
        train(ours, mine, data, 1, method, first=step)
        reference.zero_grad()
        theirs.base_model(data).loss.backward()  # PeftModel itself leaves the regulariser out
        reference.step()
        theirs.base_model.update_and_allocate(step)
        for layer, i in zip(layers(ours), (0, 2, 4), strict=True):
            target = theirs.base_model.model.net[i]
            assert torch.equal(layer.factors.gate == 0, target.lora_E["default"][:, 0] == 0), step
            for a, b in (
                (layer.factors.gate, "lora_E"),
                (layer.factors.pair.lora_A, "lora_A"),
                (layer.factors.pair.lora_B, "lora_B"),
            ):
                torch.testing.assert_close(a, getattr(target, b)["default"].view_as(a), rtol=1e-9, atol=1e-12)
        seen.append(sum(ranks(ours)))
    budget = method.parts[1].schedule
    assert [int(budget(s)) for s in (6, 9, 12, 15)] == [seen[s - 1] for s in (6, 9, 12, 15)]
    assert seen[:5] == [3 * R] * 5
    assert seen[14:] == [3 * TARGET] * 6
    assert len(set(seen)) > 3


def test_adalora_where_peft_fails():
    """PEFT asks for the 0th smallest score."""
    ours, theirs, data = adalora_pair(target_r=R, tinit=1, tfinal=1, deltaT=1, total_step=4)
    method, optimizer = adalora(ours, R, 4, initial=1, final=1), torch.optim.SGD(trainable(ours), lr=0.1)
    train(ours, optimizer, data, 4, method)
    assert ranks(ours) == [R, R, R]
    theirs(data).loss.backward()
    with pytest.raises(RuntimeError, match="out of range"):
        theirs.base_model.update_and_allocate(2)


def test_zero_gates_are_the_frozen_layer():
    model, (x, _) = zeroed(gated(R)), batch()
    base = mlp()
    for i in (0, 2, 4):
        base[i].load_state_dict({"weight": model[i].weight, "bias": model[i].bias})
    torch.testing.assert_close(model(x), base(x))


@pytest.mark.parametrize("target", [0, R + 1])
def test_adalora_names_what_does_not_fit(target):
    with pytest.raises(ValueError, match="target_r"):
        adalora(gated(R), target, STEPS)


def test_methods_of_gates_need_gates():
    with pytest.raises(ValueError, match="gate"):
        adalora(mlp(), TARGET, STEPS)


def test_dropping_zero_ranks_changes_nothing():
    model, data = gated(R), batch()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    train(model, optimizer, data, 2)
    keep = [torch.tensor([0, 3, 5]), torch.tensor([1]), torch.tensor([], dtype=torch.long)]
    with torch.no_grad():
        for path, kept in zip(low_rank_paths(model), keep, strict=True):
            path.gate.copy_(torch.zeros(R, dtype=F64).index_fill(0, kept, 1.0) * path.gate)
    before, moments = model(data[0]), optimizer.state[model[0].factors.pair.lora_B]["exp_avg"].clone()
    assert drop_zero_ranks(model, optimizer) == {"0": 3, "2": 1, "4": 1}
    torch.testing.assert_close(model(data[0]), before)
    assert torch.equal(optimizer.state[model[0].factors.pair.lora_B]["exp_avg"], moments[:, keep[0]])
    train(model, optimizer, data, 2)  # the optimiser goes on with the same parameters


def test_dynamic_dora_scores_components():
    """Shares of ΔW from Gram matrices are the norms of components that are formed."""
    model = gated(R)
    for path in low_rank_paths(model):
        nn.init.normal_(path.gate)
    for path, found in zip(low_rank_paths(model), component_norms(low_rank_paths(model)), strict=True):
        B, A = path.lora_B * path.gate, path.lora_A
        formed = torch.stack([torch.linalg.matrix_norm(torch.outer(B[:, k], A[k])) for k in range(R)])
        torch.testing.assert_close(found, formed / torch.linalg.matrix_norm(B @ A))


def test_dynamic_dora_prunes_late_and_for_good():
    model, data, steps = zeroed(gated(R), std=0.3), batch(), 60
    method = dynamic_dora(model, TARGET, steps, every=3)
    optimizer, seen = torch.optim.AdamW(trainable(model), lr=1e-2), []
    for step in range(1, steps + 1):
        train(model, optimizer, data, 1, method, first=step)
        seen.append(sum(ranks(model)))
    assert seen[8] == 3 * R  # 0.15 · 60
    assert seen[29:] == [3 * TARGET] * 31  # 0.5 · 60
    assert seen[17] > (seen[8] + seen[29]) / 2  # t³: little at first


def test_dynamic_dora_penalises_variance():
    model, data = gated(R), batch()
    loss_of(model, data).backward()
    path = low_rank_paths(model)[0]
    before = path.lora_A.grad.clone()
    dynamic_dora(model, TARGET, 60, variance_weight=0.1).on_backward(1)
    A = path.lora_A
    n, count = A.shape[1], 3 * 2 * R
    expected = 0.1 / count * 2 * (A - A.mean(1, keepdim=True)) / (n - 1)
    torch.testing.assert_close(A.grad - before, expected.detach())


def test_schedules():
    early, late = CubicSchedule(18, 9, 4, 16, 3), CubicSchedule(18, 9, 4, 16, 3, late=True)
    assert [early(s) for s in (0, 4, 16, 99)] == [late(s) for s in (0, 4, 16, 99)] == [18, 18, 9, 9]
    assert early(10) == 9 + 9 / 8
    assert late(10) == 18 - 9 / 8
    assert [s for s in range(20) if early.due(s)] == [6, 9, 12, 15, 16]
    for options, argument in (({"first": 5, "last": 5}, "first"), ({"first": 0, "last": 5, "every": 0}, "every")):
        with pytest.raises(ValueError, match=argument):
            CubicSchedule(1, 0, **options)


def test_exactly_k_stay_where_scores_tie():
    masks = top_k([torch.ones(3), torch.tensor([1.0, 0.0, 2.0])], 3)
    assert sum(int(m.sum()) for m in masks) == 3
    assert masks[1].tolist()[1:] == [False, True]
    with pytest.raises(ValueError, match="k must be"):
        top_k([torch.ones(3)], 4)


def test_importance_smooths():
    scores = iter([torch.tensor([1.0]), torch.tensor([3.0])])
    importance = Importance(lambda: [next(scores)], 0.5, 0.25)
    with pytest.raises(RuntimeError, match="updated"):
        importance.value()
    importance.update()  # mean 0.5, uncertainty 0.75 · 0.5
    importance.update()  # mean 1.75, uncertainty 0.25 · 0.375 + 0.75 · 1.25
    assert importance.value()[0].item() == 1.75 * (0.25 * 0.375 + 0.75 * 1.25)
    with pytest.raises(ValueError, match="beta2"):
        Importance(list, 0.5, 1.0)


def test_pruned_gates_come_back_until_the_last_step():
    model, data = gated(R), batch()
    paths = low_rank_paths(model)
    scored = []
    importance = Importance(lambda: scored.append(step) or component_norms(paths), 0.9)
    method = Allocator(paths, importance, CubicSchedule(3 * R, R, 0, 6, 4))
    optimizer, seen = torch.optim.SGD(trainable(model), lr=0.1), []
    for step in range(1, 9):
        train(model, optimizer, data, 1, method, first=step)
        seen.append(sum(ranks(model)))
    assert seen[:3] == [3 * R] * 3
    assert seen[3] < seen[4] == 3 * R
    assert seen[5:] == [R] * 3
    assert scored == [1, 2, 3, 4, 5]  # as PEFT, not at the last step


def test_sora_takes_the_proximal_step():
    """SGD, then soft thresholding, by ξ or by learning rate times λ, and the gradient of λ times the mean of |g|."""
    model, data, xi, lam, lr = gated(R), batch(), 0.4, 0.1, 0.5
    for path in low_rank_paths(model):
        nn.init.normal_(path.gate)
    for times_lr in (False, True):
        ours = copy.deepcopy(model)
        method = SoRA(ours, sparse_lambda=lam, threshold=xi, times_lr=times_lr)
        expected = copy.deepcopy(model)
        gates = [path.gate for path in low_rank_paths(expected)]
        loss = loss_of(expected, data) + lam * mean_magnitude(gates)
        grads = torch.autograd.grad(loss, gates)
        optimizer = torch.optim.SGD(trainable(ours), lr=lr)
        train(ours, optimizer, data, 1, method.attach(optimizer))
        for path, gate, grad in zip(low_rank_paths(ours), gates, grads, strict=True):
            moved, t = gate.detach() - lr * grad, xi * (lr if times_lr else 1)
            torch.testing.assert_close(path.gate.detach(), moved.sign() * (moved.abs() - t).clamp(min=0))
    assert 0 < sum(ranks(ours)) < 3 * R


def test_sora_prunes_without_loss():
    model, data = gated(R), batch()
    for path in low_rank_paths(model):
        nn.init.normal_(path.gate)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    train(model, optimizer, data, 20, SoRA(model, threshold=0.02))
    before, left = model(data[0]), ranks(model)
    assert 0 < sum(left) < 3 * R
    assert list(drop_zero_ranks(model).values()) == [max(n, 1) for n in left]
    torch.testing.assert_close(model(data[0]), before)


def test_sora_by_the_learning_rate_needs_the_optimiser():
    with pytest.raises(RuntimeError, match="attach"):
        SoRA(gated(R), times_lr=True).on_step(1)
