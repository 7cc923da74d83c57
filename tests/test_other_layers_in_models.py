"""`add_lora` over embeddings, convolutions, some of a model's blocks, and modules that are trained as a whole, beside PEFT."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.other import ModulesToSaveWrapper as PeftWrapper
from reader import Reader, inputs, pair, reader
from tiny_models import Mlp, assert_as_exact, assert_untouched, gpt2, llama, snapshot, tokens, with_peft
from torch import nn

import lora_ops
from lora_ops import (
    FusedLoraConv1d,
    FusedLoraConv2d,
    FusedLoraEmbedding,
    FusedLoraLinear,
    LoraConfig,
    ModulesToSaveWrapper,
    add_lora,
    lora_layers,
    lora_parameters,
    merge_and_unload,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from lora_ops.adapters.kinds import from_layer

# What both say of tied weights, fan_in_fan_out and groups.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(share a weight|tied layer is part|fan_in_fan_out|groups > 1|not tied any more|no longer tied|weight-tying).*"
)


TARGETS: list[tuple[Any, dict]] = [
    (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    (llama, {"target_modules": r".*(embed_tokens|1.*down_proj)"}),
    (gpt2, {"target_modules": ["wte", "wpe", "c_attn"]}),
    (Reader, {"target_modules": "all-linear"}),
    (Reader, {"target_modules": ["patches", "words", "mix.0", "mix.2", "in_groups", "proj"]}),
    (Reader, {"target_modules": r"mix\.\d|words", "exclude_modules": ["mix.1"]}),
    (llama, {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
    (llama, {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 0}),
    (llama, {"target_modules": ["q_proj"], "layers_to_transform": []}),
    (llama, {"target_modules": ["q_proj"], "layers_to_transform": [0, 7], "layers_pattern": "layers"}),
    (llama, {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]}),
    (llama, {"target_modules": ["q_proj", "embed_tokens", "model.layers.1.mlp.up_proj"], "layers_to_transform": [0]}),
    (llama, {"layers_to_transform": [1]}),
    (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": r"(h|(lay|play)ers)"}),
    (gpt2, {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"}),
    (Mlp, {"target_modules": ["0", "2", "first"], "layers_to_transform": [0]}),
    (llama, {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}),
    (llama, {"target_modules": "all-linear", "modules_to_save": ["mlp"]}),
    (llama, {"target_modules": ["q_proj"], "modules_to_save": ["norm", "score"]}),
    (llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "head"]}),
    (Reader, {"target_modules": ["proj", "mix.0"], "modules_to_save": ["norm", "patches"]}),
    (Reader, {"target_modules": ["proj"], "modules_to_save": ["norm", "patches"], "bias": "all"}),
    (Mlp, {"target_modules": "all-linear", "modules_to_save": ["block"]}),
]


def whole(model: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, kind)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "fields"), TARGETS, ids=[f"{make.__name__}-{fields}" for make, fields in TARGETS])
def test_targets_what_peft_targets(make, fields: dict) -> None:
    config = LoraConfig(**{"r": 4, **fields})
    model = make()
    try:
        theirs = with_peft(copy.deepcopy(model), config).base_model
    except ValueError:  # nothing is targeted
        with pytest.raises(ValueError, match=r"target_modules=.* matches nothing in the model with layers_to_transform"):
            add_lora(model, config)
        return
    assert add_lora(model, config) is model
    assert {name for name, _ in lora_layers(model)} == set(theirs.targeted_module_names)
    assert whole(model, ModulesToSaveWrapper) == whole(theirs.model, PeftWrapper)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    of_peft = {name for name, p in theirs.model.named_parameters() if p.requires_grad}
    assert trained == {name.replace(".base_layer", "").removesuffix(".weight" * ("lora_" in name)) for name in of_peft}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients_are_peft_s(dtype: torch.dtype) -> None:
    model, theirs = pair(dtype=dtype)
    wide = copy.deepcopy(theirs).double()
    assert {type(layer) for _, layer in lora_layers(model)} == {
        FusedLoraConv1d, FusedLoraConv2d, FusedLoraEmbedding, FusedLoraLinear
    }  # fmt: skip
    results, grads = [], []
    for m, kind in ((model, dtype), (theirs, dtype), (wide, torch.float64)):
        y = m(inputs(kind))
        y.double().square().sum().backward()
        results.append(y)
        parts = m.base_model.model if hasattr(m, "base_model") else m
        names = {n.replace(".base_layer", "").removesuffix(".weight" * ("lora_" in n)): p for n, p in parts.named_parameters()}
        grads.append({name: p.grad for name, p in names.items() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    assert_as_exact([results])
    assert_as_exact([[g[name] for g in grads] for name in grads[0]])


def test_parameters_that_train() -> None:
    model, _ = pair()
    expected = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(list(lora_parameters(model))) == len(expected)
    assert {id(p) for p in lora_parameters(model)} == {id(p) for p in model.parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in expected} == {"patches", "words", "mix", "proj", "norm", "in_groups"}
    assert model.in_groups.weight is model.in_groups.modules_to_save["default"].weight
    assert not model.in_groups.original_module.weight.requires_grad


def test_merging_and_removing_bit_for_bit() -> None:
    model, _ = pair()
    model.eval()
    before, state = model(inputs()), {name: t.clone() for name, t in model.state_dict().items()}
    wide = copy.deepcopy(model).double()
    exact = wide(inputs(torch.float64))
    assert_as_exact([(merge_lora(wide)(inputs(torch.float64)).float(), before, exact)])
    merge_lora(model)
    assert model.head.weight is model.words.unmerged_weight
    assert not torch.equal(model(inputs()), before)
    unmerge_lora(model)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert torch.equal(model(inputs()), before)
    fresh = reader().eval()
    merge_lora(model)
    remove_lora(model)
    assert [(name, type(m)) for name, m in model.named_modules()] == [(name, type(m)) for name, m in fresh.named_modules()]
    assert model.state_dict().keys() == fresh.state_dict().keys()
    assert all(torch.equal(t, fresh.state_dict()[name]) for name, t in model.state_dict().items())
    assert model.head.weight is model.words.weight
    assert torch.equal(model(inputs()), fresh(inputs()))
    assert all(p.requires_grad for p in model.parameters())


def test_merge_and_unload() -> None:
    """A plain model; the head that was tied to the words keeps the words as they were, unlike in PEFT."""
    model, _ = pair()
    model.eval()
    W0, before, wide = model.words.weight.clone(), model(inputs()), copy.deepcopy(model).double()
    exact = wide(inputs(torch.float64))
    assert_as_exact([(merge_and_unload(wide)(inputs(torch.float64)).float(), before, exact)])
    merge_and_unload(model)
    assert [(name, type(m)) for name, m in model.named_modules()] == [(name, type(m)) for name, m in reader().named_modules()]
    assert torch.equal(model.head.weight, W0)
    assert not torch.equal(model.words.weight, W0)
    model(inputs()).sum().backward()


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"], ["q_proj"]], ids=str)
def test_tied_ends(targets: list[str]) -> None:
    """Whatever of two tied layers has an adapter, the other one, and the model's configuration, are right after merging."""
    model, theirs = pair({"target_modules": targets}, make=lambda: llama(tie_word_embeddings=True))
    exact, expected = copy.deepcopy(theirs).double()(tokens()).logits, theirs(tokens()).logits
    assert_as_exact([(model(tokens()).logits, expected, exact)])
    wide = copy.deepcopy(model).double()
    merged = merge_and_unload(model)
    untied = targets != ["q_proj"]
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) != untied
    assert merged.config.tie_word_embeddings != untied
    y = merged(tokens()).logits
    merged.tie_weights()
    assert torch.equal(merged(tokens()).logits, y)
    assert_as_exact([(merge_and_unload(wide)(tokens()).logits.float(), expected, exact)])


