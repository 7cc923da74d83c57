"""A fine-tuned model as a plain one: no LoRA, its weights merged."""

import warnings
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..nn.frozen import FrozenWeight
from ..nn.linear import FusedLoraLinear
from ..quant import NF4Weight
from .injection import emptied, injected_models, merge_layers, remove_lora, share_hooks, updated_layers
from .whole_modules import whole_modules

Model = TypeVar("Model", bound=nn.Module)


def merge_and_unload(model: Model, to: torch.dtype | None = None) -> Model:
    """Undoes `add_lora` or `add_factors`, in place, but for what was learnt: the original modules are back with W0 + ΔW of all
    active adapters, rounded once (with DoRA, biases of B and output scales, what `FusedLoraLinear.merge` says), and with their
    names in the state dict.

    A weight that `add_lora` quantised becomes a dense one in its dtype: the 4-bit values that the adapter was trained beside,
    plus ΔW, not quantised again. bitsandbytes' Linear4bit is one again, quantised again as `FusedLoraLinear.merge` says, or an
    nn.Linear if `to` says of which dtype. What is merged already is taken as it is. A FusedLoraLinear that the user placed
    stays, as in `remove_lora`.

    Modules that were trained as a whole (`modules_to_save`) are the active adapter's copies. Who shared a weight keeps W0: if
    an output layer and an embedding that were tied are not any more, `config.tie_word_embeddings` becomes False, with a
    warning, as in PEFT; otherwise a saved model would be tied again when it is read.

    Args:
        model: what `add_lora` was called with, or what holds it.
        to: the dtype of the merged weights and of the biases beside them, float32, bfloat16, float16 or float64. None: the one
            that they have.

    Returns:
        model.

    Raises:
        ValueError: the model has no LoRA, or a layer cannot be merged (`merge_lora`).
        RuntimeError: no adapter is active; some layers are merged and some are not; all are, and `to` is given.
        TypeError: `to` is no dtype of a weight. The model is as it was, whatever is raised.
    """
    owners = injected_models(model)
    owned = {part for owner in owners for part in owner.modules()}
    layers = {name: layer for name, layer in updated_layers(model) if layer in owned and "original" in vars(layer)}
    merged = [layer.merged for layer in layers.values()]
    if any(merged) and (to is not None or not all(merged)):
        raise RuntimeError(f"{sum(merged)} of {len(layers)} layers are merged already; call unmerge_lora() first")
    if not any(merged):
        merge_layers(layers, {name: to or _dtype_of_original(layer) for name, layer in layers.items()})
    for layer in layers.values():
        layer.unmerged_weight = layer.unmerged_bias = layer.merge_error = None  # what is merged is the weight from now on
        if isinstance(layer, FusedLoraLinear):
            layer.forget_original_weight()
        if to is not None and layer.bias is not None and layer.bias.dtype != to:
            layer.bias = nn.Parameter(layer.bias.detach().to(to))
        if _was_linear4bit(layer) and not isinstance(layer.weight, NF4Weight):
            vars(layer)["original"] = _dense_shell(layer)
    for _, wrapper in whole_modules(model):
        wrapper.original_module = wrapper.current
    remove_lora(model)
    parts: list[nn.Module] = [model, *owners]
    for part in parts:
        _untie(part)
    return model


def _untie(model: nn.Module) -> None:
    """Says in a transformers model's configuration whether its output layer still has the embedding's weight."""
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    weights = [getattr(end, "weight", None) for end in ends]
    if all(isinstance(w, Tensor) for w in weights) and weights[0] is not weights[1]:
        config.tie_word_embeddings = False  # type: ignore[union-attr]
        warnings.warn(
            "the embedding and the output layer are not tied any more: tie_word_embeddings is now False", stacklevel=3
        )


def _was_linear4bit(layer: FrozenWeight) -> bool:
    return "params4bit" in vars(vars(layer)["original"])


def _dtype_of_original(layer: FrozenWeight) -> torch.dtype | None:
    """Of the weight that `add_lora` quantised; None: the format stays."""
    quantised = isinstance(layer.weight, NF4Weight) and not _was_linear4bit(layer)
    return layer.weight.dtype if quantised else None


def _dense_shell(layer: FrozenWeight) -> nn.Module:
    """An nn.Linear in the place of bitsandbytes' Linear4bit, as yet without its weight."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    share_hooks(vars(layer)["original"], linear)
    return emptied(linear)
