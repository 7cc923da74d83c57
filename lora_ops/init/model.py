"""Initialisations of a whole model's adapters, those that need data or gradients above all."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ..adapters.injection import lora_layers
from ..adapters.switching import disable_adapter
from ..nn.linear import FusedLoraLinear
from ..quant import NF4Weight, quantize_nf4
from . import calibrate
from .base import Initial, find
from .bits import allocate_bits
from .eva import IncrementalPCA, redistributed
from .quantised import fisher_weights, weighted_norm

Model = TypeVar("Model", bound=nn.Module)
Layers = dict[str, FusedLoraLinear]
Starter = Callable[..., Initial]  # (name, r=None, **options of the initialisation)

# What LQ-LoRA chooses among: (blocksize, double_quant).
FORMATS = [(blocksize, double_quant) for blocksize in (32, 64, 128, 256, 512) for double_quant in (False, True)]


def initialize(
    model: Model,
    init: str,
    batches: Iterable[Any] | None = None,
    *,
    loss: calibrate.Loss | None = None,
    adapter_name: str = "default",
    generator: torch.Generator | None = None,
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

    Args:
        model: with layers that `add_lora` made.
        init: a name of `initialisations()`.
        batches: mappings are the model's keyword arguments, tuples and lists its arguments. On the model's device.
        loss: (model, batch) → scalar, for "lora_ga" and "lq_lora". None: `model(**batch).loss`.
        adapter_name: of the adapter, in every layer that has it.
        generator: of random numbers. None: torch's default.
        progress: show a bar over batches and one over layers (tqdm).

    Returns:
        model.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name, or, with the layer's name, a layer that cannot be
            initialised so. The model is as it was.
        RuntimeError: a layer is merged.
    """
    start = find(init)
    layers = _layers(model, adapter_name)
    if batches is None and init in ("lora_ga", "lora_ga_peft", "eva", "corda"):
        raise ValueError(f'batches must be given for "{init}"')
    tqdm = _bar(progress)
    batches = None if batches is None else tqdm(batches, desc=f"{init}, batches")

    def started(name: str, r: int | None = None, **given: Any) -> Initial:
        layer = layers[name]
        weight = layer.original_weight
        quantizer = {} if "quantize" in given else layer._quantizer(start)
        try:
            return start(
                weight.dequantize() if isinstance(weight, NF4Weight) else weight,
                r or layer.r[adapter_name],
                layer.scaling[adapter_name],
                dtype=layer.lora_A[adapter_name].dtype,
                generator=generator,
                **quantizer,
                **given,
            )
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}: {error}; the model was left untouched") from error

    with disable_adapter(model):
        if init == "eva":
            return _eva(model, layers, batches, started, adapter_name, **options)
        if init in ("lora_ga", "lora_ga_peft"):
            initials = _of_gradients(model, layers, batches, started, loss, options)
        elif init == "lq_lora":
            initials = _lq_lora(model, layers, batches, started, loss, tqdm, **options)
        else:
            per_layer = _of_inputs(model, layers, batches, init)
            initials = {name: started(name, **per_layer(name), **options) for name in tqdm(layers, desc=f"{init}, layers")}
    for name, initial in initials.items():
        layers[name].set_initial(adapter_name, initial, init)
    return model


def _of_inputs(model: nn.Module, layers: Layers, batches: Any, init: str) -> Callable[[str], dict[str, Any]]:
    """What "corda" and "lqer" need of the inputs of a layer, once."""
    kinds: dict[str, tuple[Any, str]] = {
        "corda": (calibrate.Covariance, "covariance"),
        "lqer": (calibrate.MeanMagnitude, "col_w"),
    }
    if init not in kinds or batches is None:
        return lambda name: {}
    kind, option = kinds[init]
    gathered = {name: kind() for name in layers}
    calibrate.gather_inputs(model, layers, batches, gathered)
    _check_reached([name for name, g in gathered.items() if g.count == 0])

    def taken(name: str) -> dict[str, Any]:
        g = gathered.pop(name)
        return {option: g.total / g.count}

    return taken


def _of_gradients(
    model: nn.Module, layers: Layers, batches: Any, started: Starter, loss: calibrate.Loss | None, options: Mapping[str, Any]
) -> dict[str, Initial]:
    gathered = {name: calibrate.MeanGradient(layer.original_weight.dtype) for name, layer in layers.items()}
    initials: dict[str, Initial] = {}

    def done(name: str) -> None:
        initials[name] = started(name, G=gathered.pop(name).total, **options)

    calibrate.gather_gradients(model, layers, batches, gathered, done, loss)
    _check_reached(gathered)
    return initials