def test_a_part_that_is_tied() -> None:
    model = nn.ModuleList([llama(tie_word_embeddings=True)])
    add_lora(model[0], LoraConfig(target_modules=["embed_tokens"]))
    with pytest.warns(UserWarning, match="not tied any more: tie_word_embeddings is now False"):
        merge_and_unload(model)
    assert not model[0].config.tie_word_embeddings


def test_tied_weights_are_spoken_of() -> None:
    with pytest.warns(UserWarning, match=r"words and head share a weight\. Each keeps it, merged or not"):
        add_lora(reader(), LoraConfig(target_modules=["words"]))
    with pytest.warns(UserWarning, match="words and head share a weight"):
        add_lora(reader(), LoraConfig(target_modules=["proj"], modules_to_save=["head"]))


# --- what is refused --------------------------------------------------------------------------------------------------


Q = ["q_proj"]
REFUSED: dict[str, tuple[dict, type[Exception], str]] = {
    "a container": (
        {"target_modules": ["lm_head"], "modules_to_save": ["ers"]},
        TypeError,
        "layers, a ModuleList, which has no",
    ),
    "one in another": ({"target_modules": Q, "modules_to_save": ["mlp", "up_proj"]}, ValueError, "up_proj, a part of it"),
    "a layer with an adapter": (
        {"target_modules": Q, "modules_to_save": ["_proj"]},
        ValueError,
        "takes in .*q_proj, and .*q_proj",
    ),
    "no list": ({"modules_to_save": "lm_head"}, TypeError, "modules_to_save must be a list of module names or None, got 'lm_h"),
    "no name": ({"modules_to_save": [""]}, TypeError, "modules_to_save must be a list of module names"),
    "no index": ({"layers_to_transform": "1"}, TypeError, "layers_to_transform must be an index, a list of indices or None"),
    "below zero": ({"layers_to_transform": [-1]}, TypeError, r"a list of indices or None, got \[-1\]"),
    "beside a regex": (
        {"target_modules": ".*q_proj", "layers_to_transform": 1},
        ValueError,
        "layers_to_transform must be None",
    ),
    "pattern beside a regex": ({"target_modules": "x", "layers_pattern": "h"}, ValueError, "layers_pattern must be None where"),
    "pattern alone": ({"target_modules": Q, "layers_pattern": "h"}, ValueError, "needs layers_to_transform, which is None"),
    "no regex": ({"layers_to_transform": 1, "layers_pattern": "("}, ValueError, "layers_pattern must be a regular expression"),
    "no such index": ({"target_modules": Q, "layers_to_transform": 9}, ValueError, "in the model with layers_to_transform=9"),
    "everything saved": (
        {"target_modules": Q, "modules_to_save": ["self_attn"]},
        ValueError,
        "what modules_to_save=.* takes away",
    ),
}


