"""Adapters with a weight of their own: whose weight a layer has, what is kept, saved and put back."""

import copy
import json

import peft
import pytest
import torch
from initialised import K, R, linear, nearness, product, started, with_peft
from safetensors.torch import load_file
from tiny_models import DUPLICATES, Mlp, assert_untouched, llama, snapshot, tokens
from torch import nn

import lora_ops
from lora_ops import FusedLoraLinear, LoraConfig, NF4Weight, lora_layers
from lora_ops.init import convert_to_plain_lora, initialize

OFFSETS = ["pissa", "pissa_niter_4", "milora", "olora", "offset", "loftq", "qpissa"]


def trained(layer: FusedLoraLinear | nn.Module) -> None:
    """As if it had been: B and A are others."""
    torch.manual_seed(1)
    for name, p in layer.named_parameters():
        if "lora_" in name:
            p.data += 0.1 * torch.randn_like(p)


@pytest.mark.parametrize("init", OFFSETS)
def test_the_weight_belongs_to_the_adapter(init: str) -> None:
    """A layer whose adapter is disabled, or another one's, has W0: not, as in PEFT, what is left of it."""
    base, x = linear(), torch.randn(9, K)
    W0, y0 = base.weight, base(x)
    value = W0.detach().clone()
    layer = started(init, base)
    y, own = layer(x), layer.weight
    assert own is not W0
    layer.disable_adapters()
    assert layer.weight is W0
    assert torch.equal(layer(x), y0)
    layer.enable_adapters()
    assert layer.weight is own
    assert torch.equal(layer(x), y)
    layer.add_adapter("second", 2)
    layer.set_adapter("second")
    assert nearness(layer(x), y0) < 1e-6
    layer.set_adapter(["second", "default"])
    assert nearness(layer(x), y) < 1e-6
    layer.add_adapter("third", 2, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="one adapter at most that has a weight of its own"):
        layer.set_adapter(["default", "third"])
    layer.set_adapter("third")
    assert nearness(layer(x), y0) < 1e-5
    layer.set_adapter("default")
    assert torch.equal(layer(x), y)
    layer.delete_adapter("default")
    assert layer.weight is W0
    assert torch.equal(W0, value)


