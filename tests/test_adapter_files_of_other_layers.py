"""Files of adapters of embeddings and convolutions, and of modules trained as a whole: PEFT's, in both directions."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from reader import inputs, reader
from safetensors.torch import load_file
from test_adapter_files import CONFIG, WEIGHTS, assert_same_tensors, config_with, put, read, tensors_with
from tiny_models import assert_as_exact, assert_untouched, llama, snapshot, tokens
from torch import Tensor, nn

import lora_ops
from lora_ops import LoraConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(share a weight|tied layer is part|save_embedding_layers|groups > 1|embedding layer|weight-tying).*"
)


def tied() -> nn.Module:
    torch.manual_seed(0)
    return llama(tie_word_embeddings=True)


def untied() -> nn.Module:
    torch.manual_seed(0)
    return llama()


CASES: dict[str, tuple[Callable[[], nn.Module], dict]] = {
    "embedding": (reader, {"target_modules": ["words"]}),
    "convolutions": (reader, {"target_modules": ["patches", "mix.0", "mix.2", "in_groups"]}),
    "all layers, ranks": (
        reader,
        {"target_modules": ["patches", "words", "mix.0", "proj"], "rank_pattern": {"words": 2, "mix.0": 7}, "use_rslora": True},
    ),
    "biases": (reader, {"target_modules": ["patches", "words", "proj"], "bias": "lora_only"}),
    "whole modules": (reader, {"target_modules": ["patches", "words"], "modules_to_save": ["norm", "proj"]}),
    "whole modules, all biases": (reader, {"target_modules": ["patches"], "modules_to_save": ["norm", "proj"], "bias": "all"}),
    "whole modules, all linear": (untied, {"target_modules": "all-linear", "modules_to_save": ["lm_head", "norm"]}),
    "names that match nothing": (untied, {"target_modules": ["q_proj"], "modules_to_save": ["classifier", "lm_head", "score"]}),
    "blocks": (untied, {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "embed_tokens": (untied, {"target_modules": ["embed_tokens", "q_proj"]}),
    "both ends": (untied, {"target_modules": ["embed_tokens", "lm_head"]}),
    "both ends, tied": (tied, {"target_modules": ["embed_tokens", "lm_head"]}),
    "embed_tokens, tied": (tied, {"target_modules": ["embed_tokens"]}),
    "by its whole name": (untied, {"target_modules": ["model.embed_tokens"]}),
    "by a regular expression": (untied, {"target_modules": r".*(embed_tokens|lm_head|0.*q_proj)"}),
    "an embedding as a whole": (untied, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
}  # fmt: skip
every_case = pytest.mark.parametrize(("make", "fields"), CASES.values(), ids=CASES)


def options_of(fields: dict) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **fields}


def shaken(model: nn.Module) -> nn.Module:
    """What trains, and what counts, has numbers of its own."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
        for name, t in model.named_buffers():
            if "num_batches" in name and "modules_to_save" in name:
                t.fill_(17)
    return model


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if "lora_" in name or "modules_to_save" in name}


@every_case
def test_from_peft_and_back(tmp_path: Path, make: Callable[[], nn.Module], fields: dict) -> None:
    theirs = shaken(peft.get_peft_model(make(), peft.LoraConfig(**options_of(fields))))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lora_ops.load_adapter(make(), tmp_path / "theirs")
    lora_ops.save_adapter(ours, tmp_path / "ours")
    written, of_peft = (read(tmp_path / side)[1] for side in ("ours", "theirs"))
    assert_same_tensors(of_peft, written)
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    assert_same_tensors(adapter_state(theirs), adapter_state(again))
    x, wide = (inputs(), inputs(torch.float64)) if make is reader else (tokens(), tokens())
    results = [m.eval()(x) for m in (ours, theirs)] + [theirs.double()(wide)]
    assert_as_exact([[getattr(y, "logits", y) for y in results]])


