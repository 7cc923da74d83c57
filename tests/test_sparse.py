"""Elements of A and B, and outputs of layers, that are zero."""

import copy
import math

import pytest
import torch
from low_rank_models import F64, batch, layers, loss_of, plain, train, trainable
from torch import nn

import lora_ops
from lora_ops.methods import (
    LoRAPrune,
    PRILoRA,
    estimated_gradient,
    hessian_gradient,
    low_rank_paths,
    prilora_ranks,
    roselora,
    sparse_adapter,
    synaptic_flow,
)

R = 4


def factors(model) -> list[nn.Parameter]:
    return [p for path in low_rank_paths(model) for p in (path.lora_A, path.lora_B)]


def test_sparse_adapter_stays_sparse():
    """Exactly half of all elements are zero, whatever AdamW's momentum and decay would make of them, and the scores decide."""
    model, data = plain(R), batch()
    method = sparse_adapter(model, 0.5, "snip", at=3)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
    train(model, optimizer, data, 2, method)
    assert all(p.all() for p in factors(model))
    optimizer.zero_grad()
    loss_of(model, data).backward()
    scores = torch.cat([(p * p.grad).detach().abs().view(-1) for p in factors(model)])
    method.on_backward(3)
    optimizer.step()
    method.on_step(3)
    zero = torch.cat([p.detach().view(-1) == 0 for p in factors(model)])
    assert int(zero.sum()) == zero.numel() // 2
    assert scores[zero].max() <= scores[~zero].min()
    train(model, optimizer, data, 5, method, first=4)
    assert torch.equal(zero, torch.cat([p.detach().view(-1) == 0 for p in factors(model)]))
    assert not torch.cat([p.grad.view(-1) for p in factors(model)])[zero].any()  # nor does momentum gather for them


@pytest.mark.parametrize("score", ["rand", "mag", "grasp", "synflow"])
def test_sparse_adapter_by_every_score(score):
    model, data = plain(R), batch()
    functions = {
        "grasp": lambda ps: hessian_gradient(ps, lambda: loss_of(model, data)),
        "synflow": lambda ps: synaptic_flow(model, data[0])(ps),
    }
    method = sparse_adapter(model, 0.75, functions.get(score, score), at=1)
    train(model, torch.optim.SGD(trainable(model), lr=0.1), data, 3, method)
    zero = torch.cat([p.detach().view(-1) == 0 for p in factors(model)])
    assert int(zero.sum()) == int(0.75 * zero.numel())


def test_hessian_gradient_is_autograds():
    model, data = plain(R)[:1], (batch()[0], torch.randn(32, 16, dtype=F64))
    layer = model[0]
    A, B = (p.detach().clone().requires_grad_() for p in factors(model))
    y = nn.functional.linear(data[0], layer.weight, layer.bias) + layer.scaling["default"] * data[0] @ A.T @ B.T
    g = torch.autograd.grad((y - data[1]).square().mean(), (A, B), create_graph=True)
    Hg = torch.autograd.grad(sum(t.square().sum() for t in g) / 2, (A, B))
    before = [p.detach().clone() for p in factors(model)]
    found = hessian_gradient(factors(model), lambda: loss_of(model, data))
    for p, q, h, expected in zip(factors(model), before, found, (A * Hg[0], B * Hg[1]), strict=True):
        assert torch.equal(p, q)
        torch.testing.assert_close(h, expected.detach(), rtol=1e-5, atol=1e-9)


def test_synaptic_flow_is_one_sum_for_every_layer():
    """Of a network without bias whose activations pass what is positive, each path's flow is that of the whole adapter."""
    model = nn.Sequential(*[nn.Linear(k, n, bias=False, dtype=F64) for k, n in ((5, 7), (7, 3))])
    lora_ops.add_lora(model, lora_ops.LoraConfig(r=2, target_modules=["0", "1"], lora_alpha=2))
    nn.init.normal_(model[0].lora_B["default"])
    scores = synaptic_flow(model, torch.zeros(1, 5, dtype=F64))([model[0].lora_A["default"], model[0].lora_B["default"]])
    A, B, W = (t.detach().abs() for t in (model[0].lora_A["default"], model[0].lora_B["default"], model[1].weight))
    B1, A1 = (t.detach().abs() for t in (model[1].lora_B["default"], model[1].lora_A["default"]))
    flow = ((W + B1 @ A1) @ B @ A).sum()
    assert scores[0].sum().item() == pytest.approx(flow.item())
    assert scores[1].sum().item() == pytest.approx(flow.item())


def test_pruning_at_the_start_of_lora_says_so():
    model, data = plain(R, trained=False), batch()
    with pytest.raises(RuntimeError, match="B is zero"):
        train(model, torch.optim.SGD(trainable(model), lr=0.0), data, 1, sparse_adapter(model, at=1))


@pytest.mark.parametrize(("argument", "value"), [("sparsity", 1.0), ("score", "largest")])
def test_sparse_adapter_names_what_does_not_fit(argument, value):
    with pytest.raises(ValueError, match=argument):
        sparse_adapter(plain(R), **{argument: value})


