"""Layers of PEFT's in a model of one, stock and patched, and what fp64 says of both."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import compare
import torch
from compare import F32, Dtypes, Results
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lora_ops import NF4Weight, reference
from lora_ops.integrations import peft as integration

K, N, ROWS = 64, 40, (3, 7)


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Mask(nn.Module):
    """Dropout by a mask of the subclass's."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return self.dropped(x) if self.training else x

    def dropped(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class PhiloxDropout(Mask):
    """The mask that a fused layer draws, for a stock one."""

    def dropped(self, x: Tensor) -> Tensor:
        seed = torch.randint(0, 2**62, (), dtype=torch.int64)
        keep = reference.dropout_keep(seed, self.p, x.shape[:-1].numel(), x.shape[-1])
        return x * (keep.view(x.shape).to(x.dtype) / (1 - self.p))


class DoraDropout(Mask):
    """The mask that `dora_linear` draws."""

    def dropped(self, x: Tensor) -> Tensor:
        return x * torch.empty(x.shape, dtype=torch.bool).bernoulli_(1 - self.p) / (1 - self.p)


@dataclass(frozen=True)
class Setting:
    """One way to use a layer of PEFT's."""

    dtypes: Dtypes
    kind: str = "linear"  # "linear", "conv1d", "4bit"
    autocast: torch.dtype | None = None
    dropout_p: float = 0.0
    bias: bool = True
    adapters: int = 1
    trained: tuple[str, ...] = ("x", "lora_A", "lora_B", "bias", "lora_magnitude_vector")
    checkpointing: str | None = None  # "reentrant", "not reentrant"
    compute_dtype: torch.dtype | None = None  # of a 4-bit layer, if it is not x's
    options: tuple[tuple[str, Any], ...] = ()  # of LoraConfig

    def __str__(self) -> str:
        compute = self.compute_dtype and f"compute-{self.compute_dtype}".replace("torch.", "")
        named = (self.kind, compute, self.autocast and "autocast", self.checkpointing, *(name for name, _ in self.options))
        return "-".join([str(self.dtypes), *filter(None, named), f"p{self.dropout_p}", f"{self.adapters}a"])

    @property
    def dora(self) -> bool:
        return dict(self.options).get("use_dora", False)


def base_layer(setting: Setting) -> nn.Module:
    if setting.kind == "conv1d":
        layer = Conv1D(N, K)
        nn.init.normal_(layer.bias)
        return layer.to(setting.dtypes.x)
    if setting.kind == "4bit":
        import bitsandbytes as bnb

        compute_dtype = setting.compute_dtype or setting.dtypes.x
        layer = bnb.nn.Linear4bit(K, N, bias=setting.bias, compute_dtype=compute_dtype, quant_type="nf4")
        dense = nn.Linear(K, N, bias=setting.bias)
        layer.weight = bnb.nn.Params4bit(dense.weight.data.to(setting.dtypes.x), requires_grad=False, quant_type="nf4")
        if setting.bias:
            layer.bias = nn.Parameter(dense.bias.data.to(compute_dtype))  # which its forward makes of it
        return layer.to("cpu")
    return nn.Linear(K, N, bias=setting.bias).to(setting.dtypes.x)


def make(setting: Setting) -> PeftModel:
    """Two adapters have different ranks and scalings."""
    torch.manual_seed(11)
    model = One(base_layer(setting))
    options = dict(setting.options)
    names = ["default", "second"][: setting.adapters]
    for i, name in enumerate(names):
        config = LoraConfig(
            r=4 + 3 * i,
            lora_alpha=6 + 2 * i,
            lora_dropout=setting.dropout_p,
            target_modules=["layer"],
            init_lora_weights=False,
            fan_in_fan_out=setting.kind == "conv1d",
            **options,
        )
        if i == 0:
            model.is_loaded_in_4bit = setting.kind == "4bit"
            model = get_peft_model(model, config, autocast_adapter_dtype=False)
        else:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
    model.base_model.set_adapter(names)
    layer = model.base_model.model.layer
    for part in (layer.lora_A, layer.lora_B):
        part.to(setting.dtypes.adapter)
    if setting.dora:
        for vector in layer.lora_magnitude_vector.values():
            vector.weight.data = vector.weight.data.float() * torch.linspace(0.5, 2, N)
    for name, p in model.named_parameters():
        is_weight = name.endswith("base_layer.weight")
        p.requires_grad_(p.is_floating_point() and not is_weight and any(part in name for part in setting.trained))
    return model


def patched(model: PeftModel) -> PeftModel:
    return integration.patch(copy.deepcopy(model))


def with_dropout(model: PeftModel, setting: Setting) -> PeftModel:
    """A stock model with the masks of the patched one."""
    if setting.dropout_p:
        layer = model.base_model.model.layer
        for name in layer.lora_dropout:
            # Beside another adapter with dropout, only the first one's is drawn in the kernel; none beside a frozen product in
            # another dtype.
            if setting.dora:
                layer.lora_dropout[name] = DoraDropout(setting.dropout_p)
            elif name == "default" and (setting.compute_dtype is None or setting.autocast is not None):
                layer.lora_dropout[name] = PhiloxDropout(setting.dropout_p)
    return model


def widened(model: PeftModel, setting: Setting) -> PeftModel:
    """Stock PEFT in fp64, over the same numbers."""
    model = copy.deepcopy(model)
    layer = model.base_model.model.layer
    if setting.kind != "4bit":
        return with_dropout(model.double(), setting)
    wide = make(replace(setting, kind="linear", dtypes=Dtypes(F32, F32))).double()
    of = wide.base_model.model.layer
    of.load_state_dict(
        {name: t for name, t in layer.state_dict().items() if "lora_" in name or name.endswith(".bias")}, strict=False
    )
    of.base_layer.weight.data = NF4Weight.from_params4bit(layer.base_layer.weight).dequantize(torch.float64)
    return with_dropout(wide, setting)


def run(model: PeftModel, setting: Setting, draw: int, dtype: torch.dtype | None = None) -> Results:
    """y and every gradient that the setting wants."""
    g = torch.Generator().manual_seed(draw)
    x, dy = (torch.randn(*ROWS, size, generator=g).to(setting.dtypes.x) for size in (K, N))
    x = x.to(dtype or x.dtype).requires_grad_("x" in setting.trained)
    model.train()
    torch.manual_seed(draw)
    model.zero_grad()
    with torch.autocast("cpu", setting.autocast, enabled=setting.autocast is not None and dtype is None):
        how = {"use_reentrant": setting.checkpointing == "reentrant"}
        y = checkpoint(model, x, **how) if setting.checkpointing else model(x)
    results = {"y": y.detach()}
    if y.requires_grad:
        y.backward(dy.to(y.dtype))
        results |= {name: p.grad for name, p in [("x", x), *model.named_parameters()] if p.requires_grad}
    return results


def errors(
    setting: Setting, draws: int = 3, change: Callable[[str, Tensor], Tensor] = lambda name, t: t
) -> dict[str, compare.Error]:
    """Of a patched layer, its output and its gradients, the largest of a few draws, beside the stock layer's. `change` is
    made to the patched one's."""
    model = make(setting)
    fused, wide = patched(model), widened(model, setting)
    assert integration.report(fused).not_fused == {}
    with_dropout(model, setting)
    drawn = []
    for draw in range(draws):
        actual, eager, exact = run(fused, setting, draw), run(model, setting, draw), run(wide, setting, draw, torch.float64)
        assert actual.keys() == eager.keys() == exact.keys()
        drawn.append({name: compare.error(change(name, actual[name]), eager[name], exact[name]) for name in actual})
    return {name: compare.Error(*map(max, zip(*(e[name] for e in drawn), strict=True))) for name in drawn[0]}