@pytest.mark.parametrize("init", OFFSETS)
@pytest.mark.parametrize("disabled", [False, True])
def test_merge_and_unmerge(init: str, disabled: bool) -> None:
    base, x = linear(), torch.randn(9, K)
    layer = started(init, base)
    trained(layer)
    y = layer(x)
    if disabled:
        layer.disable_adapters()
    before = layer.weight
    layer.merge()
    assert nearness(layer(x), y) < 1e-5
    for refused in (layer.convert_to_plain_lora, lambda: layer.reset_lora_parameters("default", "olora")):
        with pytest.raises(RuntimeError, match="needs the layer unmerged"):
            refused()
    layer.unmerge()
    assert layer.weight is before
    layer.enable_adapters()
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("init", OFFSETS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_conversion_to_plain_lora(init: str, use_rslora: bool) -> None:
    base, x = linear(), torch.randn(9, K)
    layer = started(init, base, use_rslora=use_rslora)
    start = product(layer)
    scaling = layer.scaling["default"]
    trained(layer)
    y, change = layer(x), product(layer) - start
    lost = x @ (base.weight - layer.weight - start).T  # of the quantisers
    layer.convert_to_plain_lora()
    assert layer.weight is base.weight
    assert (layer.r["default"], layer.lora_A["default"].shape) == (2 * R, (2 * R, K))
    assert abs(layer.scaling["default"] - scaling) < 1e-12
    assert nearness(product(layer), change) < 1e-5
    assert nearness(layer(x), y + lost) < 1e-5
    assert (lost.norm() > 1e-3) == (init in ("loftq", "qpissa"))
    assert layer.lora_A["default"].requires_grad
    layer.convert_to_plain_lora()  # is one already
    assert layer.r["default"] == 2 * R


@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_duplicates_go_their_own_way(duplicate) -> None:
    x = torch.randn(9, K)
    layer = started("pissa")
    y = layer(x)
    other = duplicate(layer)
    trained(other)
    other.convert_to_plain_lora()
    assert torch.equal(layer(x), y)
    layer.disable_adapters()
    assert nearness(layer(x), y) < 1e-5


def test_casts_take_every_weight_along() -> None:
    layer = started("pissa").double()
    x = torch.randn(9, K).double()
    y = layer(x)
    layer.disable_adapters()
    assert layer.weight.dtype == torch.float64
    assert nearness(layer(x), y) < 1e-5
    layer.enable_adapters()
    layer.convert_to_plain_lora()
    assert layer.lora_A["default"].dtype == torch.float64


def test_a_state_dict_holds_the_weight_that_the_layer_has() -> None:
    layer, other = started("pissa"), started("pissa")
    trained(layer)
    assert layer.state_dict().keys() == started(True).state_dict().keys()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(9, K)
    assert torch.equal(other(x), layer(x))


def test_dora_starts_as_the_layer_too() -> None:
    base, x = linear(), torch.randn(9, K)
    layer = started("pissa", base, use_dora=True)
    assert nearness(layer(x), base(x)) < 1e-5
    assert nearness(layer.lora_magnitude_vector["default"], base.weight.norm(dim=1)) < 1e-6


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_a_model_gets_its_weights_back(quant: str | None) -> None:
    model = Mlp()
    x = torch.randn(5, 12)
    y, weight = model(x), model.first.weight
    value = weight.detach().clone()
    lora_ops.add_lora(model, LoraConfig(r=3, target_modules="all-linear", init_lora_weights="olora"), quant=quant)
    trained(model)
    with lora_ops.disable_adapter(model):
        assert (nearness(model(x), y) == 0) == (quant is None)
    lora_ops.remove_lora(model)
    assert torch.equal(weight, value)
    assert (model.first.weight is weight) == (quant is None)
    assert (nearness(model(x), y) == 0) == (quant is None)


def test_merge_and_unload_keeps_what_was_learnt() -> None:
    model, x = Mlp(), torch.randn(5, 12)
    lora_ops.add_lora(model, LoraConfig(r=3, target_modules="all-linear", init_lora_weights="pissa"))
    trained(model)
    y = model(x)
    lora_ops.merge_and_unload(model)
    assert not list(lora_layers(model))
    assert nearness(model(x), y) < 1e-5


def test_adapters_that_cannot_be_leave_the_model_as_it_was() -> None:
    model = lora_ops.add_lora(Mlp(), LoraConfig(r=3, target_modules="all-linear"))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"r must be at most min\(N, K\) = 4"):
        lora_ops.add_adapter(model, LoraConfig(r=5, init_lora_weights="pissa"), "second")
    with pytest.raises(ValueError, match=r"last: r must be at most min\(N, K\) = 4"):
        initialize(lora_ops.add_lora(Mlp(), LoraConfig(r=5, target_modules="all-linear")), "olora")
    assert_untouched(model, before)


def test_combinations_are_of_what_adapters_add_to_the_original_weight() -> None:
    model, x = nn.Sequential(linear()), torch.randn(9, K)
    y0 = model(x)
    lora_ops.add_lora(model, LoraConfig(r=R, target_modules=["0"], init_lora_weights="pissa"))
    trained(model)
    lora_ops.add_weighted_adapter(model, ["default"], [0.5], "other", "cat")
    y = model(x)
    lora_ops.set_adapter(model, "other")
    assert nearness(model(x) - y0, (y - y0) / 2) < 1e-5


# --- files --------------------------------------------------------------------------------------------------------------


def peft_of(base: nn.Module, directory) -> nn.Module:
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(directory))


