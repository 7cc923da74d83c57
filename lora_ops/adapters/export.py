"""A fine-tuned model as a plain one: no LoRA, its weights merged."""

from typing import TypeVar

import torch
from torch import nn

from ..nn.linear import FusedLoraLinear
from ..quant import NF4Weight
from .injection import emptied, injected_models, lora_layers, merge_layers, remove_lora, share_hooks

Model = TypeVar("Model", bound=nn.Module)


def merge_and_unload(model: Model, to: torch.dtype | None = None) -> Model:
    """Undoes `add_lora`, in place, but for what was learnt: the original modules are back with W0 + ΔW of all active adapters,
    rounded once (with DoRA and biases of B, what `FusedLoraLinear.merge` says), and with their names in the state dict.

    A weight that `add_lora` quantised becomes a dense one in its dtype: the 4-bit values that the adapter was trained beside,
    plus ΔW, not quantised again. bitsandbytes' Linear4bit is one again, quantised again as `FusedLoraLinear.merge` says, or an
    nn.Linear if `to` says of which dtype. What is merged already is taken as it is. A FusedLoraLinear that the user placed
    stays, as in `remove_lora`.

    Who shared a weight keeps W0: a transformers model whose output layer is tied and had an adapter needs
    `config.tie_word_embeddings = False` before it is saved.

    Args:
        model: what `add_lora` was called with, or what holds it.
        to: the dtype of the merged weights and of the biases beside them, float32, bfloat16, float16 or float64. None: the one
            that they have.

    Returns:
        model.

    Raises:
        ValueError: the model has no LoRA, or a layer cannot be merged (`merge_lora`).
        RuntimeError: no adapter is active; some layers are merged and some are not; all are, and `to` is given.
        TypeError: `to` is no dtype of a weight.
        In each case the model is as it was.
    """
    owned = {part for owner in injected_models(model) for part in owner.modules()}
    layers = {name: layer for name, layer in lora_layers(model) if layer in owned and "original" in vars(layer)}
    merged = [layer.merged for layer in layers.values()]
    if any(merged) and (to is not None or not all(merged)):
        raise RuntimeError(f"{sum(merged)} of {len(layers)} layers are merged already; call unmerge_lora() first")
    if not any(merged):
        merge_layers(layers, {name: to or _dtype_of_original(layer) for name, layer in layers.items()})
    for layer in layers.values():
        layer.unmerged_weight = layer.unmerged_bias = layer.merge_error = None  # what is merged is the weight from now on
        if to is not None and layer.bias is not None and layer.bias.dtype != to:
            layer.bias = nn.Parameter(layer.bias.detach().to(to))
        if _was_linear4bit(layer) and not isinstance(layer.weight, NF4Weight):
            vars(layer)["original"] = _dense_shell(layer)
    return remove_lora(model)


def _was_linear4bit(layer: FusedLoraLinear) -> bool:
    return "params4bit" in vars(vars(layer)["original"])


def _dtype_of_original(layer: FusedLoraLinear) -> torch.dtype | None:
    """Of the weight that `add_lora` quantised; None: the format stays."""
    quantised = isinstance(layer.weight, NF4Weight) and not _was_linear4bit(layer)
    return layer.weight.dtype if quantised else None


def _dense_shell(layer: FusedLoraLinear) -> nn.Module:
    """An nn.Linear in the place of bitsandbytes' Linear4bit, as yet without its weight."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    share_hooks(vars(layer)["original"], linear)
    return emptied(linear)