@every_case
def test_to_peft_and_back(tmp_path: Path, make: Callable[[], nn.Module], fields: dict) -> None:
    ours = shaken(lora_ops.add_lora(make(), LoraConfig(**options_of(fields))))
    lora_ops.save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    written, of_peft = (read(tmp_path / side)[1] for side in ("ours", "theirs"))
    assert_same_tensors(written, of_peft)
    again = lora_ops.load_adapter(make(), tmp_path / "theirs")
    assert_same_tensors(dict(ours.state_dict()), dict(again.state_dict()))
    fresh = lora_ops.add_lora(make(), LoraConfig(**options_of(fields)))
    lora_ops.load_adapter(fresh, tmp_path / "ours")
    assert_same_tensors(dict(ours.state_dict()), dict(fresh.state_dict()))


@every_case
def test_configuration(tmp_path: Path, make: Callable[[], nn.Module], fields: dict) -> None:
    """What the user said is what is written, where PEFT writes it and it says the same."""
    peft.get_peft_model(make(), peft.LoraConfig(**options_of(fields))).save_pretrained(tmp_path / "theirs")
    lora_ops.save_adapter(lora_ops.add_lora(make(), LoraConfig(**options_of(fields))), tmp_path / "ours")
    theirs, ours = (read(tmp_path / name)[0] for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert ours["modules_to_save"] == theirs["modules_to_save"]
    if isinstance(fields["target_modules"], list) and "layers_to_transform" not in fields:
        assert sorted(theirs["target_modules"]) == ours["target_modules"]


def test_base_weights_of_embeddings(tmp_path: Path) -> None:
    """What PEFT saves with save_embedding_layers, and that it is read."""
    for fields in (
        {"target_modules": ["q_proj"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["model.embed_tokens"]},
    ):
        theirs = peft.get_peft_model(untied(), peft.LoraConfig(**options_of(fields)))
        ours = lora_ops.add_lora(untied(), LoraConfig(**options_of(fields)))
        for p in (theirs.get_input_embeddings().weight, ours.get_input_embeddings().weight):
            p.data += 1
        for save in (True, False, "auto"):
            if save is True and fields["target_modules"] == ["model.embed_tokens"]:
                continue  # PEFT writes an embedding that has an adapter under a name that it does not find again
            theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=save)
            lora_ops.save_adapter(ours, tmp_path / "ours", save_embedding_layers=save)
            of_peft, written = (load_file(tmp_path / side / WEIGHTS) for side in ("theirs", "ours"))
            assert of_peft.keys() == written.keys(), (fields, save)
            fresh = lora_ops.load_adapter(untied(), tmp_path / "ours")
            weight = fresh.get_input_embeddings().weight
            assert torch.equal(weight, ours.get_input_embeddings().weight) == any(
                "embed" in key and "lora" not in key for key in written
            )
    with pytest.raises(ValueError, match=r'save_embedding_layers must be True, False or "auto", got None'):
        lora_ops.save_adapter(ours, tmp_path / "none", save_embedding_layers=None)
    assert not (tmp_path / "none").exists()


def test_a_resized_vocabulary_is_saved(tmp_path: Path) -> None:
    base = untied()
    base.save_pretrained(tmp_path / "base")

    def resized() -> nn.Module:
        model = type(base).from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(100, mean_resizing=False)
        return model

    first = resized()
    theirs = peft.get_peft_model(copy.deepcopy(first), peft.LoraConfig(**options_of({"target_modules": ["q_proj"]})))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lora_ops.load_adapter(resized(), tmp_path / "theirs")
    assert torch.equal(ours.lm_head.weight, first.lm_head.weight)
    lora_ops.save_adapter(ours, tmp_path / "ours")
    assert_same_tensors(load_file(tmp_path / "theirs" / WEIGHTS), load_file(tmp_path / "ours" / WEIGHTS))
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "ours" / WEIGHTS)
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"lm_head.weight must have shape \(96, 32\), got \(100, 32\)"):
        lora_ops.load_adapter(base, tmp_path / "ours")
    assert_untouched(base, before)


def test_merged_layers_are_saved_unmerged(tmp_path: Path) -> None:
    ours = lora_ops.add_lora(untied(), LoraConfig(**options_of({"target_modules": ["embed_tokens"]})))
    lora_ops.save_adapter(ours, tmp_path / "before")
    lora_ops.merge_lora(ours)
    lora_ops.save_adapter(ours, tmp_path / "after")
    assert_same_tensors(load_file(tmp_path / "before" / WEIGHTS), load_file(tmp_path / "after" / WEIGHTS))


