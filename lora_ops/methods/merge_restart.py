"""Merge, and start anew."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from ..factors import Gated
from ..nn.factored import FactoredLinear
from ..nn.linear import FusedLoraLinear
from ..optim.state import reset_moments, substitute
from ..quant import NF4Weight
from ..training import Path, TrainingMethod, low_rank_paths


@torch.no_grad()
def absorb(layer: FusedLoraLinear | FactoredLinear) -> None:
    """The layer's weight becomes W0 + ΔW, of the active adapters or of the provider, for good, in a parameter of its own.

    Raises:
        RuntimeError: the layer is merged, or has no active adapter.
        ValueError: the weight would not be finite, or the factors depend on x.
        TypeError: the weight is in 4 bits, which would round ΔW away.
    """
    if isinstance(layer.weight, NF4Weight):
        raise TypeError("weight must be dense: in 4 bits it cannot take a small update, got " + str(layer.weight.dtype))
    layer.merge()
    layer.unmerged_weight = layer.unmerged_bias = None


class MergeAndRestart(TrainingMethod):
    """After every `every` steps: W0 ← W0 + ΔW, new A and B that change nothing, and the optimiser forgets their moments. After
    k restarts the whole update has rank up to (k + 1) r.

    Needs `attach`. With LoRA-GA's initialisation as `reinit` it is LoRA-GA with restarts.

    Args:
        model: `FusedLoraLinear`s, and `FactoredLinear`s whose provider is a `Gated` without out_scale, with dense weights. What
            several layers share is merged into each of them, and made anew once.
        every: steps, >= 1.
        reinit: makes a path's A and B anew. By default A random, B zero.
        forget, forget_by: share of moments, see `reset_moments`.
        ranks: of the adapters after the first, the second, ... restart; the last one stays. (): as they are, as they must be in
            a `FactoredLinear`.
        sample: how many paths train between two restarts, at random. None: all.
        generator: of `sample`.

    Raises:
        ValueError: an argument out of its range, no layer with LoRA, or a provider of another kind.
        TypeError: a weight in 4 bits.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int,
        *,
        reinit: Callable[[Path], None] = Path.reset,
        forget: float = 1.0,
        forget_by: str = "random",
        ranks: Sequence[int] = (),
        sample: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.paths = low_rank_paths(model)
        if every < 1:
            raise ValueError(f"every must be >= 1, got {every}")
        if sample is not None and not 1 <= sample <= len(self.paths):
            raise ValueError(f"sample must be between 1 and {len(self.paths)} layers, got {sample}")
        self.layers = _layers_of(model, self.paths)
        for name, layer in self.layers.items():
            if isinstance(layer.weight, NF4Weight):
                raise TypeError(f"weights must be dense: in 4 bits they cannot take a small update, as in {name}")
            if isinstance(layer, FactoredLinear):
                _check_provider(name, layer.factors, ranks)
        self.every, self.forget, self.forget_by, self.ranks = every, forget, forget_by, list(ranks)
        self.reinit = reinit
        self.sample, self.generator = sample, generator
        self.restarts = 0
        self._choose()

    def on_step(self, step: int) -> None:
        if step % self.every == 0:
            self._attached()
            self.restart()

    def restart(self) -> None:
        """Merges now."""
        self.restarts += 1
        for layer in self.layers.values():
            absorb(layer)
        for path in self.paths:
            if self.ranks:
                _set_rank(path, self.ranks[min(self.restarts, len(self.ranks)) - 1], self.optimizer)
            self.reinit(path)
        factors = [p for path in self.paths for p in (path.lora_A, path.lora_B)]
        if self.optimizer is not None:
            reset_moments(self.optimizer, factors, self.forget, self.forget_by)
        for p in factors:
            p.grad = None
        self._choose()

    def _choose(self) -> None:
        if self.sample is None:
            return
        chosen = set(torch.randperm(len(self.paths), generator=self.generator)[: self.sample].tolist())
        for i, path in enumerate(self.paths):
            for p in (path.lora_A, path.lora_B):
                p.requires_grad_(i in chosen)


def _layers_of(model: nn.Module, paths: Sequence[Path]) -> dict[str, FusedLoraLinear | FactoredLinear]:
    """The layers of the paths, and those that have a path's A and B as well, by their names."""
    owners = {path.pair for path in paths if path.adapter is None}
    layers = {path.name: path.layer for path in paths}
    for name, layer in model.named_modules():
        if isinstance(layer, FactoredLinear) and Path(name, layer).pair in owners:
            layers[name] = layer
    return layers


def _check_provider(name: str, provider: nn.Module, ranks: Sequence[int]) -> None:
    if not isinstance(provider, Gated) or provider.out_scale is not None:
        got = type(provider).__name__
        raise ValueError(f"model must have FusedLoraLinears, or factors that are Gated without out_scale, got {got} in {name}")
    if ranks:
        raise ValueError(f"ranks must be () for a FactoredLinear, such as {name}, got {list(ranks)}")


def _set_rank(path: Path, r: int, optimizer: Optimizer | None) -> None:
    """New, unfilled factors of that rank, of a FusedLoraLinear."""
    layer, name = path.layer, path.adapter
    if r == layer.r[name]:
        return
    for factors, shape in ((layer.lora_A, (r, layer.in_features)), (layer.lora_B, (layer.out_features, r))):
        old = factors[name]
        factors[name] = nn.Parameter(old.new_empty(shape), old.requires_grad)
        if optimizer is not None:
            substitute(optimizer, old, factors[name]).clear()
    layer.r[name] = r
    layer.set_scaling(name, layer.lora_alpha[name], layer.use_rslora[name])
