"""A model with LoRA: it computes and learns what PEFT's does; it is copied, saved, cast, merged and restored."""

import copy

import pytest
import torch
from tiny_models import (
    DUPLICATES,
    Mlp,
    assert_as_exact,
    assert_untouched,
    bert,
    gpt2,
    injected,
    llama,
    snapshot,
    three_models,
    tokens,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_ops import (
    FusedLoraLinear,
    LoraConfig,
    add_lora,
    lora_layers,
    lora_parameters,
    merge_lora,
    remove_lora,
    unmerge_lora,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prepack", [False, True])
@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_logits(make, dtype, prepack):
    """No less exact than PEFT's."""
    config = LoraConfig(r=6, lora_alpha=12, target_modules="all-linear", use_rslora=True)
    logits = [[m.eval()(tokens()).logits for m in three_models(make, dtype, config, prepack=prepack)] for _ in range(4)]
    assert logits[0][0].dtype == dtype
    assert_as_exact(logits)


def loss_of(model):
    logits, ids = model(tokens()).logits[:, :-1], tokens()[:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, 1).double(), ids.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_gradients(make, dtype):
    """Of the adapters and of the biases that train: no less exact than PEFT's."""
    config = LoraConfig(r=4, target_modules="all-linear", bias="lora_only")
    pairs = []
    for _ in range(4):
        models = three_models(make, dtype, config)
        gradients = []
        for model in models:
            loss_of(model).backward()
            gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        shapes = [[g.shape for g in side] for side in gradients]
        assert shapes[0] == shapes[1] == shapes[2]
        pairs += zip(*gradients, strict=True)
    assert_as_exact(pairs)


def fine_tune(model, parameters, steps=20):
    optimiser = torch.optim.AdamW(parameters, lr=5e-3)
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_trains_as_peft_does(make, dtype):
    """To 1 % at every step, while the loss falls to less than half."""
    model, theirs, _ = three_models(make, dtype, LoraConfig(r=4, target_modules="all-linear"))
    losses = fine_tune(model, lora_parameters(model))
    expected = fine_tune(theirs, [p for p in theirs.parameters() if p.requires_grad])
    assert losses[-1] < losses[0] / 2
    assert losses == pytest.approx(expected, rel=0.01)


def test_gradient_checkpointing():
    """With dropout: the forward that is repeated draws the same masks."""
    model = injected(llama(), lora_dropout=0.3)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        model.zero_grad()
        loss_of(model).backward()
        gradients.append([p.grad.clone() for p in lora_parameters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_generate():
    """With a key-value cache: the tokens that the whole sequence gives without one."""
    model = injected(llama().eval())
    prompt = tokens()[:, :5]
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    for n in range(5, generated.shape[1]):
        assert torch.equal(model(generated[:, :n]).logits[:, -1].argmax(-1), generated[:, n])


@pytest.mark.parametrize("duplicate", DUPLICATES)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_duplicates(make, duplicate):
    """A copy computes the same, shares no parameter, and is restored on its own."""
    model = make().eval()
    ids = tokens()
    plain = model(ids).logits
    with_lora = injected(model)(ids).logits
    other = duplicate(model)
    assert torch.equal(other(ids).logits, with_lora)
    assert {id(p) for p in other.parameters()}.isdisjoint({id(p) for p in model.parameters()})
    assert torch.equal(remove_lora(other)(ids).logits, plain)
    assert torch.equal(model(ids).logits, with_lora)
    assert not torch.equal(with_lora, plain)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_loads_the_base_model_s_state_dict(make):
    """A checkpoint fits before and after: Conv1D's weights keep their shape in the file."""
    base, model = make(), injected(make())
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
    assert all(".lora_" in key for key in missing)
    assert unexpected == []
    state = model.state_dict()
    assert all(torch.equal(state[name], t) and state[name].stride() == t.stride() for name, t in base.state_dict().items())
    assert torch.equal(remove_lora(model)(tokens()).logits, base(tokens()).logits)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_state_dict_round_trip(make):
    source, target = injected(make()), injected(make())
    ids = tokens()
    assert not torch.equal(source(ids).logits, target(ids).logits)
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(ids).logits, target(ids).logits)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_cast_and_removed(make):
    """What is moved or cast in between comes back moved or cast, and no copy of the old weights stays."""
    model = make()
    expected = copy.deepcopy(model).to(torch.bfloat16)
    remove_lora(injected(model).to(torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model(tokens()).logits, expected(tokens()).logits)


def test_removed_modules_hold_no_weights_meanwhile():
    model = injected(gpt2())
    for _, layer in lora_layers(model):
        assert layer.original.weight is None
        assert layer.original.bias is None


def test_from_meta():
    """A model made without memory works once it is given memory and a state, and is restored."""
    source = injected(llama())
    with torch.device("meta"):
        model = injected(llama())
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    model.model.rotary_emb = copy.deepcopy(source.model.rotary_emb)  # buffers that are in no state dict
    assert torch.equal(model(tokens()).logits, source(tokens()).logits)
    remove_lora(model)
    assert torch.equal(model(tokens()).logits, remove_lora(source)(tokens()).logits)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("make", [llama, gpt2, bert, Mlp])
def test_remove(make, merged):
    """The model is the one before: modules, parameters at their addresses, flags, attributes."""
    model = make()
    frozen = next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    parameters = {name: p.data_ptr() for name, p in model.named_parameters()}
    injected(model, bias="all")
    if merged:
        merge_lora(model)
    assert remove_lora(model) is model
    assert_untouched(model, before)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == parameters
    assert not frozen.requires_grad


def test_remove_keeps_the_mode():
    model = injected(llama())
    model.eval()
    remove_lora(model)
    assert not any(m.training for m in model.modules())


def test_add_again_after_remove():
    model = injected(llama())
    injected(remove_lora(model), r=2)
    assert {layer.r["default"] for _, layer in lora_layers(model)} == {2}


def test_remove_leaves_layers_placed_by_hand():
    model = nn.ModuleList([Mlp(), FusedLoraLinear(3, 4)])
    add_lora(model[0], LoraConfig(target_modules=["first"]))
    remove_lora(model)
    assert [name for name, _ in lora_layers(model)] == ["1"]


def test_remove_from_parts():
    """Two parts of a model, one of them within the other."""
    model = Mlp()
    add_lora(model, LoraConfig(target_modules=["first"]))
    add_lora(model.block, LoraConfig(target_modules=["0"]))
    assert [name for name, _ in lora_layers(model)] == ["first", "block.0"]
    remove_lora(model)
    assert list(lora_layers(model)) == []
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_merge_and_unmerge(make, dtype):
    """Merged as exact as plain layers of the rounded sum; unmerged bit for bit as before."""
    model = injected(make().to(dtype)).eval()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    ids = tokens()
    unmerged = model(ids).logits
    exact = copy.deepcopy(model).double()(ids).logits

    # The yardstick: plain layers whose weight is W0 + ΔW, rounded.
    plain = copy.deepcopy(model)
    sums = {name: layer.weight.double() + layer.delta_weight().double() for name, layer in lora_layers(plain)}
    remove_lora(plain)
    with torch.no_grad():
        for name, weight in sums.items():
            layer = plain.get_submodule(name)
            layer.weight.copy_(weight.T if isinstance(layer, Conv1D) else weight)

    assert merge_lora(model) is model
    assert_as_exact([(model(ids).logits, plain(ids).logits, exact)])

    assert unmerge_lora(model) is model
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert torch.equal(model(ids).logits, unmerged)


def test_merge_is_all_or_nothing():
    model = injected(llama())
    name, layer = list(lora_layers(model))[3]
    with torch.no_grad():
        layer.lora_B["default"][0, 0] = float("inf")
    state = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"{name}: .*not finite"):
        merge_lora(model)
    assert not any(layer.merged for _, layer in lora_layers(model))
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_merging_twice_is_an_error():
    model = injected(llama())
    with pytest.raises(RuntimeError, match=r"14 of 14 layers are not merged .*nothing was changed"):
        unmerge_lora(model)
    layers = dict(lora_layers(model))
    layers["model.layers.1.mlp.up_proj"].merge()
    with pytest.raises(RuntimeError, match=r"1 of 14 layers are merged already \(model.layers.1.mlp.up_proj\)"):
        merge_lora(model)
    assert sum(layer.merged for layer in layers.values()) == 1
    with pytest.raises(RuntimeError, match="13 of 14 layers are not merged"):
        unmerge_lora(model)
    assert sum(layer.merged for layer in layers.values()) == 1


@pytest.mark.parametrize("function", [merge_lora, unmerge_lora, remove_lora, lora_parameters])
def test_a_model_without_lora(function):
    """Is an error of each function that needs one with it."""
    with pytest.raises(ValueError, match="model has no"):
        function(Mlp())
