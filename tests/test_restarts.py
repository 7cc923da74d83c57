"""Merges that leave outputs alone, ranks that add up, and what the optimiser forgets."""

import pytest
import torch
from low_rank_models import batch, gated, layers, mlp, plain, train, trainable
from torch import nn

import lora_ops
from lora_ops import factors
from lora_ops.methods import MergeAndRestart, absorb, cola, cosine_restarts, relora, reset_moments, xgblora

R = 2


def rank(t: torch.Tensor) -> int:
    return int(torch.linalg.matrix_rank(t, rtol=1e-9))


@pytest.mark.parametrize("make", [relora, cola])
def test_rank_grows_with_every_restart(make):
    """R after one round, 2 R after two, ...; the shared weights stay as they were."""
    model, data = plain(R, trained=False), batch()
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-2)
    shared = [layer.weight for layer in layers(model)]
    before, ranks = [w.clone() for w in shared], []
    method = make(model, every=4).attach(optimizer)
    for k in range(3):
        train(model, optimizer, data, 4, method, first=1 + 4 * k)
        ranks.append([rank(layer.weight - W0) for layer, W0 in zip(layers(model), before, strict=True)])
    assert ranks == [[2, 2, 2], [4, 4, 4], [6, 6, 6]]
    assert all(torch.equal(w, W0) for w, W0 in zip(shared, before, strict=True))
    assert method.restarts == 3


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_a_restart_changes_no_output_and_trains_on(options):
    model, data = plain(R, **options), batch()
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-2)
    method = MergeAndRestart(model, 3).attach(optimizer)
    train(model, optimizer, data, 2, method)
    old_A = layers(model)[0].lora_A["default"].detach().clone()
    before = model(data[0]).detach()
    method.restart()
    torch.testing.assert_close(model(data[0]), before)
    assert not layers(model)[0].lora_B["default"].any()
    assert not torch.equal(layers(model)[0].lora_A["default"], old_A)
    train(model, optimizer, data, 3, method, first=4)
    assert not torch.equal(model(data[0]), before)


def test_merged_weights_are_the_users():
    """What remains after a restart is an ordinary adapter: it merges, unmerges and can be removed."""
    model, data = plain(R), batch()
    MergeAndRestart(model, 1).restart()
    before = model(data[0])
    lora_ops.unmerge_lora(lora_ops.merge_lora(model))
    torch.testing.assert_close(model(data[0]), before)
    torch.testing.assert_close(lora_ops.remove_lora(model)(data[0]), before)


def moments(optimizer, p) -> list[torch.Tensor]:
    return [t for key, t in optimizer.state.get(p, {}).items() if key != "step"]


def test_moments_are_forgotten():
    model, data = plain(R), batch()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    train(model, optimizer, data, 3)
    p = layers(model)[1].lora_A["default"]
    before = moments(optimizer, p)[0].abs().clone()
    reset_moments(optimizer, [p], 0.5, "magnitude")
    first, second = moments(optimizer, p)
    assert int((first == 0).sum()) == p.numel() // 2
    assert before[first == 0].max() <= before[first != 0].min()
    assert torch.equal(first == 0, second == 0)
    reset_moments(optimizer, [p], 0.75)
    assert int((first == 0).sum()) >= 0.75 * p.numel()
    assert torch.equal(first == 0, second == 0)  # m / sqrt(0) would be a step without bound
    reset_moments(optimizer, [p])
    assert not moments(optimizer, p)
    for options, argument in (({"share": 1.5}, "share"), ({"by": "size"}, "by")):
        with pytest.raises(ValueError, match=argument):
            reset_moments(optimizer, [p], **options)


def test_cola_steps_ranks_down():
    model, data = plain(8, trained=False, lora_alpha=16), batch()
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-2)
    before, seen, method = [layer.weight.clone() for layer in layers(model)], [], cola(model, 3, ranks=[4, 2]).attach(optimizer)
    for k in range(3):
        train(model, optimizer, data, 3, method, first=1 + 3 * k)
        layer = layers(model)[1]
        seen.append((layer.r["default"], layer.lora_A["default"].shape[0], layer.scaling["default"]))
    assert seen == [(4, 4, 4.0), (2, 2, 8.0), (2, 2, 8.0)]
    assert rank(layers(model)[1].weight - before[1]) == 8 + 4 + 2
    assert {p for g in optimizer.param_groups for p in g["params"]} == set(trainable(model))