def _lq_lora(
    model: nn.Module,
    layers: Layers,
    batches: Any,
    started: Starter,
    loss: calibrate.Loss | None,
    tqdm: Any,
    *,
    bits: float | None = None,
    **options: Any,
) -> dict[str, Initial]:
    weights: dict[str, dict[str, Any]] = {name: {} for name in layers}
    if batches is not None:
        gathered = {name: calibrate.Fisher() for name in layers}
        calibrate.gather_gradients(model, layers, batches, gathered, lambda name: None, loss)
        _check_reached([name for name, g in gathered.items() if isinstance(g.rows, float)])
        for name, g in gathered.items():
            weights[name] = dict(zip(("row_w", "col_w"), fisher_weights(g.rows, g.columns), strict=True))  # type: ignore[arg-type]
    chosen: dict[str, dict[str, Any]] = {name: {} for name in layers}
    if bits is not None:
        errors, sizes = [], []
        for name, layer in tqdm(layers.items(), desc="lq_lora, formats"):
            weight = layer.original_weight
            W = (weight.dequantize() if isinstance(weight, NF4Weight) else weight).detach().float()
            candidates = [quantize_nf4(W, *format) for format in FORMATS]
            row_w, col_w = (weights[name].get(key) for key in ("row_w", "col_w"))
            errors.append([weighted_norm(W - Q.dequantize(torch.float32), row_w, col_w) ** 2 for Q in candidates])
            sizes.append([8 * Q.nbytes for Q in candidates])
        elements = sum(layer.in_features * layer.out_features for layer in layers.values())
        for name, c in zip(layers, allocate_bits(errors, sizes, int(bits * elements)), strict=True):
            blocksize, double_quant = FORMATS[c]
            chosen[name]["quantize"] = lambda W, b=blocksize, d=double_quant: quantize_nf4(W, b, d)
    return {name: started(name, **weights[name], **chosen[name], **options) for name in tqdm(layers, desc="lq_lora, layers")}


def _eva(
    model: Model,
    layers: Layers,
    batches: Any,
    started: Starter,
    adapter_name: str,
    *,
    rho: float = 2.0,
    tau: float = 0.99,
    whiten: bool = False,
    adjust_scaling_factors: bool = True,
    use_label_mask: bool = True,
) -> Model:
    if not rho >= 1:
        raise ValueError(f"rho must be >= 1, got {rho!r}")
    r = {name: layer.r[adapter_name] for name, layer in layers.items()}
    gathered = {name: IncrementalPCA(min(round(r[name] * rho), layer.in_features)) for name, layer in layers.items()}

    def rows(batch: Any) -> Any:
        return calibrate.attended(batch if use_label_mask or not isinstance(batch, Mapping) else {**batch, "labels": None})

    def converged() -> bool:
        return all(pca.change is not None and bool((pca.change >= tau).all()) for pca in gathered.values())

    calibrate.gather_inputs(model, layers, batches, gathered, rows=rows, finished=converged)
    _check_reached([name for name, pca in gathered.items() if pca.components is None])
    ranks = redistributed({name: pca.explained_variance_ratio for name, pca in gathered.items()}, sum(r.values()))
    alphas = {
        name: layer.lora_alpha[adapter_name] * (ranks[name] / r[name] if adjust_scaling_factors else 1)
        for name, layer in layers.items()
    }
    initials = {name: started(name, ranks[name], pca=gathered[name], whiten=whiten) for name in layers if ranks[name]}
    for name, layer in layers.items():
        if ranks[name] == 0:
            layer._check_not_merged("initialize")
            layer.delete_adapter(adapter_name)
        else:
            layer.resize(adapter_name, ranks[name], alphas[name])
            layer.set_initial(adapter_name, initials[name], "eva")
    return model


def _layers(model: nn.Module, adapter_name: str) -> Layers:
    layers: Layers = {}
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


def _check_reached(names: Iterable[str]) -> None:
    missing = list(names)
    if missing:
        raise ValueError(f"batches must reach every layer with the adapter, and did not reach {missing[0]}")


def _bar(progress: bool) -> Callable[..., Any]:
    if not progress:
        return lambda items, **_: items
    from tqdm.auto import tqdm

    return tqdm