def test_several_adapters(tmp_path: Path) -> None:
    """Each has its whole modules in a folder of its own; a model with one gets another."""
    first, second = (
        {"target_modules": ["words", "patches"], "modules_to_save": names} for names in (["norm"], ["proj", "norm"])
    )
    model = shaken(lora_ops.add_lora(reader(), LoraConfig(**options_of(first))))
    lora_ops.add_adapter(model, LoraConfig(**options_of({**second, "r": 2})), "second")
    lora_ops.set_adapter(model, "second")
    shaken(model)
    for name in ("default", "second"):
        lora_ops.save_adapter(model, tmp_path, name)
    assert read(tmp_path)[0]["modules_to_save"] == ["norm"]
    assert read(tmp_path / "second")[0]["modules_to_save"] == ["norm", "proj"]
    fresh = lora_ops.load_adapter(reader(), tmp_path)
    lora_ops.load_adapter(fresh, tmp_path / "second", "second")
    lora_ops.set_adapter(fresh, "second")
    assert_same_tensors(dict(model.state_dict()), dict(fresh.state_dict()))
    assert torch.equal(fresh.eval()(inputs()), model.eval()(inputs()))
    theirs = peft.PeftModel.from_pretrained(reader(), tmp_path)
    theirs.load_adapter(tmp_path / "second", "second")
    theirs.set_adapter("second")
    theirs.save_pretrained(tmp_path / "again")
    assert_same_tensors(load_file(tmp_path / "second" / WEIGHTS), load_file(tmp_path / "again" / "second" / WEIGHTS))


def test_another_adapter_s_copy_is_left_alone(tmp_path: Path) -> None:
    fields = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    for factor, name in enumerate(("default", "second"), start=1):
        model = shaken(lora_ops.add_lora(untied(), LoraConfig(**options_of(fields)), name))
        for p in lora_ops.lora_parameters(model):
            p.data *= factor
        lora_ops.save_adapter(model, tmp_path, name)
    model = lora_ops.load_adapter(untied(), tmp_path)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    lora_ops.load_adapter(model, tmp_path / "second", "second")
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in before.items())


def test_an_adapter_without_the_other_one_s_whole_modules(tmp_path: Path) -> None:
    """Its file names the layers that it has, which the other one's `modules_to_save` has kept from others."""
    model = lora_ops.add_lora(
        reader(), LoraConfig(**options_of({"target_modules": ["proj", "mix.0"], "modules_to_save": ["mix"]}))
    )
    lora_ops.add_adapter(model, LoraConfig(**options_of({})), "second")
    for name, targets in (("default", ["mix.0", "proj"]), ("second", ["proj"])):
        lora_ops.save_adapter(model, tmp_path, name)
        theirs = peft.PeftModel.from_pretrained(reader(), tmp_path if name == "default" else tmp_path / name)
        assert theirs.base_model.targeted_module_names == ["proj"]
        assert read(tmp_path if name == "default" else tmp_path / name)[0]["target_modules"] == targets


def test_an_output_layer_in_4_bits(tmp_path: Path) -> None:
    """Its base weight is not saved."""
    config = LoraConfig(**options_of({"target_modules": ["lm_head", "embed_tokens"]}))
    model = lora_ops.add_lora(untied(), config, quant="nf4")
    lora_ops.save_adapter(model, tmp_path)
    written = load_file(tmp_path / WEIGHTS)
    assert [name for name in written if "base_layer" in name] == ["base_model.model.model.embed_tokens.base_layer.weight"]
    again = lora_ops.load_adapter(lora_ops.add_lora(untied(), config, quant="nf4"), tmp_path)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


# --- what is damaged or does not fit ------------------------------------------------------------------------------------


