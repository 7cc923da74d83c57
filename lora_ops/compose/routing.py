"""Adapters of a whole model, weighted anew in every forward: a router looks at the model's inputs, every layer gets its gate.

With n adapters in a layer, g = gate[..., k] of a row and S_k = x A_kᵀ,

    y = x W0ᵀ + Σ_k s_k g_k S_k B_kᵀ + bias

which is one LoRA of rank Σ r_k whose rank gate is g, every g_k as often as its adapter has ranks.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..adapters.injection import lora_layers
from ..adapters.switching import disable_adapter, set_adapter
from ..nn.linear import FusedLoraLinear

Model = TypeVar("Model", bound=nn.Module)


def set_adapter_gate(model: nn.Module, gate: Tensor | Sequence[Tensor] | None) -> None:
    """Multiplies the output of every active adapter by its part of a gate, until the next call or `set_adapter`.

    Args:
        model: whose LoRA layers are linear and have the same number n of active adapters, neither DoRA nor with a bias of B.
        gate: (..., n), broadcast against the rows of every layer's input: (batch, tokens, n), or (batch, 1, n) for a gate of a
            sequence; or one for each layer, in the order of `lora_layers`. None: the adapters are added as they are.

    Raises:
        TypeError, ValueError: a layer or a gate that does not fit; no gate is changed.
    """
    layers = _linear_layers(model)
    gates = [gate] * len(layers) if gate is None or isinstance(gate, Tensor) else list(gate)
    if len(gates) != len(layers):
        raise ValueError(f"gate must be one tensor, or one for each of {len(layers)} layers, got {len(gates)}")
    for (name, layer), g in zip(layers.items(), gates, strict=True):
        if g is not None:
            _check_weighted(name, layer, layer.active_adapters)
        n = len(layer.active_adapters)
        if g is not None and (g.dim() < 1 or g.shape[-1] != n):
            raise ValueError(f"gate must be (..., n) with n = {n}, the active adapters of {name}, got {tuple(g.shape)}")
    for layer, g in zip(layers.values(), gates, strict=True):
        vars(layer)["adapter_gate"] = g  # a parameter stays the router's


def add_router(model: Model, adapters: Sequence[str], router: nn.Module, *, train_adapters: bool = False) -> Model:
    """Has a router decide, in every forward of the model, how much of each adapter every row gets.

    Args:
        model: with layers that `add_lora` made, each of which has the adapters.
        adapters: names, in the order of the router's outputs. They become the active ones.
        router: `router(model, *args, **kwargs)`, with the arguments of the model's forward, returns a gate as
            `set_adapter_gate` takes it. It becomes the submodule `lora_router`: it trains, moves and is saved with the model.
        train_adapters: whether the adapters train beside the router.

    Returns:
        model, whose `forward` and `generate` are routed from now on. `generate` needs `use_cache=False`: a router sees all
        tokens.

    Raises:
        TypeError, ValueError: layers or adapters that cannot be weighted, or a model that is routed already. It is as it was.
    """
    if hasattr(model, "lora_router"):
        raise ValueError("model has a router already; call remove_router(model) first")
    layers = _linear_layers(model)
    for name, layer in layers.items():
        _check_weighted(name, layer, adapters)
    set_adapter(model, adapters)
    if not train_adapters:
        for layer in layers.values():
            for name in adapters:
                layer.lora_A[name].requires_grad_(False)
                layer.lora_B[name].requires_grad_(False)
    model.lora_router = router
    vars(model)["lora_router_hook"] = model.register_forward_pre_hook(_route, with_kwargs=True)
    return model


def remove_router(model: Model) -> Model:
    """Undoes `add_router`: the adapters are added as they are. Raises ValueError where there is no router."""
    if not hasattr(model, "lora_router"):
        raise ValueError("model has no router; see add_router")
    vars(model).pop("lora_router_hook").remove()
    del model.lora_router
    set_adapter_gate(model, None)
    return model


def last_hidden_state(model: nn.Module, *args: Any, without_adapters: bool = True, **kwargs: Any) -> Tensor:
    """(batch, tokens, hidden) of a transformers model, without gradient, and without adapters unless they are asked for."""
    kwargs = {name: value for name, value in kwargs.items() if name != "labels"}
    with torch.no_grad(), disable_adapter(model) if without_adapters else nullcontext():
        return model.forward(*args, **{**kwargs, "output_hidden_states": True, "return_dict": True}).hidden_states[-1]


def mean_hidden_state(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """(batch, hidden): the mean of `last_hidden_state` over the tokens that `attention_mask` shows."""
    hidden = last_hidden_state(model, *args, **kwargs)
    mask = kwargs.get("attention_mask")
    if mask is None:
        return hidden.mean(1)
    mask = mask[..., None].to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


def _route(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if any(hasattr(value, "get_seq_length") for value in kwargs.values()):
        raise ValueError("use_cache must be False for a model with a router, which sees all tokens, got a cache")
    # The gates stay until the next forward: activation checkpointing computes layers again in the backward.
    set_adapter_gate(model, model.lora_router(model, *args, **kwargs))


def _check_weighted(name: str, layer: FusedLoraLinear, adapters: Sequence[str]) -> None:
    refused = [a for a in adapters if a in layer.lora_magnitude_vector or a in layer.lora_B_bias]
    if refused:
        raise ValueError(f"adapters must be neither DoRA nor have a bias of B, got {refused[0]!r} in {name}")


def _linear_layers(model: nn.Module) -> dict[str, FusedLoraLinear]:
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("model has no layer with LoRA; see add_lora")
    for name, layer in layers.items():
        if not isinstance(layer, FusedLoraLinear):
            raise TypeError(f"adapters are weighted in linear layers alone, got {type(layer).__name__} in {name}")
    return layers  # type: ignore[return-value]
