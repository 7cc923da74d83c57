"""Merge, and start anew: ReLoRA, COLA, XGBLoRA."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..registry import method
from .merge_restart import MergeAndRestart


@method(
    "ReLoRA",
    equation="every 5000 steps W0 ← W0 + s B A, A random, B = 0, moments pruned",
    use="method = methods.relora(model, every=5000).attach(optimizer)",
    changes="L",
    source="Lialin et al. 2023, https://arxiv.org/abs/2307.05695",
    test="test_restarts.py::test_rank_grows_with_every_restart",
    note="The official code prunes first and second moments independently: where a first one alone is left, and A's gradient "
    "is 0 after the merge, the step is m / eps. Its path that keeps the original weights makes A and B zero: no gradient ever.",
)
def relora(model: nn.Module, every: int = 5000, *, forget: float = 0.999, forget_by: str = "random") -> MergeAndRestart:
    """`MergeAndRestart` that prunes nearly all moments: 0.999 of them at random, or 0.9 by magnitude. Beside it, a learning
    rate that starts anew: `LambdaLR(optimizer, cosine_restarts(total_steps, every))`."""
    return MergeAndRestart(model, every, forget=forget, forget_by=forget_by)


def cosine_restarts(total_steps: int, every: int, *, warmup: int = 100, minimum: float = 0.1) -> Callable[[int], float]:
    """A factor for `torch.optim.lr_scheduler.LambdaLR`: a cosine from 1 to `minimum` over the run, that after every restart
    rises to its value anew, linearly, over `warmup` steps."""

    def factor(step: int) -> float:
        cosine = minimum + (1 - minimum) * 0.5 * (1 + math.cos(math.pi * min(step / total_steps, 1.0)))
        return cosine * min(1.0, (step % every + 1) / max(warmup, 1))

    return factor


@method(
    "COLA",
    equation="W0 ← W0 + s B A at the end of each link of the chain, then a new A, B for what is left",
    use="method = methods.cola(model, every=1000).attach(optimizer)",
    changes="L",
    source="Xia et al. 2024, https://arxiv.org/abs/2401.04151",
    test="test_restarts.py::test_cola_steps_ranks_down",
)
def cola(model: nn.Module, every: int, *, ranks: Sequence[int] = ()) -> MergeAndRestart:
    """`MergeAndRestart` with a new optimiser state for each link, and ranks that may step down, as from 8 to 2."""
    return MergeAndRestart(model, every, ranks=ranks)


@method(
    "XGBLoRA",
    equation="rounds of rank-1 LoRA in some random layers, each merged into W0 at its end",
    use="method = methods.xgblora(model, every=20, layers=1).attach(optimizer)",
    changes="L",
    source="Zhang et al. 2024, https://arxiv.org/abs/2410.19694",
    test="test_restarts.py::test_xgblora_boosts_some_layers",
)
def xgblora(model: nn.Module, every: int, layers: int, *, generator: torch.Generator | None = None) -> MergeAndRestart:
    """`MergeAndRestart` of `layers` random layers per round. Inject LoRA with r = 1 before."""
    return MergeAndRestart(model, every, sample=layers, generator=generator)
