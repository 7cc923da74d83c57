"""Adapters whose weight is not W0 as adapters whose weight is."""

from typing import TypeVar

from torch import nn

from ..adapters.injection import lora_layers
from ..nn.linear import FusedLoraLinear

Model = TypeVar("Model", bound=nn.Module)


def convert_to_plain_lora(model: Model, adapter_name: str = "default") -> Model:
    """Makes an adapter that began with a weight of its own (PiSSA, MiLoRA, OLoRA, CorDA, LoRA-GA, LoftQ, ...) a plain one
    beside W0, of rank 2r, in every layer: `FusedLoraLinear.convert_to_plain_lora`. Its file then works beside the original
    model.

    Args:
        model: with LoRA layers, or such a layer.

    Returns:
        model.

    Raises:
        ValueError: no layer has an adapter of that name.
        RuntimeError: a layer is merged; none is changed.
    """
    layers = [layer for _, layer in lora_layers(model) if adapter_name in layer.lora_A]
    if not layers:
        raise ValueError(f"adapter_name must be an adapter of the model's LoRA layers, got {adapter_name!r}")
    for layer in layers:
        layer._check_not_merged("convert_to_plain_lora")
    for layer in layers:
        if isinstance(layer, FusedLoraLinear):
            layer.convert_to_plain_lora(adapter_name)
    return model
