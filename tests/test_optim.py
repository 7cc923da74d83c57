"""Groups, freezing and gradients for the user's optimiser, beside PEFT's optimisers and the identities that define them."""

import copy
import math

import peft.optimizers
import pytest
import torch
from low_rank_models import F64, batch, gated, layers, loss_of, mlp, plain, train, trainable, values
from tiny_models import Mlp, llama
from torch import nn

import lora_ops
from lora_ops import LoraConfig, add_lora, lora_layers
from lora_ops.optim import (
    DeltaLora,
    LoraFA,
    asymmetric,
    flora,
    freeze,
    galore,
    lorafa_precondition,
    loraplus_groups,
    prox_l1_,
    train_embeddings_and_norms,
)

R = 4


def beside_peft(dtype=F64, **options):
    """The same network and adapters twice: PEFT's and ours."""
    base, data = Mlp().to(dtype), (torch.randn(32, 12, dtype=dtype), torch.randn(32, 4, dtype=dtype))
    config = {"r": R, "target_modules": ["first", "block.0", "block.2"], **options}
    ours = add_lora(copy.deepcopy(base), LoraConfig(**config))
    theirs = peft.get_peft_model(base, peft.LoraConfig(**config), autocast_adapter_dtype=False)
    for name, layer in lora_layers(ours):
        target = theirs.base_model.model.get_submodule(name)
        nn.init.normal_(layer.lora_B["default"], std=0.3)
        target.lora_A["default"].weight.data.copy_(layer.lora_A["default"])
        target.lora_B["default"].weight.data.copy_(layer.lora_B["default"])
    return ours, theirs, data


def differences(ours, theirs) -> float:
    worst = 0.0
    for name, layer in lora_layers(ours):
        target = theirs.base_model.model.get_submodule(name)
        for factor in ("lora_A", "lora_B"):
            a, b = getattr(layer, factor)["default"].detach(), getattr(target, factor)["default"].weight.detach()
            worst = max(worst, float((a - b).abs().max()))
    return worst