P = "base_model.model."
DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "an embedding's A is missing": (
        tensors_with(lambda tensors: tensors.pop(f"{P}words.lora_embedding_A")), "lacks base_model.model.words.lora_embedding_A"
    ),
    "an embedding as if linear": (
        put(f"{P}words.lora_A.weight", torch.ones(4, 20)), "has base_model.model.words.lora_A.weight, which"
    ),
    "another vocabulary": (
        put(f"{P}words.lora_embedding_A", torch.ones(4, 21)), r"words.lora_embedding_A must have shape \(4, 20\), got \(4, 21\)"
    ),
    "another kernel": (
        put(f"{P}patches.lora_A.weight", torch.ones(4, 3, 3, 4)), r"patches.lora_A.weight must have shape \(4, 3, 4, 4\)"
    ),
    "B as a matrix": (
        put(f"{P}patches.lora_B.weight", torch.ones(16, 4)), r"patches.lora_B.weight must have shape \(16, 4, 1, 1\)"
    ),
    "NaN in a convolution": (
        put(f"{P}patches.lora_B.weight", torch.full((16, 4, 1, 1), float("nan"))), "lora_B.weight has values that are not"
    ),
    "a whole module's weight is missing": (
        tensors_with(lambda tensors: tensors.pop(f"{P}proj.weight")), "lacks base_model.model.proj.weight"
    ),
    "a whole module's shape": (put(f"{P}proj.weight", torch.ones(16, 15)), r"proj.weight must have shape \(16, 16\)"),
    "a whole module's NaN": (put(f"{P}proj.bias", torch.full((16,), float("nan"))), "proj.bias has values that are not finite"),
    "a whole module in integers": (put(f"{P}proj.bias", torch.ones(16, dtype=torch.int64)), "proj.bias must be float32"),
    "a counter in fp32": (put(f"{P}norm.num_batches_tracked", torch.tensor(1.0)), "num_batches_tracked must be torch.int64"),
    "another whole module": (config_with(modules_to_save=["norm"]), "has base_model.model.proj.bias, which"),
    "a whole module that is a layer": (config_with(modules_to_save=["norm", "atches"]), "modules_to_save takes in patches"),
    "a whole module without a forward": (config_with(modules_to_save=["norm", "many"]), "many, a ModuleList, which has no"),
    "whole modules are no list": (config_with(modules_to_save="norm"), "modules_to_save must be a list"),
    "blocks of a regular expression": (
        config_with(target_modules="words|patches", layers_to_transform=1), "layers_to_transform must be None"
    ),
    "a rank that is no multiple of groups": (
        config_with(target_modules=["words", "patches", "in_groups"], r=3), "in_groups: r must be a multiple of the convolution"
    ),
    "ends that were tied": (
        config_with(target_modules=["words", "lm_head"], ensure_weight_tying=True), "ensure_weight_tying is True for"
    ),
}  # fmt: skip


@pytest.mark.parametrize("with_layers", [False, True], ids=["plain model", "model with LoRA"])
@pytest.mark.parametrize(("damage", "words"), DAMAGED.values(), ids=DAMAGED)
def test_what_is_damaged_is_refused_whole(
    tmp_path: Path, damage: Callable[[Path], None], words: str, with_layers: bool
) -> None:
    config = LoraConfig(**options_of({"target_modules": ["words", "patches"], "modules_to_save": ["norm", "proj"]}))
    lora_ops.save_adapter(lora_ops.add_lora(reader(), config), tmp_path)
    damage(tmp_path)
    model = lora_ops.add_lora(reader(), config) if with_layers else reader()
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        lora_ops.load_adapter(model, tmp_path)
    assert_untouched(model, before)


def test_whole_modules_that_differ(tmp_path: Path) -> None:
    fields = {"target_modules": ["words", "patches"]}
    lora_ops.save_adapter(
        lora_ops.add_lora(reader(), LoraConfig(**options_of({**fields, "modules_to_save": ["norm"]}))), tmp_path
    )
    model = lora_ops.add_lora(reader(), LoraConfig(**options_of(fields)))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r'modules_to_save is not what the model\'s adapter "default" has'):
        lora_ops.load_adapter(model, tmp_path)
    assert_untouched(model, before)


def test_a_tied_adapter_of_peft_s(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(
        tied(), peft.LoraConfig(**options_of({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}))
    )
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["ensure_weight_tying"]
    with pytest.raises(ValueError, match="ensure_weight_tying is True for an embedding, which is not supported"):
        lora_ops.load_adapter(tied(), tmp_path)
