"""Factor providers in a whole model."""

import re
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import nn

from ..nn.factored import FactoredLinear, check_path
from ..nn.quantized import check_quant
from .config import LoraConfig, Targets
from .injection import add_lora, inject, lora_layers, remove_lora

Model = TypeVar("Model", bound=nn.Module)


def add_factors(
    model: Model,
    make: Callable[[str, nn.Module], nn.Module],
    *,
    target_modules: Targets = "all-linear",
    exclude_modules: Targets = None,
    scaling: float = 1.0,
    lora_dropout: float = 0.0,
    adapter_dtype: torch.dtype | None = None,
    quant: str | None = None,
) -> Model:
    """Replaces the targeted linear layers of `model`, in place, by `FactoredLinear`s and freezes every other parameter.

    Weights are shared, not copied; the names in the state dict stay, and `<layer>.factors.*` join them. What several providers
    share, a module, is a submodule of the first layer that has it alone: it is once among the parameters and in the state
    dict. `merge_lora`, `unmerge_lora`, `disable_adapter`, `merge_and_unload`, `lora_parameters` and `remove_lora` are as after
    `add_lora`.

    Args:
        model: holds nn.Linear, transformers' Conv1D or bitsandbytes' Linear4bit layers.
        make: make(name, layer) is the provider of the layer of that name; the layer still has its weight. For example
            `lambda name, linear: lora_ops.factors.gated(linear, r=16)`.
        target_modules, exclude_modules: see `LoraConfig`.
        scaling, lora_dropout, adapter_dtype, quant: see `FactoredLinear`.

    Returns:
        model.

    Raises:
        ValueError, TypeError: an argument out of its range, by name; a layer that cannot be replaced, or for which `make`
            raises. The model is as it was.
    """
    if not callable(make):
        raise TypeError(f"make must be a function of a name and a layer, got {type(make).__name__}")
    check_path(scaling, lora_dropout)
    check_quant(quant, 64)
    config = LoraConfig(target_modules=target_modules, exclude_modules=exclude_modules, lora_dropout=lora_dropout)

    def layer_for(name: str, module: nn.Module) -> FactoredLinear:
        return FactoredLinear(
            module, make(name, module), scaling=scaling, lora_dropout=lora_dropout, adapter_dtype=adapter_dtype, quant=quant
        )

    register_once(inject(model, config, "default", layer_for))
    return model


def register_once(layers: Iterable[nn.Module]) -> None:
    """Leaves a module that several layers have a submodule of the first one; to the others it is a plain attribute."""
    seen: set[nn.Module] = set()
    for layer in layers:
        for parent in list(layer.modules()):
            if parent in seen:
                continue
            for name, child in list(parent._modules.items()):
                if child in seen:
                    del parent._modules[name]
                    vars(parent)[name] = child
        seen.update(layer.modules())


def factors_to_lora(model: Model, adapter_name: str = "default") -> Model:
    """Makes plain LoRA layers of the model's `FactoredLinear`s, in place, as if by `add_lora`: `save_adapter` writes them.

    A is the provider's, B is its B with core and gate multiplied into it, ranks and scalings are those of each layer. A layer
    that `add_factors` quantised has its dequantised weight.

    Raises:
        ValueError: the model has none; or factors of a layer depend on x, or scale the output. The model is as it was.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FactoredLinear)}
    if not layers:
        raise ValueError("model has no FactoredLinear; see add_factors")
    plain = {}
    for name, layer in layers.items():
        try:
            plain[name] = layer.plain_factors()
        except ValueError as error:
            raise ValueError(f"{name}: {error}; the model was left untouched") from error
    escaped = {name: re.escape(name) for name in layers}
    config = LoraConfig(
        target_modules="|".join(escaped.values()),
        rank_pattern={escaped[name]: len(A) for name, (A, _) in plain.items()},
        alpha_pattern={escaped[name]: layer.scaling * len(plain[name][0]) for name, layer in layers.items()},
        lora_dropout=max(layer.lora_dropout for layer in layers.values()),
    )
    remove_lora(model)
    add_lora(model, config, adapter_name)
    with torch.no_grad():
        for name, lora in lora_layers(model):
            A, B = plain[name]
            lora.lora_A[adapter_name].copy_(A)
            lora.lora_B[adapter_name].copy_(B)
            lora.lora_dropout[adapter_name] = layers[name].lora_dropout
    return model
