"""Hot swap: another adapter in the place of one, its rank padded with zeros: no shape and no scaling changes."""

import os
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..registry import method
from .files import _PREFIX, CONFIG, WEIGHTS, _check_tensors, _read_config, _read_tensors
from .injection import lora_layers
from .kinds import LoraLayer, factor_names, factor_shapes
from .targets import targeted_modules

Model = TypeVar("Model", bound=nn.Module)


def pad_adapter(model: Model, r: int, adapter_name: str = "default") -> Model:
    """Gives an adapter rank r in every layer: rows of zeros below A, columns of zeros beside B. ΔW and the scaling stay.

    Call it before `torch.compile` and before an optimiser is made: the parameters are new ones.

    Raises:
        ValueError: a layer has no adapter of that name or one of a larger rank, or is a convolution in groups.
        RuntimeError: a layer is merged. In each case none is changed.
    """
    layers = _layers(model, adapter_name)
    for name, layer in layers.items():
        if layer.r[adapter_name] > r:
            raise ValueError(f"r must be at least {layer.r[adapter_name]}, the adapter's rank in {name}, got {r}")
    for layer in layers.values():
        scaling = layer.scaling[adapter_name]
        shapes = factor_shapes(layer, r)
        for factors, shape in zip((layer.lora_A, layer.lora_B), shapes, strict=True):
            old = factors[adapter_name]
            factors[adapter_name] = nn.Parameter(_padded(old.detach(), shape), old.requires_grad)
        layer.r[adapter_name] = r
        layer.set_scaling(adapter_name, scaling * r)
    return model


@method(
    "Hot swap",
    equation="A ← [A'; 0], B ← [s'/s B' 0]: s B A = s' B' A' in the shapes that a compiled model was compiled for",
    use='hotswap_adapter(model, "another_adapter")',
    changes="C",
    source="PEFT's hotswap_adapter, https://huggingface.co/docs/peft/package_reference/hotswap",
    test="test_hotswap.py::test_a_swapped_adapter_computes_what_a_loaded_one_does",
)
@torch.no_grad()
def hotswap_adapter(model: Model, directory: str | os.PathLike[str], adapter_name: str = "default") -> Model:
    """Reads an adapter in PEFT's files into the place of one that the model has, in place: A ← [A'; 0], B ← [s'/s B' 0].

    No shape, no scaling and no parameter object changes, so that a compiled model is not compiled again. Ranks of the files may
    be smaller than the adapter's (`pad_adapter`). Values are rounded once to the parameters' dtype.

    Raises:
        FileNotFoundError: one of the two files is not there.
        ValueError: the files are damaged or do not fit the adapter, which is as it was. They may have neither DoRA nor biases
            nor whole modules; such adapters are loaded by `load_adapter`.
        RuntimeError: a layer is merged.
    """
    layers = _layers(model, adapter_name)
    folder = Path(directory)
    config, tensors = _read_config(folder / CONFIG), _read_tensors(folder / WEIGHTS)
    for field, plain in (("use_dora", False), ("lora_bias", False), ("bias", "none"), ("modules_to_save", None)):
        if getattr(config, field) != plain:
            raise ValueError(
                f"{folder / CONFIG}: {field} must be {plain!r} in an adapter that is swapped, got {getattr(config, field)!r}"
            )
    targets = {name: module for module, name in targeted_modules(model, config).items()}
    if targets.keys() != layers.keys():
        name = min(targets.keys() ^ layers.keys())
        raise ValueError(f"{folder / CONFIG}: target_modules and the layers with adapter {adapter_name!r} differ in {name}")
    _check_tensors(tensors, targets, config, {}, {}, folder / WEIGHTS)
    for name, layer in layers.items():
        if config.rank_of(name) > layer.r[adapter_name]:
            raise ValueError(
                f"{folder / CONFIG}: r must be at most {layer.r[adapter_name]} as in {name}, got {config.rank_of(name)}; "
                "see pad_adapter"
            )
    for name, layer in layers.items():
        A, B = (tensors[f"{_PREFIX}{name}.{key}"] for key in factor_names(layer))
        r, alpha = config.rank_of(name), config.alpha_of(name)
        ratio = alpha / (r**0.5 if config.use_rslora else r) / layer.scaling[adapter_name]
        for place, values in ((layer.lora_A[adapter_name], A), (layer.lora_B[adapter_name], B.double() * ratio)):
            place.copy_(_padded(values.to(place.device), place.shape))
    return model


def _padded(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    padded = t.new_zeros(shape)
    padded[tuple(slice(n) for n in t.shape)] = t
    return padded


def _layers(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    layers = {name: layer for name, layer in lora_layers(model) if adapter_name in layer.lora_A}
    if not layers:
        raise ValueError(f"adapter_name must be an adapter of the model's LoRA layers, got {adapter_name!r}")
    for layer in layers.values():
        layer._check_not_merged("another rank or another adapter")
    grouped = [name for name, layer in layers.items() if getattr(layer, "groups", 1) > 1]
    if grouped:
        raise ValueError(f"{grouped[0]} is a convolution in groups, whose ranks belong to groups and cannot be padded")
    return layers