@pytest.mark.parametrize(("fields", "kind", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(fields: dict, kind: type[Exception], words: str) -> None:
    model = llama()
    before = snapshot(model)
    with pytest.raises(kind, match=words):
        add_lora(model, LoraConfig(**fields))
    assert_untouched(model, before)


def test_groups_that_do_not_fit() -> None:
    model = reader()
    before = snapshot(model)
    with pytest.raises(
        ValueError, match="in_groups: r must be a multiple of the convolution's groups, 2, got 3; the model was"
    ):
        add_lora(model, LoraConfig(r=3, target_modules=["words", "in_groups", "proj"]))
    assert_untouched(model, before)
    add_lora(model, LoraConfig(r=4, target_modules=["words", "in_groups", "proj"], init_lora_weights=False))
    before = snapshot(model)
    with pytest.raises(ValueError, match="r must be a multiple of the convolution's groups, 2, got 3"):
        lora_ops.add_adapter(model, LoraConfig(r=3), "second")
    for change in (merge_lora, merge_and_unload):
        with pytest.raises(ValueError, match="in_groups: groups must be 1 for adapters to be merged, got 2"):
            change(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("variant", ["use_dora", "lora_bias"])
def test_variants_are_of_linear_layers(variant: str, tmp_path: Path) -> None:
    words = f"{variant} must be False for an embedding or a convolution, got True"
    for target in ("words", "patches"):
        model, config = reader(), LoraConfig(target_modules=["proj", target])
        before = snapshot(model)
        with pytest.raises(ValueError, match=f"{target}: {words}"):
            add_lora(model, LoraConfig(target_modules=["proj", target], **{variant: True}))
        assert_untouched(model, before)
        add_lora(model, config)
        before = snapshot(model)
        with pytest.raises(ValueError, match=words):
            lora_ops.add_adapter(model, LoraConfig(**{variant: True}), "second")
        with pytest.raises(ValueError, match=words):
            model.get_submodule(target).add_adapter("second", **{variant: True})
        lora_ops.save_adapter(model, tmp_path)
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {variant: True}))
        with pytest.raises(ValueError, match=f"{target}: {words}"):
            lora_ops.load_adapter(reader(), tmp_path)
        assert_untouched(model, before)
        with pytest.raises(ValueError, match=words):
            from_layer(getattr(reader(), target))(getattr(reader(), target), **{variant: True})


def test_names_that_match_nothing() -> None:
    with pytest.warns(UserWarning, match=r"modules_to_save=\['clasifier'\] matches nothing in the model"):
        add_lora(Mlp(), LoraConfig(target_modules=["first"], modules_to_save=["clasifier"]))
    model = nn.Sequential(nn.ConvTranspose1d(3, 4, 1), nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"takes in 0, a ConvTranspose1d, which is not supported: only nn\.Linear"):
        add_lora(model, LoraConfig(target_modules=["0"]))


def test_linear_layers_alone_are_quantised() -> None:
    model = reader()
    add_lora(model, LoraConfig(target_modules=["words", "patches", "proj"]), quant="nf4", prepack=False)
    kinds = {name: type(layer.weight).__name__ for name, layer in lora_layers(model)}
    assert kinds == {"words": "Parameter", "patches": "Parameter", "proj": "NF4Weight"}
    assert torch.isfinite(model(inputs())).all()
