"""Layers with DoRA and biases of B, PEFT's and ours with the same numbers, and what fp64 says of both."""

import copy
from dataclasses import dataclass, replace

import compare
import torch
from compare import F32, Dtypes, Results
from peft import LoraConfig, PeftModel, get_peft_model
from peft_layers import DoraDropout, N, One, PhiloxDropout, Setting, base_layer, run
from torch import nn

from lora_ops import FusedLoraLinear, NF4Weight

F64 = torch.float64
OPTIONS = {"lora": {}, "dora": {"use_dora": True}, "bias": {"lora_bias": True}}
NAMES = ("default", "second", "third")
KINDS = [("dora",), ("bias",), ("bias", "bias"), ("lora", "dora"), ("dora", "lora"), ("dora", "dora"), ("bias", "dora", "bias")]


@dataclass(frozen=True)
class Case:
    """Adapters of these kinds, each with its dropout, all of them active, over a base layer."""

    kinds: tuple[str, ...]
    setting: Setting
    dropouts: tuple[float, ...] = (0.0, 0.0, 0.0)

    def __str__(self) -> str:
        return "-".join(["+".join(self.kinds), str(self.setting), *(str(p) for p in self.dropouts if any(self.dropouts))])

    def options(self, i: int) -> dict:
        options = {"r": 4 + 3 * i, "lora_alpha": 6 + 2 * i, "lora_dropout": self.dropouts[i], "init_lora_weights": False}
        return options | OPTIONS[self.kinds[i]]


def make_stock(case: Case) -> PeftModel:
    torch.manual_seed(11)
    setting, names = case.setting, NAMES[: len(case.kinds)]
    model = One(base_layer(setting))
    model.is_loaded_in_4bit = setting.kind == "4bit"
    for i, name in enumerate(names):
        config = LoraConfig(target_modules=["layer"], fan_in_fan_out=setting.kind == "conv1d", **case.options(i))
        if i == 0:
            model = get_peft_model(model, config, autocast_adapter_dtype=False)
        else:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
    model.base_model.set_adapter(list(names))
    layer = model.base_model.model.layer
    for part in (layer.lora_A, layer.lora_B):
        part.to(setting.dtypes.adapter)
    for vector in layer.lora_magnitude_vector.values():
        vector.weight.data = vector.weight.data.float() * torch.linspace(0.5, 2, N)
    for name, p in model.named_parameters():
        p.requires_grad_(p.is_floating_point() and not name.endswith("base_layer.weight"))
    return model


def with_masks(model: PeftModel, case: Case) -> PeftModel:
    """A stock model with the masks of ours."""
    dropouts = model.base_model.model.layer.lora_dropout
    for i, (name, kind) in enumerate(zip(NAMES, case.kinds, strict=False)):
        if case.dropouts[i] and kind == "dora":
            dropouts[name] = DoraDropout(case.dropouts[i])
        elif case.dropouts[i] and i == 0 and "dora" not in case.kinds:
            dropouts[name] = PhiloxDropout(case.dropouts[i])
    return model


def in_fp64(model: PeftModel, case: Case) -> PeftModel:
    """Stock PEFT in fp64, over the same numbers."""
    if case.setting.kind != "4bit":
        return copy.deepcopy(model).double()
    layer = model.base_model.model.layer
    wide = make_stock(replace(case, setting=replace(case.setting, kind="linear", dtypes=Dtypes(F32, F32)))).double()
    of = wide.base_model.model.layer
    state = {name: t for name, t in layer.state_dict().items() if "lora_" in name or name.endswith(".bias")}
    of.load_state_dict(state, strict=False)
    of.base_layer.weight.data = NF4Weight.from_params4bit(layer.base_layer.weight).dequantize(F64)
    return wide


def make_ours(model: PeftModel, case: Case) -> One:
    stock = model.base_model.model.layer
    options = case.options(0)
    layer = FusedLoraLinear.from_linear(copy.deepcopy(stock.base_layer), adapter_dtype=case.setting.dtypes.adapter, **options)
    for i, name in enumerate(NAMES[1 : len(case.kinds)], 1):
        layer.add_adapter(name, adapter_dtype=case.setting.dtypes.adapter, **case.options(i))
    layer.set_adapter(list(NAMES[: len(case.kinds)]))
    if layer.bias is not None:
        layer.bias.requires_grad_(stock.base_layer.bias.requires_grad)
    ours = dict(layer.named_parameters())
    for name, p in stock.named_parameters():
        if not name.endswith("base_layer.weight"):
            ours[ours_of(name)].data.copy_(p.data)
    return One(layer)


def ours_of(name: str) -> str:
    """The name that a parameter of PEFT's layer has in ours."""
    name = name.split("layer.")[-1].removesuffix(".weight")
    kind, *adapter = name.removesuffix(".bias").split(".")
    return f"{kind}_bias.{adapter[0]}" if adapter and name.endswith(".bias") else name


def results_of(model: nn.Module, case: Case, draw: int, dtype: torch.dtype | None = None) -> Results:
    return {ours_of(name): t for name, t in run(model, case.setting, draw, dtype).items()}


def measured(case: Case, draws: int = 3, change=lambda name, t: t) -> dict[str, compare.Error]:
    """The output's and every gradient's errors, the largest of a few draws."""
    stock = make_stock(case)
    ours, wide = make_ours(stock, case), in_fp64(stock, case)
    with_masks(stock, case)
    with_masks(wide, case)
    drawn = []
    for draw in range(draws):
        actual, eager = results_of(ours, case, draw), results_of(stock, case, draw)
        exact = results_of(wide, case, draw, F64)
        assert actual.keys() == eager.keys() == exact.keys()
        drawn.append({name: compare.error(change(name, actual[name]), eager[name], exact[name]) for name in actual})
    return {name: compare.Error(*map(max, zip(*(e[name] for e in drawn), strict=True))) for name in drawn[0]}


def three() -> FusedLoraLinear:
    """One adapter of each kind, all active."""
    case = Case(("dora", "bias", "lora"), Setting(Dtypes(F32, F32)))
    return make_ours(make_stock(case), case).layer
