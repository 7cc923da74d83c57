"""How the initialisations that need data or gradients get them from a model."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..nn.linear import FusedLoraLinear
from ..nn.own_weights import quantizes
from ..quant import quantize_nf4
from . import calibrate
from .base import Initial, Initialisation
from .bits import choose_formats
from .eva import IncrementalPCA, redistributed
from .statistics import Covariance, Fisher, MeanGradient, MeanMagnitude
from .weighted import fisher_weights


@dataclass
class Plan:
    """What `initialize` will do, gathered before anything of the model is changed."""

    model: nn.Module
    layers: dict[str, FusedLoraLinear]
    adapter_name: str
    init: Initialisation
    loss: calibrate.Loss | None
    generator: torch.Generator | None
    bar: Callable[..., Any]  # tqdm, or something like it that shows nothing
    quant: str | None
    blocksize: int
    double_quant: bool
    initials: dict[str, Initial] = field(default_factory=dict)  # of a layer that is missing the adapter goes
    ranks: dict[str, tuple[int, float]] = field(default_factory=dict)  # (r, lora_alpha) of layers that change them
    formats: dict[str, tuple[int, bool]] = field(default_factory=dict)  # (blocksize, double_quant), where chosen

    def start(self, name: str, r: int | None = None, **given: Any) -> None:
        """Computes what the layer of that name begins with."""
        layer = self.layers[name]
        if quantizes(self.init):
            blocksize, double_quant = self.formats.get(name, (self.blocksize, self.double_quant))
            given["quantize"] = lambda W: quantize_nf4(W, blocksize, double_quant, self.quant or "nf4")
        try:
            initial = self.init(
                layer.weight_for(self.init),
                r or layer.r[self.adapter_name],
                layer.scaling[self.adapter_name],
                dtype=layer.lora_A[self.adapter_name].dtype,
                generator=self.generator,
                **given,
            )
            if initial.core is not None:
                raise ValueError("init must give no core, which FactoredLinear alone has (see LoraXS)")
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}: {error}; the model was left untouched") from error
        if initial.weight is not None and self.quant is None:
            initial = initial._replace(weight=layer.in_own_format(initial.weight))
        self.initials[name] = initial


def plan(plan: Plan, init: str, batches: Iterable[Any] | None, options: Mapping[str, Any]) -> None:
    """Fills in the plan, by the strategy that the initialisation of that name has."""
    if init == "eva":
        _eva(plan, batches, **options)
    elif init in ("lora_ga", "lora_ga_peft"):
        _of_gradients(plan, batches, options)
    elif init == "lq_lora":
        _lq_lora(plan, batches, **options)
    else:
        _of_inputs(plan, batches, init, options)


def _of_inputs(plan: Plan, batches: Any, init: str, options: Mapping[str, Any]) -> None:
    kinds: dict[str, tuple[Any, str]] = {
        "corda": (Covariance, "covariance"),
        "lqer": (MeanMagnitude, "col_w"),
    }
    gathered: dict[str, Any] = {}
    kind, option = kinds.get(init, (None, ""))
    if kind is not None and batches is not None and option not in options:
        gathered = {name: kind() for name in plan.layers}
        calibrate.gather_inputs(plan.model, plan.layers, batches, gathered)
        _check_reached([name for name, g in gathered.items() if g.count == 0])
    for name in plan.bar(plan.layers, desc=f"{init}, layers"):
        mean = gathered.pop(name, None)
        plan.start(name, **({} if mean is None else {option: mean.total / mean.count}), **options)


def _of_gradients(plan: Plan, batches: Any, options: Mapping[str, Any]) -> None:
    gathered = {name: MeanGradient(layer.original_weight.dtype) for name, layer in plan.layers.items()}

    def done(name: str) -> None:
        plan.start(name, G=gathered.pop(name).total, **options)

    calibrate.gather_gradients(plan.model, plan.layers, batches, gathered, done, plan.loss)
    for name in [name for name, g in gathered.items() if g.total is not None]:  # that the last batch did not reach
        done(name)
    _check_reached(gathered)


def _lq_lora(plan: Plan, batches: Any, *, bits: float | None = None, **options: Any) -> None:
    weights: dict[str, dict[str, Any]] = {name: {} for name in plan.layers}
    if batches is not None:
        gathered = {name: Fisher() for name in plan.layers}
        calibrate.gather_gradients(plan.model, plan.layers, batches, gathered, lambda name: None, plan.loss)
        _check_reached([name for name, g in gathered.items() if isinstance(g.rows, float)])
        for name, g in gathered.items():
            weights[name] = dict(zip(("row_w", "col_w"), fisher_weights(g.rows, g.columns), strict=True))  # type: ignore[arg-type]
    if bits is not None:
        if plan.quant is None:
            raise ValueError(f"bits must be None without quant, got {bits!r}")
        dense = ((layer.weight_for(plan.init), weights[name]) for name, layer in plan.layers.items())
        of_layers = plan.bar(dense, desc="lq_lora, formats", total=len(plan.layers))
        plan.formats |= zip(plan.layers, choose_formats(of_layers, bits, plan.quant), strict=True)
    for name in plan.bar(plan.layers, desc="lq_lora, layers"):
        plan.start(name, **weights[name], **options)


def _eva(
    plan: Plan,
    batches: Any,
    *,
    rho: float = 2.0,
    tau: float = 0.99,
    whiten: bool = False,
    adjust_scaling_factors: bool = True,
    use_label_mask: bool = True,
) -> None:
    if not rho >= 1:
        raise ValueError(f"rho must be >= 1, got {rho!r}")
    r = {name: layer.r[plan.adapter_name] for name, layer in plan.layers.items()}
    gathered = {name: IncrementalPCA(min(round(r[name] * rho), layer.in_features)) for name, layer in plan.layers.items()}

    def rows(batch: Any) -> Any:
        return calibrate.attended(batch if use_label_mask or not isinstance(batch, Mapping) else {**batch, "labels": None})

    def converged() -> bool:
        return all(pca.change is not None and bool((pca.change >= tau).all()) for pca in gathered.values())

    calibrate.gather_inputs(plan.model, plan.layers, batches, gathered, rows=rows, finished=converged)
    _check_reached([name for name, pca in gathered.items() if pca.components is None])
    ranks = redistributed({name: pca.explained_variance_ratio for name, pca in gathered.items()}, sum(r.values()))
    for name, layer in plan.layers.items():
        if ranks[name] == 0:
            continue
        lora_alpha = layer.lora_alpha[plan.adapter_name] * (ranks[name] / r[name] if adjust_scaling_factors else 1)
        if ranks[name] != r[name]:
            plan.ranks[name] = ranks[name], lora_alpha
        plan.start(name, ranks[name], pca=gathered[name], whiten=whiten)


def _check_reached(names: Iterable[str]) -> None:
    missing = list(names)
    if missing:
        raise ValueError(f"batches must reach every layer with the adapter, and did not reach {missing[0]}")
