"""Several adapters in a model: added, made active, forgotten, layer by layer, in all layers or in none."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from ..nn.frozen import FrozenWeight
from ..nn.settings import check_adapter_name
from ..registry import method
from .config import LoraConfig
from .injection import lora_layers, updated_layers
from .kinds import LoraLayer, check_variants
from .whole_modules import ModulesToSaveWrapper, copies_of, modules_to_save, whole_modules, wrap

Model = TypeVar("Model", bound=nn.Module)


def add_adapter(model: Model, config: LoraConfig, adapter_name: str, *, adapter_dtype: torch.dtype | None = None) -> Model:
    """A second adapter, or a further one, in the layers that `add_lora` made. Not active before `set_adapter`.

    Every layer gets it, with the rank, lora_alpha, dropout and initialisation that the configuration has for the layer, and
    what `modules_to_save` names is copied for it; `target_modules` and `bias` are not looked at.

    Raises:
        ValueError: the model has no LoRA layers, or has an adapter of that name, or a layer cannot have that rank.
        TypeError, ValueError: `modules_to_save` names what cannot be trained beside them. The model is as it was, whatever is
            raised.
    """
    layers = _layers(model)
    check_adapter_name(adapter_name)
    taken = [name for name, layer in layers.items() if adapter_name in layer.lora_A]
    if taken:
        raise ValueError(f"adapter_name must be a new name, got {adapter_name!r}, which {taken[0]} has already")
    for name, layer in layers.items():
        check_variants(layer, config.use_dora, config.lora_bias, config.initialisation)
        layer._factor_shapes(config.rank_of(name))  # raises where the layer cannot have it
    copies = copies_of(modules_to_save(model, config, {layer: name for name, layer in layers.items()}))
    try:
        for name, layer in layers.items():
            layer.add_adapter(adapter_name, **config.adapter_of(name), adapter_dtype=adapter_dtype)
    except BaseException:
        for layer in layers.values():
            layer._forget(adapter_name)
        raise
    wrap(model, copies, adapter_name)
    return model


@method(
    "Pluggable adapters",
    equation="W0 stays; A and B of a name are added, made active, disabled, forgotten",
    use='set_adapter(model, "chemistry")',
    changes="C",
    source="Hu et al. 2021, https://arxiv.org/abs/2106.09685; PEFT",
    test="test_named_adapters.py::test_a_model_s_adapters",
)
def set_adapter(model: Model, adapter_name: str | Sequence[str]) -> Model:
    """Makes an adapter, or several together, the active one of every layer. They alone train.

    Raises:
        ValueError: a layer has no adapter of that name, or two of the adapters train the same whole module; none is changed.
        RuntimeError: a layer is merged; none is changed.
    """
    layers = _layers(model)
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    for layer in layers.values():
        layer._check_names(names)
        layer._check_not_merged("set_adapter")
    for _, wrapper in whole_modules(model):
        wrapper.check_adapters(names)
    for layer in layers.values():
        layer.set_adapter(names)
    for _, wrapper in whole_modules(model):
        wrapper.set_adapter(names)
    return model


def delete_adapter(model: Model, adapter_name: str) -> Model:
    """Forgets an adapter in every layer.

    Raises:
        ValueError: a layer has no adapter of that name; none is changed.
        RuntimeError: a layer is merged; none is changed.
    """
    layers = _layers(model)
    for layer in layers.values():
        layer._check_names([adapter_name])
        layer._check_not_merged("delete_adapter")
    for layer in layers.values():
        layer.delete_adapter(adapter_name)
    for _, wrapper in whole_modules(model):
        wrapper.delete_adapter(adapter_name)
    return model


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """`with disable_adapter(model):` the frozen model, in which what is merged stays merged."""
    layers = [layer for _, layer in updated_layers(model)]
    if not layers:
        raise ValueError("model has no layer with LoRA; see add_lora")
    parts: list[FrozenWeight | ModulesToSaveWrapper] = [*layers, *(wrapper for _, wrapper in whole_modules(model))]
    before = [part.adapters_disabled for part in parts]
    for part in parts:
        part.adapters_disabled = True
    try:
        yield
    finally:
        for part, disabled in zip(parts, before, strict=True):
            part.adapters_disabled = disabled


def _layers(model: nn.Module) -> dict[str, LoraLayer]:
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("model has no layer with LoRA; see add_lora")
    return layers