def test_roselora_prunes_every_rank():
    """Each row of A and column of B has its own share, and ΔW no more non-zeros than pairs of theirs."""
    model, data, steps, sparsity = plain(R), batch(), 20, 0.75
    method = roselora(model, sparsity, steps)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    counts = []
    for step in range(1, steps + 1):
        train(model, optimizer, data, 1, method, first=step)
        counts.append(int(sum((p == 0).sum() for p in factors(model))))
        zeros = [(path.lora_A == 0).sum(1) for path in low_rank_paths(model)]
        assert all(len(set(z.tolist())) == 1 for z in zeros)
    assert counts[1] == 0 < counts[2]
    assert counts == sorted(counts)
    for layer in layers(model):
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        assert ((A == 0).sum(1) == int(sparsity * A.shape[1])).all()
        assert ((B == 0).sum(0) == int(sparsity * B.shape[0])).all()
        nonzero = int((layer.delta_weight() != 0).sum())
        assert nonzero <= int(((A != 0).sum(1) * (B != 0).sum(0)).sum()) < A.shape[1] * B.shape[0]


def test_prilora_prunes_rows_of_A():
    """By |A| times the mean norm of inputs, of forwards that train; B is left alone, and what was pruned comes back."""
    model, data, beta = plain(R), batch(), 0.9
    method = PRILoRA(model, every=2, beta=beta)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    train(model, optimizer, data, 1, method)
    with torch.no_grad():
        model(1e3 * data[0])  # no training: does not count
    optimizer.zero_grad()
    loss_of(model, data).backward()
    norm = torch.linalg.vector_norm(data[0], dim=0) * (1 - beta) * (1 + beta)
    torch.testing.assert_close(method.norms[0], norm.float())
    optimizer.step()
    A = layers(model)[0].lora_A["default"]
    score = A.detach().abs() * norm
    scores_before = score.clone()
    method.on_backward(2)
    method.on_step(2)
    for row, values in zip(A, scores_before, strict=True):
        assert int((row == 0).sum()) == 6
        assert values[row == 0].max() <= values[row != 0].min()
    assert all(path.lora_B.all() for path in low_rank_paths(model))
    train(model, optimizer, data, 1, method, first=3)
    assert A.all()
    method.remove()
    model(data[0])
    assert not model[0]._forward_pre_hooks


@pytest.mark.parametrize(("n", "first", "last"), [(12, 4, 12), (7, 4, 12), (1, 4, 12), (5, 3, 3), (24, 1, 2)])
def test_prilora_ranks_rise_and_keep_the_budget(n, first, last):
    ranks = list(prilora_ranks([f"layers.{i}" for i in range(n)], first, last).values())
    assert ranks == sorted(ranks)
    line = sum(first + (last - first) * i / max(n - 1, 1) for i in range(n))
    assert sum(ranks) == round(line)
    assert min(ranks) >= first
    assert max(ranks) <= last
    with pytest.raises(ValueError, match="first"):
        prilora_ranks(["a"], 5, 4)


def test_loraprune_estimates_the_gradient():
    """B A minus the product after one step of both, as if each had learning rate 1."""
    model, data = plain(R), batch()
    loss_of(model, data).backward()
    for path in low_rank_paths(model):
        A, B, gA, gB = path.lora_A, path.lora_B, path.lora_A.grad, path.lora_B.grad
        torch.testing.assert_close(estimated_gradient(path), (B @ A - (B - gB) @ (A - gA)).detach())


def test_loraprune_masks_are_removed_rows():
    model, data, size, steps = plain(R), batch(), 2, 40
    method = LoRAPrune(model, steps, group_size=size, ratio=0.5, beta=0.0)
    optimizer = torch.optim.SGD(trainable(model), lr=0.05)
    train(model, optimizer, data, steps - 1, method)
    loss_of(model, data).backward()
    method.on_backward(steps)
    for path, score in zip(method.paths, method.scores, strict=True):
        W = path.layer.weight + path.layer.delta_weight()
        by_hand = (estimated_gradient(path) * W).abs().view(-1, size, W.shape[1]).sum((1, 2))
        torch.testing.assert_close(score, by_hand.float())
    method.on_step(steps)
    for layer, mask, score in zip(layers(model), method.masks, method.scores, strict=True):
        groups = mask.view(-1, size)
        assert int(groups.all(1).sum()) == math.ceil(len(groups) / 2)
        assert int(groups.any(1).sum()) == int(groups.all(1).sum())
        assert score[groups[:, 0]].min() >= score[~groups[:, 0]].max()
        x = torch.randn(5, layer.in_features, dtype=F64)
        smaller = nn.Linear(layer.in_features, int(mask.sum()), dtype=F64)
        smaller.weight.data, smaller.bias.data = (layer.weight + layer.delta_weight())[mask], layer.bias[mask]
        y = layer(x)
        torch.testing.assert_close(y[:, mask], smaller(x))
        assert not y[:, ~mask].any()
    whole = copy.deepcopy(model)(data[0])
    method.remove()
    assert not torch.equal(model(data[0]), whole)


def test_loraprune_names_what_does_not_fit():
    with pytest.raises(ValueError, match="group_size"):
        LoRAPrune(plain(R), 10, group_size={"0": 3})
