"""DyLoRA and ALoRA, and ranks that come and go."""

import copy

import pytest
import torch
from low_rank_models import F64, batch, gated, layers, loss_of, plain, train, trainable
from torch import nn

from lora_ops.methods import ALoRA, DyLoRA, low_rank_paths, resize_rank

R = 6


def test_dylora_truncates():
    """The first b ranks of both factors, each times √(r / b)."""
    model, (x, _) = gated(R, scaling=0.7), batch()
    method = DyLoRA(model)
    layer = layers(model)[0]
    A, B = layer.factors.pair.lora_A, layer.factors.pair.lora_B
    for b in range(1, R + 1):
        method.set_rank(b)
        factor = (R / b) ** 0.5
        expected = nn.functional.linear(x, layer.weight, layer.bias) + 0.7 * x @ (A[:b] * factor).T @ (B[:, :b] * factor).T
        torch.testing.assert_close(layer(x), expected)
    with pytest.raises(ValueError, match="between 1 and 6"):
        method.set_rank(R + 1)


def test_dylora_draws_every_rank():
    model, data = gated(R), batch(4)
    method = DyLoRA(model, generator=torch.Generator().manual_seed(0))
    optimizer, seen = torch.optim.SGD(trainable(model), lr=0.01), []
    for step in range(1, 80):
        seen.append(method.rank)
        assert [int((layer.factors.gate != 0).sum()) for layer in layers(model)] == [method.rank] * 3
        train(model, optimizer, data, 1, method, first=step)
    assert set(seen) == set(range(1, R + 1))


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_dylora_moves_one_row_and_column(frozen):
    model, data = gated(R), batch()
    method = DyLoRA(model, frozen=frozen)
    method.set_rank(3)
    before = [(path.lora_A.detach().clone(), path.lora_B.detach().clone()) for path in low_rank_paths(model)]
    train(model, torch.optim.SGD(trainable(model), lr=0.1), data, 1, method)
    for path, (A, B) in zip(low_rank_paths(model), before, strict=True):
        rows = (path.lora_A != A).any(1)
        columns = (path.lora_B != B).any(0)
        expected = [k == 2 if frozen else k < 3 for k in range(R)]
        assert rows.tolist() == columns.tolist() == expected


def test_new_ranks_change_nothing_and_train():
    model, data = gated(R), batch()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    train(model, optimizer, data, 2)
    before = model(data[0])
    path = low_rank_paths(model)[1]
    exp_avg = optimizer.state[path.lora_A]["exp_avg"].clone()
    resize_rank(path, torch.ones(R, dtype=torch.bool), 2, optimizer)
    assert path.lora_A.shape == (R + 2, 16)
    torch.testing.assert_close(model(data[0]), before)
    moments = optimizer.state[path.lora_A]["exp_avg"]
    assert torch.equal(moments[:R], exp_avg)
    assert not moments[R:].any()
    train(model, optimizer, data, 2)
    assert path.lora_B[:, R:].all()
    with pytest.raises(ValueError, match="rank"):
        resize_rank(path, torch.zeros(R + 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="gate"):
        resize_rank(low_rank_paths(plain())[0], torch.ones(4, dtype=torch.bool))


def test_alora_scores_by_ablation():
    model, data = gated(3), batch()
    method = ALoRA(model, score=lambda: -loss_of(model, data).item(), every=2)
    gates = [path.gate.detach().clone() for path in low_rank_paths(model)]
    found = method.importance()
    for i, path in enumerate(low_rank_paths(model)):
        assert torch.equal(path.gate, gates[i])
        for k in range(3):
            scores = []
            for without in (True, False):
                other = copy.deepcopy(model)
                for j, p in enumerate(low_rank_paths(other)):
                    chosen = torch.tensor([(i, k) == (j, m) for m in range(3)])
                    p.gate.data.masked_fill_(chosen if without else ~chosen, 0.0)
                scores.append(-loss_of(other, data).item())
            whole = -loss_of(model, data).item()
            assert found[i][k].item() == pytest.approx(whole - scores[0] + scores[1], abs=1e-12)


def test_alora_moves_ranks():
    """The sum of ranks is constant, and the optimiser goes on with the new parameters."""
    model, data, moved = gated(R), batch(), 3
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    method = ALoRA(model, score=lambda: -loss_of(model, data).item(), every=3, moved=moved).attach(optimizer)
    train(model, optimizer, data, 2, method)
    assert [len(path.lora_A) for path in low_rank_paths(model)] == [R, R, R]
    for step in (3, 6):
        train(model, optimizer, data, 1, method, first=step)
        ranks = [len(path.lora_A) for path in low_rank_paths(model)]
        assert sum(ranks) == 3 * R
        assert min(ranks) >= 1
        assert all(path.lora_B.shape[1] == len(path.gate) == len(path.lora_A) for path in low_rank_paths(model))
    train(model, optimizer, data, 2, method, first=7)
    assert {p for g in optimizer.param_groups for p in g["params"]} == set(trainable(model))


def test_alora_takes_from_the_least_and_gives_to_the_others():
    model, worth = gated(R), torch.tensor([0.1, 0.2, 0.3, 4.0, 5.0, 6.0], dtype=F64)
    paths = low_rank_paths(model)
    names = [path.name for path in paths]
    values = {"0": worth, "2": worth + 10, "4": worth + 20}
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)

    def score() -> float:
        return sum(float((path.gate * values[path.name]).sum()) for path in paths)

    kept = layers(model)[0].factors.pair.lora_A[3:].detach().clone()
    ALoRA(model, score, every=1, moved=3).attach(optimizer).on_step(1)
    assert {name: len(path.lora_A) for name, path in zip(names, paths, strict=True)} == {"0": 3, "2": 8, "4": 7}
    assert torch.equal(layers(model)[0].factors.pair.lora_A, kept)


def test_alora_needs_its_optimiser():
    with pytest.raises(RuntimeError, match="attach"):
        ALoRA(gated(R), lambda: 0.0, every=1).on_step(1)
