"""Named adapters of a model that train layers of every kind, and modules as a whole."""

import copy
from typing import Any

import compare
import peft
import pytest
import torch
from reader import EVERYTHING, inputs, pair, reader
from tiny_models import assert_untouched, snapshot

import lora_ops
from lora_ops import LoraConfig, add_lora, lora_layers, lora_parameters, merge_and_unload, remove_lora

pytestmark = pytest.mark.filterwarnings("ignore:.*(share a weight|tied layer is part|groups > 1|weight-tying).*")


def two_adapters():
    """The second one trains another module than the first, and one that is the same."""
    model, theirs = pair()
    config = {**EVERYTHING, "r": 2, "init_lora_weights": False, "modules_to_save": ["norm"]}
    lora_ops.add_adapter(model, LoraConfig(**config), "second")
    theirs.add_adapter("second", peft.LoraConfig(**config))
    return model.eval(), theirs.eval()


def test_named_adapters() -> None:
    model, theirs = two_adapters()
    for name in ("second", "default"):
        lora_ops.set_adapter(model, name)
        theirs.set_adapter(name)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        of_peft = {n.replace(".base_layer", "") for n, p in theirs.base_model.model.named_parameters() if p.requires_grad}
        assert trained == {n.removesuffix(".weight" * ("lora_" in n)) for n in of_peft}
        assert model.norm.current is model.norm.modules_to_save[name]
    assert model.in_groups.current is model.in_groups.modules_to_save["default"]
    y = model(inputs())
    lora_ops.set_adapter(model, "second")
    assert model.in_groups.current is model.in_groups.original_module
    assert not torch.equal(model(inputs()), y)
    with lora_ops.disable_adapter(model):
        assert torch.equal(model(inputs()), reader().eval()(inputs()))
        assert model.norm.current is model.norm.original_module
    assert model.norm.current is model.norm.modules_to_save["second"]
    with pytest.raises(ValueError, match=r"one adapter at most that trains the same whole module, got \['default', 'second'\]"):
        lora_ops.set_adapter(model, ["default", "second"])
    assert {layer.active_adapter for _, layer in lora_layers(model)} == {"second"}
    lora_ops.delete_adapter(model, "second")
    assert list(model.norm.modules_to_save) == ["default"]
    lora_ops.set_adapter(model, "default")
    assert torch.equal(model(inputs()), y)
    merged = merge_and_unload(copy.deepcopy(model))
    assert torch.equal(merged.norm.weight, model.norm.modules_to_save["default"].weight)


def test_the_mode_is_kept() -> None:
    for training in (True, False):
        model = add_lora(reader().train(training), LoraConfig(r=4, **EVERYTHING))
        lora_ops.add_adapter(model, LoraConfig(r=4, **EVERYTHING), "second")
        assert {m.training for m in model.modules()} == {training}
        assert {m.training for m in remove_lora(model).modules()} == {training}


def test_a_whole_module_trains() -> None:
    model, _ = pair()
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
    W0, W = model.in_groups.original_module.weight.clone(), model.in_groups.weight.clone()
    model(inputs()).square().mean().backward()
    optimizer.step()
    assert torch.equal(model.in_groups.original_module.weight, W0)
    assert not torch.equal(model.in_groups.weight, W)
    copied = copy.deepcopy(model).eval()
    assert torch.equal(copied(inputs()), model.eval()(inputs()))


@pytest.mark.parametrize("combination_type", ["cat", "svd", "linear", "ties"])
def test_weighted_adapters(combination_type: str) -> None:
    """Over embeddings and convolutions, the sum of ΔW is PEFT's, or the exact one."""
    fields = {"target_modules": ["patches", "words", "mix.0", "mix.2"]}
    model, _ = pair(fields)
    lora_ops.add_adapter(model, LoraConfig(**fields, r=4, init_lora_weights=False), "second")
    options: dict[str, Any] = {"density": 1.0} if combination_type == "ties" else {}
    lora_ops.add_weighted_adapter(model, ["default", "second"], [0.5, 0.25], "both", combination_type, **options)
    for name, layer in lora_layers(model):
        assert layer.lora_A["both"].shape[1:] == layer.lora_A["default"].shape[1:], name
        if combination_type == "cat":
            wide = copy.deepcopy(layer).double()
            eager, exact = (0.5 * of.delta_weight("default") + 0.25 * of.delta_weight("second") for of in (layer, wide))
            assert compare.error(layer.delta_weight("both"), eager, exact).within_bound


def test_weighted_adapters_with_whole_modules_are_refused() -> None:
    model, _ = two_adapters()
    before = snapshot(model)
    with pytest.raises(ValueError, match="adapters must not train whole modules, got 'default', which trains in_groups"):
        lora_ops.add_weighted_adapter(model, ["default", "second"], [0.5, 0.5], "both", "cat")
    assert_untouched(model, before)
