"""`add_factors`: providers in whole models, what they share, and their way to plain LoRA."""

import copy

import pytest
import torch
from factored_layers import randomised
from tiny_models import DUPLICATES, Mlp, assert_untouched, gpt2, llama, snapshot, tokens
from torch import nn

from lora_ops import (
    FactoredLinear,
    FusedLoraLinear,
    LoraConfig,
    add_factors,
    add_lora,
    disable_adapter,
    factors,
    factors_to_lora,
    load_adapter,
    lora_layers,
    lora_parameters,
    merge_and_unload,
    merge_lora,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from lora_ops.registry import methods

SIZE = factors.widest(m for m in llama().modules() if isinstance(m, nn.Linear))


def with_vera(model):
    shared = factors.Pair.seeded(*SIZE, r=4)
    return add_factors(model, lambda name, linear: factors.vera(linear, shared))


def with_tied(model):
    shared = factors.tied_pair(*SIZE, r=4)
    return add_factors(model, lambda name, linear: factors.tied_lora(linear, shared), scaling=0.5)


def with_bank(model):
    shared = factors.VectorBank(20, 8)
    return add_factors(model, lambda name, linear: factors.VBLora(linear, shared))


def with_one_provider(model):
    shared = factors.Gated(factors.tied_pair(32, 32, r=4))
    return add_factors(model, lambda name, linear: shared, target_modules=["q_proj", "o_proj"], scaling=2.0)


def with_ia3(model):
    return add_factors(model, lambda name, linear: factors.ia3(linear), exclude_modules=["down_proj"])


def with_mixlora(model):
    return add_factors(model, lambda name, linear: factors.MixLora(linear, 4, 2))


EVERY = [with_vera, with_tied, with_bank, with_one_provider, with_ia3]


def layers_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, FactoredLinear)}


def logits(model):
    return model(tokens()).logits


@pytest.mark.parametrize("add", EVERY)
def test_changes_and_is_undone(add):
    model = llama().eval()
    before, y = snapshot(model), logits(model)
    assert add(model) is model
    layers = layers_of(model)
    assert all(p.requires_grad == (".factors." in name) or "pair" in name for name, p in model.named_parameters())
    assert all(name in model.state_dict() for name in before[2])
    randomised(nn.ModuleList(lora_parameters_of(model)), 0.3)
    assert not torch.allclose(logits(model), y, atol=1e-3)
    with disable_adapter(model):
        assert torch.equal(logits(model), y)
    mine = logits(model)
    merge_lora(model)
    torch.testing.assert_close(logits(model), mine, rtol=1e-4, atol=1e-4)
    unmerge_lora(model)
    assert torch.equal(logits(model), mine)
    assert len(layers) == {with_one_provider: 4, with_ia3: 12}.get(add, 14)
    remove_lora(model)
    assert_untouched(model, before)
    assert torch.equal(logits(model), y)


def lora_parameters_of(model):
    return [nn.ParameterList(lora_parameters(model))]


@pytest.mark.parametrize("add", EVERY)
def test_what_is_shared_is_there_once(add):
    """Among the parameters, in the state dict, and after it is loaded, copied, pickled and cast."""
    model = add(llama().eval())
    randomised(nn.ModuleList(lora_parameters_of(model)), 0.3)
    state = model.state_dict()
    pointers = [t.data_ptr() for name, t in state.items() if ".factors." in name]
    assert len(pointers) == len(set(pointers)) > 0
    assert {name for name, _ in model.named_parameters(remove_duplicate=False)} == {n for n, _ in model.named_parameters()}
    y = logits(model)
    other = add(llama().eval())
    for assign in (False, True):
        other.load_state_dict(state, assign=assign)
        assert torch.equal(logits(other), y)
    for key in state:
        with pytest.raises(RuntimeError, match="Missing key"):
            other.load_state_dict({k: t for k, t in state.items() if k != key})
        break
    trained = list(lora_parameters(model))
    for duplicate in DUPLICATES:
        twin = duplicate(model)
        assert torch.equal(logits(twin), y)
        assert len(list(lora_parameters(twin))) == len(trained) == len(list(twin.parameters())) - frozen(twin)
        randomised(nn.ModuleList(lora_parameters_of(twin)), 0.3)
        assert not torch.equal(logits(twin), y) and torch.equal(logits(model), y)
    model.double()
    assert logits(model).dtype == torch.float64
    torch.testing.assert_close(logits(model).float(), y, rtol=1e-3, atol=1e-3)


def frozen(model):
    return sum(not p.requires_grad for p in model.parameters())


