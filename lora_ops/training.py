"""The protocol of training methods, and what of a model they act on."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .nn.factored import FactoredLinear
from .nn.linear import FusedLoraLinear

Self = TypeVar("Self", bound="TrainingMethod")


class TrainingMethod:
    """What is done around the steps of the user's optimiser:

        loss.backward()
        method.on_backward(step)   # may read and change gradients
        optimizer.step()
        method.on_step(step)       # may change parameters; the gradients are still there
        optimizer.zero_grad()

    step counts the optimiser's steps from 1. In a `transformers.Trainer`, `lora_ops.methods.trainer_callback` makes the calls.

    Args:
        parts: methods that this one consists of, called in order.
    """

    optimizer: Optimizer | None = None  # of those that need its state or its learning rate

    def __init__(self, *parts: "TrainingMethod") -> None:
        self.parts = parts

    def attach(self: Self, optimizer: Optimizer) -> Self:
        """Tells the method which optimiser takes the steps. It never takes one itself."""
        self.optimizer = optimizer
        for part in self.parts:
            part.attach(optimizer)
        return self

    def on_backward(self, step: int) -> None:
        for part in self.parts:
            part.on_backward(step)

    def on_step(self, step: int) -> None:
        for part in self.parts:
            part.on_step(step)

    def _attached(self) -> Optimizer:
        if self.optimizer is None:
            raise RuntimeError(f"{type(self).__name__} needs the optimiser; call attach(optimizer) first")
        return self.optimizer


@dataclass(frozen=True)
class Path:
    """A low-rank path of a model: scaling · B diag(gate) A beside a frozen weight. Its tensors are read where they live."""

    name: str  # the layer's
    layer: Any  # FusedLoraLinear or FactoredLinear
    adapter: str | None = None  # of a FusedLoraLinear

    @property
    def pair(self) -> nn.Module:
        """What has lora_A and lora_B, of a FactoredLinear: its provider's `pair`, or the provider."""
        return getattr(self.layer.factors, "pair", self.layer.factors)

    @property
    def lora_A(self) -> nn.Parameter:
        """(r, K)"""
        return self.pair.lora_A if self.adapter is None else self.layer.lora_A[self.adapter]  # type: ignore[return-value]

    @property
    def lora_B(self) -> nn.Parameter:
        """(N, r)"""
        return self.pair.lora_B if self.adapter is None else self.layer.lora_B[self.adapter]  # type: ignore[return-value]

    @property
    def gate(self) -> Tensor | None:
        """(r,), or None where the path has none."""
        return getattr(self.layer.factors, "gate", None) if self.adapter is None else None

    @property
    def scaling(self) -> float:
        return self.layer.scaling if self.adapter is None else self.layer.scaling[self.adapter]

    @torch.no_grad()
    def reset(self) -> None:
        """A anew, uniform in ±1/√K, and B zero: the path changes nothing. Gates stay what they are."""
        if self.adapter is not None:
            self.layer.reset_lora_parameters(self.adapter)
            return
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)


def low_rank_paths(model: nn.Module, *, gated: bool = False) -> list[Path]:
    """The paths of the model's `FusedLoraLinear`s, one for each active adapter, and of those of its `FactoredLinear`s whose
    provider, or its attribute `pair`, has parameters `lora_A` and `lora_B`, each provider once.

    Args:
        gated: only those with a gate, a provider's attribute `gate` (r,).

    Raises:
        ValueError: there are none.
    """
    found = [path for path in _paths(model) if not gated or path.gate is not None]
    if not found:
        wanted = "a FactoredLinear whose provider has lora_A, lora_B and gate" if gated else "LoRA; see add_lora"
        raise ValueError(f"model must have a layer with {wanted}; {type(model).__name__} has none")
    return found


def _paths(model: nn.Module) -> Iterator[Path]:
    providers = set()
    for name, layer in model.named_modules():
        if isinstance(layer, FusedLoraLinear):
            yield from (Path(name, layer, adapter) for adapter in layer.active_adapters)
        elif isinstance(layer, FactoredLinear) and layer.factors not in providers:
            providers.add(layer.factors)
            path = Path(name, layer)
            if all(isinstance(getattr(path.pair, factor, None), nn.Parameter) for factor in ("lora_A", "lora_B")):
                yield path