def names(fields: dict) -> list[str]:
    """The modules' names in a model of one block."""
    return sorted(fields["target_modules"])


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4", "milora", "offset", "lora_ga"])
def test_files_give_the_same_outputs_here_and_in_peft(init: str, tmp_path) -> None:
    """Whether they say how the weight is to be made again, or are plain LoRA beside W0."""
    base = llama()
    ids = tokens()
    batch = {"input_ids": ids, "labels": ids}
    model = copy.deepcopy(base)
    config = LoraConfig(r=R, lora_alpha=6, target_modules="all-linear", init_lora_weights=True if init == "lora_ga" else init)
    lora_ops.add_lora(model, config)
    if init == "lora_ga":
        initialize(model, "lora_ga", [batch])
    trained(model)
    with torch.no_grad():
        y = model(input_ids=ids).logits
        lora_ops.save_adapter(model, tmp_path)
        fields = json.loads((tmp_path / "adapter_config.json").read_text())
        again = init in ("pissa", "olora")
        assert fields["init_lora_weights"] == (init if again else True)
        assert (fields["r"], fields["lora_alpha"]) == ((R, 6) if again else (2 * R, 12))
        assert nearness(model(input_ids=ids).logits, y) == 0
        loaded = lora_ops.load_adapter(copy.deepcopy(base), tmp_path)
        assert nearness(loaded(input_ids=ids).logits, y) < 1e-4
        assert nearness(peft_of(base, tmp_path)(input_ids=ids).logits, y) < 1e-4
        beside = lora_ops.add_lora(copy.deepcopy(base), LoraConfig(r=2, target_modules="all-linear"))
        lora_ops.load_adapter(beside, tmp_path, "second")
        lora_ops.set_adapter(beside, "second")
        assert nearness(beside(input_ids=ids).logits, y) < 1e-4
        converted = convert_to_plain_lora(copy.deepcopy(model))
        assert nearness(converted(input_ids=ids).logits, y) < 1e-4


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "gaussian"])
def test_peft_s_files_are_read(init: str, tmp_path) -> None:
    base, x = nn.Sequential(linear()), torch.randn(9, K)
    theirs = with_peft(base, init_lora_weights=init)
    trained(theirs)
    theirs.save_pretrained(str(tmp_path))
    model = lora_ops.load_adapter(copy.deepcopy(base), tmp_path)
    with torch.no_grad():
        assert nearness(model(x), theirs(x)) < 1e-5
        lora_ops.load_adapter(model, tmp_path)  # new numbers into the adapter that is there
        assert nearness(model(x), theirs(x)) < 1e-5


def test_a_file_for_another_start_is_refused(tmp_path) -> None:
    base = nn.Sequential(linear())
    plain = lora_ops.add_lora(copy.deepcopy(base), LoraConfig(r=R, target_modules=["0"]))
    lora_ops.save_adapter(plain, tmp_path)
    model = lora_ops.add_lora(copy.deepcopy(base), LoraConfig(r=R, target_modules=["0"], init_lora_weights="pissa"))
    before = snapshot(model)
    with pytest.raises(ValueError, match="with init_lora_weights=pissa, and"):
        lora_ops.load_adapter(model, tmp_path)
    assert_untouched(model, before)


def test_loftq_in_files(tmp_path) -> None:
    base, x = nn.Sequential(linear()), torch.randn(9, K)
    config = LoraConfig(r=R, lora_alpha=6, target_modules=["0"], init_lora_weights="loftq", loftq_config={"loftq_iter": 3})
    model = lora_ops.add_lora(copy.deepcopy(base), config)
    assert not isinstance(model[0].weight, NF4Weight)
    trained(model)
    lora_ops.save_adapter(model, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (fields["init_lora_weights"], fields["loftq_config"]) == ("loftq", {"loftq_bits": 4, "loftq_iter": 3})
    assert load_file(tmp_path / "adapter_model.safetensors")["base_model.model.0.lora_A.weight"].shape == (R, K)
    loaded = lora_ops.load_adapter(copy.deepcopy(base), tmp_path)
    assert nearness(loaded(x), model(x)) < 1e-5
    for loftq_config, message in (
        ({"loftq_bits": 8}, 'must have "loftq_iter" from 1 to 100 and "loftq_bits" = 4 alone'),
        ({"loftq_iter": 0}, 'must have "loftq_iter" from 1 to 100'),
        ({"loftq_iter": 10**9}, 'must have "loftq_iter" from 1 to 100'),  # a damaged file's: it would never end
    ):
        with pytest.raises(ValueError, match=message):
            LoraConfig(init_lora_weights="loftq", loftq_config=loftq_config)
    with pytest.raises(ValueError, match='loftq_config must be empty without init_lora_weights="loftq"'):
        LoraConfig(loftq_config={"loftq_iter": 3})