def test_a_model_of_conv1d_learns_with_mixed_selections():
    """Factors that depend on x, through a whole model and its loss; there is nothing to merge or to export."""
    model = with_mixlora(gpt2())
    optimizer = torch.optim.Adam(lora_parameters(model), lr=3e-2)
    losses = []
    for _ in range(12):
        loss = model(tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
    before = snapshot(model)
    for forbidden in (merge_lora, merge_and_unload, factors_to_lora):
        with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn\.c_attn: x must be"):
            forbidden(model)
        assert_untouched(model, before)


@pytest.mark.parametrize("add", [with_vera, with_tied, with_bank, with_one_provider])
def test_exports_a_plain_adapter(add, tmp_path):
    model = add(llama().eval())
    plain = copy.deepcopy(model)
    remove_lora(plain)
    randomised(nn.ModuleList(lora_parameters_of(model)), 0.3)
    y, names = logits(model), layers_of(model).keys()
    assert factors_to_lora(model) is model
    assert {name for name, _ in lora_layers(model)} == set(names)
    assert all(type(layer) is FusedLoraLinear for _, layer in lora_layers(model))
    torch.testing.assert_close(logits(model), y, rtol=1e-4, atol=1e-4)
    save_adapter(model, tmp_path)
    load_adapter(plain, tmp_path)
    torch.testing.assert_close(logits(plain.eval()), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda linear, shared: factors.vera(linear, shared),
        lambda linear, shared: factors.MixLora(linear, 4, 2),
        lambda linear, shared: factors.Nola(linear, 3, bases=8),
    ],
    ids=["vera", "mixlora", "nola"],
)
def test_compiles_in_one_graph(make):
    shared = factors.Pair.seeded(16, 16, 3)
    model = add_factors(
        nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)), lambda name, linear: make(linear, shared)
    )
    randomised(nn.ModuleList(lora_parameters_of(model)), 0.3)
    compiled, x = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randn(2, 5, 12)
    results = []
    for m in (model, compiled):
        y = m(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), list(lora_parameters(model)), allow_unused=True)))
    for ours, theirs in zip(*results, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


def test_every_fold():
    """Gate, core and B's scale in one provider, of different ranks and scalings by layer."""
    model = Mlp().double()

    def make(name, linear):
        N, K = factors.shape_of(linear)
        r = 2 + len(name) % 3
        pair = factors.Pair(torch.randn(r, K), torch.randn(N, r))
        return factors.Gated(pair, gate=torch.randn(r), core=torch.randn(r, r), B_scale=torch.randn(N))

    add_factors(model, make, scaling=0.1, lora_dropout=0.25)
    layers_of(model)["first"].scaling = 0.3
    model.eval()
    x = torch.randn(5, 12, dtype=torch.float64)
    y = model(x)
    ranks = {name: len(layer.plain_factors()[0]) for name, layer in layers_of(model).items()}
    factors_to_lora(model, "mine")
    torch.testing.assert_close(model(x), y, rtol=1e-11, atol=1e-11)
    found = dict(lora_layers(model))
    assert {name: layer.r["mine"] for name, layer in found.items()} == ranks and len(set(ranks.values())) > 1
    assert all(layer.lora_dropout["mine"] == 0.25 for layer in found.values())


def test_an_output_scale_is_merged_and_not_exported():
    model = with_ia3(llama().eval())
    randomised(nn.ModuleList(lora_parameters_of(model)), 0.5)
    before, y = snapshot(model), logits(model)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: factors must not scale the output"):
        factors_to_lora(model)
    assert_untouched(model, before)
    merge_and_unload(model)
    assert not layers_of(model)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    torch.testing.assert_close(logits(model), y, rtol=1e-4, atol=1e-4)


def fails_at_last(name, linear):
    if name == "last":
        raise ValueError("no")
    return factors.ia3(linear)


@pytest.mark.parametrize(
    ("make", "options", "kind", "message"),
    [
        (fails_at_last, {}, ValueError, "last: no; the model was left untouched"),
        (lambda name, linear: factors.gated(linear, 0), {}, ValueError, "first: r must be an integer >= 1, got 0"),
        (lambda name, linear: None, {}, TypeError, "first: factors must be an nn.Module"),
        (lambda name, linear: factors.ia3(linear), {"target_modules": "nowhere"}, ValueError, "matches nothing in the model"),
        (lambda name, linear: factors.ia3(linear), {"target_modules": ["norm"]}, TypeError, "takes in norm, a LayerNorm"),
        (lambda name, linear: factors.ia3(linear), {"scaling": "1"}, ValueError, "scaling must be a finite number"),
        (lambda name, linear: factors.ia3(linear), {"lora_dropout": -0.1}, ValueError, "lora_dropout must be"),
        (lambda name, linear: factors.ia3(linear), {"quant": "nf5"}, ValueError, "quant must be"),
        ("ia3", {}, TypeError, "make must be a function of a name and a layer, got str"),
    ],
)
def test_refuses_and_leaves_the_model(make, options, kind, message):
    model = Mlp()
    model.first.weight.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(kind, match=message):
        add_factors(model, make, **options)
    assert_untouched(model, before)


def test_one_at_a_time():
    model = with_ia3(llama())
    before = snapshot(model)
    for again in (with_ia3, lambda model: add_lora(model, LoraConfig(target_modules="all-linear"))):
        with pytest.raises(ValueError, match="model already has LoRA: the update of Gated"):
            again(model)
        assert_untouched(model, before)
    with pytest.raises(ValueError, match="model has no FactoredLinear"):
        factors_to_lora(llama())
    with pytest.raises(TypeError, match="cannot be replaced in place"):
        with_ia3(nn.Linear(3, 4))


def test_quantised_on_the_way():
    model = llama().eval()
    add_factors(model, lambda name, linear: factors.gated(linear, 4), quant="nf4")
    assert all(layer.weight.quant_type == "nf4" for layer in layers_of(model).values())
    randomised(nn.ModuleList(lora_parameters_of(model)), 0.3)
    y = logits(model)
    factors_to_lora(model)
    torch.testing.assert_close(logits(model), y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [name for name, m in methods().items() if m.code.__module__.startswith("lora_ops.factors")])
def test_a_method_s_line_runs_and_its_test_is_there(name):
    method = methods()[name]
    import lora_ops

    linear = nn.Linear(32, 16)
    layer = eval(method.use, {**vars(lora_ops), "torch": torch, "linear": linear})
    assert layer(torch.randn(2, 3, 32)).shape == (2, 3, 16)
    file, test = method.test.split("::")
    from pathlib import Path

    assert f"def {test}(" in (Path(__file__).parent / file).read_text()