@pytest.mark.parametrize("make", [relora, cola])
def test_layers_with_a_provider_restart_too(make):
    """Gates, a core and shared factors: outputs stay, the rank adds up, and what is shared is made anew once."""
    model, data = gated(R), batch()
    model[0].factors = factors.Gated(model[0].factors.pair, core=torch.randn(R, R, dtype=torch.float64))
    shared = factors.tied_pair(16, 16, R).double()
    for i in (2, 4):
        model[i].factors = factors.tied_lora(nn.Linear(16, model[i].out_features), shared).double()
    for layer in layers(model):
        nn.init.normal_(layer.factors.pair.lora_B, std=0.3)
    method = make(model, every=4)
    assert len(method.paths) == 3
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-2)
    method.attach(optimizer)
    before, ranks = [layer.weight.clone() for layer in layers(model)], []
    for k in range(3):
        train(model, optimizer, data, 4, method, first=1 + 4 * k)
        assert all(not layer.delta_weight().any() for layer in layers(model))
        ranks.append([rank(layer.weight - W0) for layer, W0 in zip(layers(model), before, strict=True)])
    assert ranks == [[2, 2, 2], [4, 4, 4], [6, 6, 6]]
    train(model, optimizer, data, 1)
    y, A = model(data[0]).detach(), shared.lora_A.detach().clone()
    method.restart()
    torch.testing.assert_close(model(data[0]), y)
    assert not torch.equal(shared.lora_A, A)


def test_a_provider_in_two_layers_is_merged_into_both():
    model, data = gated(R), batch()
    model[2] = lora_ops.FactoredLinear(nn.Linear(16, 16, dtype=torch.float64), model[2].factors)
    model.insert(3, lora_ops.FactoredLinear(nn.Linear(16, 16, dtype=torch.float64), model[2].factors))
    before = model(data[0]).detach()
    MergeAndRestart(model, 1).restart()
    torch.testing.assert_close(model(data[0]), before)
    assert not model[3].factors.pair.lora_B.any()


def test_xgblora_boosts_some_layers():
    """Rank 1 in one layer per round; the ranks of all layers together are the rounds."""
    model, data = plain(1, trained=False), batch()
    before = [layer.weight.clone() for layer in layers(model)]
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "lora_" in n], lr=3e-2)
    method = xgblora(model, 3, 1, generator=torch.Generator().manual_seed(0)).attach(optimizer)
    for k in range(5):
        assert len(trainable(model)) == 2
        train(model, optimizer, data, 3, method, first=1 + 3 * k)
        ranks = [
            rank(layer.weight - W0) if (layer.weight != W0).any() else 0
            for layer, W0 in zip(layers(model), before, strict=True)
        ]
        assert sum(ranks) == k + 1
    assert max(ranks) < 5


def test_restarts_take_an_initialisation():
    """LoRA-GA with restarts: whatever makes an adapter anew, and the weight's offset with it."""
    model, data = plain(R), batch()

    def reinit(path):
        nn.init.orthogonal_(path.lora_A)
        nn.init.orthogonal_(path.lora_B)
        layer = path.layer
        layer.weight = nn.Parameter(layer.weight - layer.delta_weight(path.adapter), requires_grad=False)

    before = model(data[0]).detach()
    MergeAndRestart(model, 1, reinit=reinit).restart()
    torch.testing.assert_close(model(data[0]), before)
    assert layers(model)[0].lora_B["default"].all()


def test_the_learning_rate_starts_anew():
    factor = cosine_restarts(100, 20, warmup=4, minimum=0.1)
    assert [factor(s) / factor(s + 3) < 0.3 for s in (0, 20, 40)] == [True] * 3
    assert factor(10) > factor(30) > factor(50) > factor(99) > 0.1
    scheduler = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(mlp().parameters(), lr=1.0), factor)
    assert scheduler.get_last_lr() == [0.25]


def test_restarts_name_what_does_not_fit():
    for options, argument in (({"every": 0}, "every"), ({"every": 1, "sample": 4}, "sample")):
        with pytest.raises(ValueError, match=argument):
            MergeAndRestart(plain(R), **options)
    with pytest.raises(ValueError, match=r"ranks must be \(\) for a FactoredLinear, such as 0, got \[2\]"):
        MergeAndRestart(gated(R), 1, ranks=[2])
    for provider in (factors.ia3, lambda linear: factors.MixLora(linear, 4, R)):
        with pytest.raises(ValueError, match=r"Gated without out_scale, got (Gated|MixLora) in 0"):
            MergeAndRestart(nn.Sequential(lora_ops.FactoredLinear(nn.Linear(4, 4), provider(nn.Linear(4, 4)))), 1)
    with pytest.raises(RuntimeError, match="attach"):
        MergeAndRestart(plain(R), 1).on_step(1)
    model = mlp(torch.float32)
    lora_ops.add_lora(model, lora_ops.LoraConfig(r=R, target_modules=["0"]), quant="nf4")
    with pytest.raises(TypeError, match="4 bits"):
        MergeAndRestart(model, 1)
    with pytest.raises(TypeError, match="4 bits"):
        absorb(model[0])
