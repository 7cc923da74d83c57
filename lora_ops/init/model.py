"""Initialisations of a whole model's adapters, those that need data or gradients above all."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from ..adapters.injection import lora_layers
from ..adapters.switching import disable_adapter
from ..nn.linear import FusedLoraLinear
from ..nn.quantized import check_quant
from ..quant import NF4Weight
from .base import CALIBRATED
from .calibrate import Loss
from .names import find
from .strategies import Plan, plan

Model = TypeVar("Model", bound=nn.Module)


def initialize(
    model: Model,
    init: str,
    batches: Iterable[Any] | None = None,
    *,
    loss: Loss | None = None,
    adapter_name: str = "default",
    generator: torch.Generator | None = None,
    quant: str | None = None,
    blocksize: int = 64,
    double_quant: bool = True,
    progress: bool = False,
    **options: Any,
) -> Model:
    """Starts an adapter in all of the model's LoRA layers by an initialisation of `lora_ops.init`. Call it after `add_lora` and
    before the optimiser is made: ranks, and with them parameters, may be others afterwards.

    What an initialisation is computed from is the model without its adapters, in the mode, train or eval, that it is in.

        init                        batches give                            options (others: of the initialisation itself)
        "lora_ga", "lora_ga_peft"   G = dyᵀ x, summed                       direction, scale, stable_gamma, niter, ...
        "eva"                       principal components of the inputs      rho=2.0, tau=0.99, whiten, adjust_scaling_factors,
                                                                            use_label_mask
        "corda"                     covariance of the inputs                corda_method
        "lqer"                      mean |x| (without batches: 1)
        "lq_lora"                   means of G ∘ G over rows and columns    bits, iterations
                                    (without batches: 1)
        any other                   nothing: no batches are needed

    Gradients are taken layer by layer as the backward comes by: one full gradient in fp32 exists at a time, and with several
    batches the sum of those before, in the weight's dtype, which takes as much memory as the layer's second weight will.

    "eva" gives every layer up to round(r · rho) directions, and ranks by the variance that they explain, the same number in
    all; layers of rank 0 lose the adapter. With adjust_scaling_factors lora_alpha grows with the rank. A pass over the batches
    ends when every component's cosine with itself a batch before is at least tau. Padding (attention_mask) does not count,
    nor, with use_label_mask, do positions with the label -100.

    "lq_lora" with bits chooses each layer's block size and double quantisation so that all layers together take at most that
    many bits per weight and the squared weighted errors sum up to the least (`allocate_bits`).

    With quant the layers' weights, dense until then, are put in 4 bits once all is computed: what "loftq", "qpissa", "lqer" and
    "lq_lora" need to be of use, which else leave the quantised values in a dense weight.

    Args:
        model: with layers that `add_lora` made.
        init: a name of `initialisations()`.
        batches: mappings are the model's keyword arguments, tuples and lists its arguments. On the model's device.
        loss: (model, batch) → scalar, for "lora_ga" and "lq_lora". None: `model(**batch).loss`.
        adapter_name: of the adapter, in every layer that has it.
        generator: of random numbers. None: torch's default.
        quant, blocksize, double_quant: see `FusedLoraLinear.from_linear`; None: weights stay as they are. With bits the last
            two are chosen.
        progress: show a bar over batches and one over layers (tqdm).

    Returns:
        model.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name, or, with the layer's name, a layer that cannot be
            initialised so. The model is as it was.
        RuntimeError: a layer is merged.
    """
    layers = _layers(model, adapter_name)
    made = Plan(model, layers, adapter_name, find(init), loss, generator, _bar(progress), quant, blocksize, double_quant)
    if quant is not None:
        check_quant(quant, blocksize)
        in_4_bits = [name for name, layer in layers.items() if isinstance(layer.original_weight, NF4Weight)]
        if in_4_bits:
            raise ValueError(f"quant must be None where weights are in 4 bits already, as in {in_4_bits[0]}, got {quant!r}")
        packed = [name for name, layer in layers.items() if layer.prepack]
        if packed:
            raise ValueError(f"quant must be None where panels are kept (prepack), as in {packed[0]}, got {quant!r}")
    if batches is None and init in CALIBRATED:
        raise ValueError(f'batches must be given for "{init}"')
    with disable_adapter(model):
        plan(made, init, None if batches is None else made.bar(batches, desc=f"{init}, batches"), options)
    for name, layer in layers.items():
        if name not in made.initials:
            layer.delete_adapter(adapter_name)
            continue
        if name in made.ranks:
            layer.resize(adapter_name, *made.ranks[name])
        if quant is not None:
            layer.quantize_weight(quant, *made.formats.get(name, (blocksize, double_quant)))
        layer.set_initial(adapter_name, made.initials.pop(name), init)
    return model


def _layers(model: nn.Module, adapter_name: str) -> dict[str, FusedLoraLinear]:
    layers: dict[str, FusedLoraLinear] = {}
    for name, layer in lora_layers(model):
        if adapter_name not in layer.lora_A:
            continue
        if not isinstance(layer, FusedLoraLinear):
            raise ValueError(f"model must have {adapter_name!r} in linear layers only, got {type(layer).__name__} in {name}")
        layer._check_not_merged("initialize")
        layers[name] = layer
    if not layers:
        raise ValueError(f"adapter_name must be an adapter of the model's LoRA layers, got {adapter_name!r}")
    return layers


def _bar(progress: bool) -> Callable[..., Any]:
    if not progress:
        return lambda items, **_: items
    from tqdm.auto import tqdm

    return tqdm
