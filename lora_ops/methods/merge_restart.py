"""Merge, and start anew."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..nn.linear import FusedLoraLinear
from ..quant import NF4Weight
from ..training import TrainingMethod, low_rank_paths
from .ranks import substitute


@torch.no_grad()
def reset_moments(optimizer: Optimizer, parameters: Iterable[nn.Parameter], share: float = 1.0, by: str = "random") -> None:
    """Forgets an optimiser's state of these parameters: all of it, or a share of the elements, at "random" or those whose first
    moment is smallest in "magnitude". The other elements keep all their moments, and the count of steps.

    Raises:
        ValueError: an argument out of its range.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    if by not in ("random", "magnitude"):
        raise ValueError(f'by must be "random" or "magnitude", got {by!r}')
    for p in parameters:
        if share == 1:
            optimizer.state.pop(p, None)
        state = optimizer.state[p].values() if p in optimizer.state else ()
        moments = [t for t in state if isinstance(t, Tensor) and t.shape == p.shape]
        if moments:  # one choice for all: a first moment without its second would be a step without bound
            size = torch.rand_like(moments[0]) if by == "random" else moments[0].abs()
            forgotten = size.view(-1).topk(int(share * p.numel()), largest=False).indices
            for moment in moments:
                moment.view(-1)[forgotten] = 0.0


@torch.no_grad()
def absorb(layer: FusedLoraLinear) -> None:
    """The layer's weight becomes W0 + ΔW of the active adapters, for good, in a parameter of its own.

    Raises:
        RuntimeError: the layer is merged, or has no active adapter.
        ValueError: the weight would not be finite.
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
        model: `FusedLoraLinear`s with a dense weight.
        every: steps, >= 1.
        reinit: makes a layer's adapter anew, called with the layer and the adapter's name. None: A random, B zero.
        forget, forget_by: share of moments, see `reset_moments`.
        ranks: of the adapters after the first, the second, ... restart; the last one stays. None: as they are.
        sample: how many layers train between two restarts, at random. None: all.
        generator: of `sample`.

    Raises:
        ValueError: an argument out of its range, or no layer with LoRA.
        TypeError: a weight in 4 bits.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int,
        *,
        reinit: Callable[[FusedLoraLinear, str], None] | None = None,
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
        for path in self.paths:
            if path.adapter is None:
                raise ValueError(f"model must have FusedLoraLinears, {path.name} is a {type(path.layer).__name__}")
            if isinstance(path.layer.weight, NF4Weight):
                raise TypeError(f"weights must be dense: in 4 bits they cannot take a small update, as in {path.name}")
        self.every, self.forget, self.forget_by, self.ranks = every, forget, forget_by, list(ranks)
        self.reinit = reinit or (lambda layer, name: layer.reset_lora_parameters(name))
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
        for layer in dict.fromkeys(path.layer for path in self.paths):
            absorb(layer)
        for path in self.paths:
            adapter = str(path.adapter)
            if self.ranks:
                _set_rank(path.layer, adapter, self.ranks[min(self.restarts, len(self.ranks)) - 1], self.optimizer)
            self.reinit(path.layer, adapter)
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


def _set_rank(layer: FusedLoraLinear, name: str, r: int, optimizer: Optimizer | None) -> None:
    """New, unfilled factors of that rank."""
    if r == layer.r[name]:
        return
    for factors, shape in ((layer.lora_A, (r, layer.in_features)), (layer.lora_B, (layer.out_features, r))):
        old = factors[name]
        factors[name] = nn.Parameter(old.new_empty(shape), old.requires_grad)
        if optimizer is not None:
            substitute(optimizer, old, factors[name]).clear()
    layer.r[name] = r
    layer.set_scaling(name, layer.lora_alpha[name], layer.use_rslora[name])