def test_loraplus_is_pefts():
    ours, theirs, data = beside_peft(bias="lora_only")
    options = {"lr": 1e-2, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(loraplus_groups(ours, ratio=16, **options))
    reference = peft.optimizers.create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    sizes = sorted((len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups)
    assert sizes == sorted((len(g["params"]), g["lr"], g["weight_decay"]) for g in reference.param_groups if g["params"])
    assert len(sizes) == 3  # A, B, and biases
    before = values(ours)
    for model, opt in ((ours, optimizer), (theirs, reference)):
        train(model, opt, data, 5)
    assert differences(ours, theirs) < 1e-12
    assert max(float((p.detach() - before[n]).abs().max()) for n, p in ours.named_parameters()) > 0.1


def test_loraplus_has_each_parameter_once():
    model = add_lora(llama(), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"]))
    groups = loraplus_groups(model, lr=1e-3, ratio=8, weight_decay=0.1, embedding_lr=1e-5)
    found = [id(p) for g in groups for p in g["params"]]
    assert sorted(found) == sorted(id(p) for p in trainable(model))
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    named = {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    for name, rate in named.items():
        if "embed" in name:
            assert rate == (1e-5, 0.1), name
        elif "norm" in name:
            assert rate == (8e-3, 0.0), name
        else:
            assert rate == ((8e-3 if "lora_B" in name else 1e-3), 0.1), name
    assert len(set(named.values())) == 4


def test_loraplus_of_ratio_1_is_lora():
    one, other, data = plain(dtype=torch.float32), None, batch(dtype=torch.float32)
    other = copy.deepcopy(one)
    train(one, torch.optim.AdamW(loraplus_groups(one, lr=1e-2, ratio=1)), data, 5)
    train(other, torch.optim.AdamW(trainable(other), lr=1e-2, weight_decay=0.0), data, 5)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("argument", "value"), [("lr", -1.0), ("ratio", 0.0), ("embedding_lr", math.inf), ("weight_decay", -0.1)]
)
def test_loraplus_names_what_does_not_fit(argument, value):
    with pytest.raises(ValueError, match=argument):
        loraplus_groups(plain(), **{"lr": 1e-3, "ratio": 2.0, argument: value})


def test_loraplus_needs_something_to_train():
    with pytest.raises(ValueError, match="model"):
        loraplus_groups(mlp().requires_grad_(False), lr=1e-3, ratio=2)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_lora_fa_is_pefts(use_rslora):
    ours, theirs, data = beside_peft(lora_alpha=16, use_rslora=use_rslora)
    reference = peft.optimizers.create_lorafa_optimizer(theirs, r=R, lora_alpha=16, lr=1e-2)
    reference.param_groups[0]["eps"] = 0.0  # which torch adds to another denominator
    method = LoraFA(ours)
    before = values(ours)
    optimizer = torch.optim.AdamW(trainable(ours), lr=1e-2, eps=0.0, weight_decay=0.0)
    train(ours, optimizer, data, 5, method)
    for _ in range(5):
        theirs.zero_grad()
        loss_of(theirs, data).backward()
        reference.step()
    assert differences(ours, theirs) < 1e-9
    for name, p in ours.named_parameters():
        assert torch.equal(p, before[name]) == ("lora_B" not in name), name


def test_lora_fa_moves_the_weight_along_the_full_gradient():
    model, data = plain(), batch()
    method, (layer, *_) = LoraFA(model), layers(model)
    full = copy.deepcopy(layer.weight).requires_grad_()
    A, B, s = layer.lora_A["default"], layer.lora_B["default"], layer.scaling["default"]
    x, y = data
    rest = model[1:]
    base = nn.functional.linear(x, full + s * B.detach() @ A.detach(), layer.bias)
    (rest(base) - y).square().mean().backward()
    loss = loss_of(model, data)
    model.zero_grad()
    loss.backward()
    method.on_backward(1)
    onto_A = A.T @ torch.linalg.inv(A @ A.T) @ A
    torch.testing.assert_close(s * B.grad @ A, full.grad @ onto_A, rtol=1e-6, atol=1e-8)  # δ is 1e-8


def test_lora_fa_keeps_no_input():
    """Of a layer whose A is frozen, the backward has (rows, r) instead of x."""
    sizes = {}
    for frozen in (False, True):
        layer = lora_ops.FusedLoraLinear(64, 8, R)
        if frozen:
            freeze(layer, "lora_A")
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            layer(torch.randn(32, 64))
        sizes[frozen] = (
            sum(t.numel() for t in saved if t.shape == (32, 64)),
            sum(t.numel() for t in saved if t.shape == (32, R)),
        )
    assert sizes == {False: (32 * 64, 32 * R), True: (0, 32 * R)}


def test_precondition_names_what_does_not_fit():
    with pytest.raises(ValueError, match="scaling"):
        lorafa_precondition(torch.ones(3, 2), torch.ones(2, 4), 0.0)


def test_freeze_needs_a_name_that_is_there():
    model = plain()
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="lora_C"):
        freeze(model, "lora_A", "lora_C")
    assert before == [p.requires_grad for p in model.parameters()]


def test_asymmetric_step_is_a_projected_gradient():
    model, data, lr = plain(trained=False), batch(), 0.1
    asymmetric(model)
    assert all("lora_B" in name for name, p in model.named_parameters() if p.requires_grad)
    layer = layers(model)[0]
    A, s = layer.lora_A["default"], layer.scaling["default"]
    torch.testing.assert_close(A @ A.T, torch.eye(R, dtype=F64))
    full = layer.weight.detach().clone().requires_grad_()
    (model[1:](nn.functional.linear(data[0], full, layer.bias)) - data[1]).square().mean().backward()
    train(model, torch.optim.SGD(trainable(model), lr=lr), data, 1)
    torch.testing.assert_close(layer.delta_weight(), -lr * s**2 * full.grad @ A.T @ A)


def test_asymmetric_needs_ranks_that_fit():
    with pytest.raises(ValueError, match="ranks"):
        asymmetric(plain(r=14))


def test_longlora_trains_embeddings_and_norms():
    model = add_lora(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    train_embeddings_and_norms(model)
    for name, p in model.named_parameters():
        assert p.requires_grad == ("lora_" in name or "embed" in name or "norm" in name), name


def test_proximal_step_kills_no_more_than_the_threshold():
    gate = torch.tensor([0.5, 0.7, 0.9, -0.5, 1.5, 0.1, -0.3, 0.0], dtype=F64)
    expected = torch.tensor([0.1, 0.3, 0.5, -0.1, 1.1, 0.0, 0.0, 0.0], dtype=F64)
    torch.testing.assert_close(prox_l1_(gate, 0.4), expected)
    with pytest.raises(ValueError, match="threshold"):
        prox_l1_(gate, -1.0)


def test_delta_lora_telescopes():
    """What the weight gets is λ s times what B A has changed by since the start, so the whole update has rank 2 r."""
    model, data, lam, start = plain(r=2, trained=False, lora_alpha=4), batch(), 2.0, 4
    method = DeltaLora(model, lam, start)
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-2)
    shared = [layer.weight for layer in layers(model)]
    before = [w.clone() for w in shared]
    train(model, optimizer, data, start - 1, method)
    at_start = [layer.delta_weight() for layer in layers(model)]
    assert all(layer.weight is w for layer, w in zip(layers(model), shared, strict=True))
    train(model, optimizer, data, 8, method, first=start)
    for layer, W0, delta, w in zip(layers(model), before, at_start, shared, strict=True):
        torch.testing.assert_close(layer.weight - W0, lam * (layer.delta_weight() - delta))
        total = layer.weight - W0 + layer.delta_weight()
        assert torch.linalg.matrix_rank(total, rtol=1e-9) == 4
        assert torch.equal(w, W0)  # whoever shares it does not notice


def test_delta_lora_names_what_does_not_fit():
    with pytest.raises(TypeError, match="float32"):
        DeltaLora(plain(dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="start"):
        DeltaLora(plain(), start=0)
    with pytest.raises(ValueError, match="gates"):
        DeltaLora(gated())


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_galore_takes_the_best_low_rank_step(shape):
    linear, x, y = (
        nn.Linear(shape[1], shape[0], dtype=F64),
        torch.randn(64, shape[1], dtype=F64),
        torch.randn(64, shape[0], dtype=F64),
    )
    method = galore(linear.parameters(), rank=R, scale=0.25)
    assert [tuple(p.shape) for p in method.parameters()] == [(R, 40), (shape[0],)]
    optimizer = torch.optim.SGD(method.parameters(), lr=0.5)
    W0, b0 = linear.weight.detach().clone(), linear.bias.detach().clone()
    (linear(x) - y).square().sum().backward()
    G, g = linear.weight.grad.clone(), linear.bias.grad.clone()
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    method.on_backward(1)
    optimizer.step()
    method.on_step(1)
    torch.testing.assert_close(linear.weight - W0, -0.5 * 0.25 * (U[:, :R] * S[:R]) @ Vh[:R])
    torch.testing.assert_close(linear.bias - b0, -0.5 * g)


def test_galore_trains_with_any_optimiser_and_small_moments():
    model, data = mlp(), batch()
    method = galore(model.parameters(), rank=2, every=5, scale=1.0)
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-2)
    first = loss_of(model, data).item()
    train(model, optimizer, data, 30, method.attach(optimizer))
    model.zero_grad()
    assert loss_of(model, data).item() < 0.7 * first
    moments = sum(t.numel() for p in method.projected.values() for k, t in optimizer.state[p].items() if k == "exp_avg")
    assert moments == sum(2 * max(p.shape) for p in model.parameters() if p.ndim == 2)
    assert all(not small.any() for small in method.projected.values())


def test_flora_projects_without_bias():
    """E[P Pᵀ G] = G over seeds, and P comes from the seed alone."""
    total, n = torch.zeros(8, 12, dtype=F64), 1500
    G = torch.randn(8, 12, dtype=F64)
    steps = []
    for seed in (*range(n), 0):
        p = nn.Parameter(torch.zeros(8, 12, dtype=F64))
        method = flora([p], rank=R, seed=seed)
        optimizer = torch.optim.SGD(method.parameters(), lr=1.0)
        method.attach(optimizer)
        p.grad = G.clone()
        method.on_backward(1)
        optimizer.step()
        method.on_step(1)
        steps.append(-p.detach())
        total += steps[-1] / n if len(steps) <= n else 0
    assert torch.linalg.matrix_rank(steps[0]) == R
    assert torch.equal(steps[0], steps[-1])
    assert (total - G).norm() / G.norm() < 0.1 < (steps[0] - G).norm() / G.norm()


def test_flora_moves_momentum_to_the_new_projection():
    p = nn.Parameter(torch.zeros(8, 12, dtype=F64))
    method = flora([p], rank=R, every=1)
    optimizer = torch.optim.SGD(method.parameters(), lr=1.0, momentum=0.5)
    method.attach(optimizer)
    G = torch.randn(8, 12, dtype=F64)
    P, expected, M = [], torch.zeros(8, 12, dtype=F64), None
    for step in (1, 2, 3):
        P.append(method.projector(G, R, step - 1))
        M = P[-1].T @ G if M is None else 0.5 * P[-1].T @ P[-2] @ M + P[-1].T @ G
        expected -= P[-1] @ M
        p.grad = G.clone()
        method.on_backward(step)
        optimizer.step()
        method.on_step(step)
    torch.testing.assert_close(p.detach(), expected)


def test_flora_needs_its_optimiser():
    method = flora([nn.Parameter(torch.zeros(8, 12))], rank=2)
    with pytest.raises(RuntimeError, match="attach"):
        method.on_backward(1)


def test_projection_names_what_does_not_fit():
    for argument, value in (("rank", 0), ("every", 0)):
        with pytest.raises(ValueError, match=argument):
            galore(mlp().parameters(), **{"rank": 2, argument: value})
    with pytest.raises(ValueError, match="parameters"):
        galore(mlp().requires_grad_(False).parameters(), rank=2)
