"""LoRA-GA: the first step of training goes where full fine-tuning's would."""

import torch
from torch import Tensor

from ..registry import method
from .base import Initial, check_rank, initialisation
from .low_rank import low_rank

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")


@method(
    "LoRA-GA",
    equation="G = ∂L/∂W0 = U S Vᵀ; A = k V[:, :r]ᵀ, B = k U[:, r:2r], k = N^¼ / √γ, W0 ← W0 − s B A, s = α / √r",
    use='init.initialize(model, "lora_ga", batches)',
    changes="ID",
    source="Wang et al. 2024, https://arxiv.org/abs/2407.05000; code: Outsider565/LoRA-GA",
    test="test_init_lora_ga.py::test_the_first_step_is_full_fine_tuning_s_best_of_rank_2r",
    note='PEFT\'s "lora_ga" is another initialisation (here "lora_ga_peft"): B has the singular values and A is not scaled, so '
    "that its first step is not along the gradient; its N is K in a Conv1D, and a saved adapter is read without its offset, "
    "hence beside another weight. Directions, scales and norm_clip are the authors' code's, which subtracts the product of "
    "factors that it rounds afterwards. On digits (docs/study) it is more than twice as fast as LoRA also where each has its "
    "own learning rate, and ends no better; other starts that are not zero are nearly as fast.",
)
@initialisation("lora_ga", offset=True, calibrated=True)
def lora_ga(
    weight: Tensor,
    r: int,
    scaling: float,
    *,
    G: Tensor,
    direction: str = "ArB2r",
    scale: str = "stable",
    stable_gamma: float = 16,
    niter: int | None = 4,
    norm_clip: bool = False,
    generator: torch.Generator | None = None,
) -> Initial:
    """The first step of SGD moves the weight along the best approximation of rank 2r of full fine-tuning's step, in the
    limit of small learning rates (Wang et al. 2024, https://arxiv.org/abs/2407.05000):

        G = U S Vᵀ      A = k V[:, :r]ᵀ      B = k U[:, r:2r]      and the weight W0 − scaling · B A

    With k = N^¼ / √stable_gamma and scaling = lora_alpha / √r (`use_rslora`) the variance of scaling · x Aᵀ Bᵀ depends neither
    on r nor on the widths: (lora_alpha / stable_gamma)² for x of variance 1.

    Args:
        G: (N, K), the gradient of the loss for the weight, of any scale.
        direction: "ArB2r" (A the first r of 2r directions, B the others), "A2rBr" (the reverse), "ArBr" (B the first,
            third, ..., A the second, ...) or "random" (2r drawn to r and r).
        scale: "stable" (above); "gd" (k = 1 / scaling: the step has full fine-tuning's own length); "unit" (k = 1); "weightS"
            (k = the mean of √(S_W / scaling) over the first r singular values S_W of the weight).
        stable_gamma: γ > 0.
        niter: of 4r directions in subspace iteration (`low_rank`). None: the exact decomposition.
        norm_clip: shrink A and B so that no element of scaling · B A is larger than the weight's largest.
        generator: of the start of the iteration, and of "random".

    Raises:
        ValueError: 2 r > min(N, K), or an argument that does not fit.
    """
    if scale not in ("stable", "gd", "unit", "weightS"):
        raise ValueError(f'scale must be "stable", "gd", "unit" or "weightS", got {scale!r}')
    U, _, Vh = _leading(G, r, niter, generator)
    of_A, of_B = _divided(direction, r, generator)
    k = 1.0
    if scale == "stable":
        k = _stable(weight, stable_gamma)
    elif scale == "gd":
        k = 1 / scaling
    elif scale == "weightS":
        k = (low_rank(weight, r, niter=niter, q=4 * r, generator=generator)[1] / scaling).sqrt().mean().item()
    A, B = k * Vh[of_A], k * U[:, of_B]
    if norm_clip:
        ratio = weight.abs().max() / (scaling * (B @ A)).abs().max()
        A, B = (t * ratio.clamp(max=1).sqrt() for t in (A, B))
    return Initial(A, B)


@initialisation("lora_ga_peft", offset=True, calibrated=True)
def lora_ga_peft(
    weight: Tensor,
    r: int,
    scaling: float,
    *,
    G: Tensor,
    direction: str = "ArB2r",
    scale: str = "stable",
    stable_gamma: float = 16,
    niter: int | None = 4,
    generator: torch.Generator | None = None,
) -> Initial:
    """What PEFT 0.21 calls "lora_ga": A = V[:, :r]ᵀ, B = k U[:, r:2r] diag(S[r:2r]), which does not have LoRA-GA's property.
    For runs that shall be PEFT's.

    Args:
        G, direction, stable_gamma, niter, generator: as of `lora_ga`, but that "random" draws the same r directions for A
            and B.
        scale: "stable"; "weight_svd" (k = the weight's largest singular value / B's first); "gd_scale" (A and B are divided by
            scaling); "unit".

    Raises:
        ValueError: 2 r > min(N, K), or an argument that does not fit.
    """
    if scale not in ("stable", "weight_svd", "gd_scale", "unit"):
        raise ValueError(f'scale must be "stable", "weight_svd", "gd_scale" or "unit", got {scale!r}')
    U, S, Vh = _leading(G, r, niter, generator)
    of_A, of_B = _divided(direction, r, generator)
    if direction == "random":
        of_B = of_A
    A, B = Vh[of_A], U[:, of_B] * S[of_B]
    if scale == "stable":
        B = B * _stable(weight, stable_gamma)
    elif scale == "weight_svd" and S[of_B][0] > 0:
        B = B * (low_rank(weight, r, niter=niter, generator=generator)[1][0] / S[of_B][0])
    elif scale == "gd_scale":
        A, B = A / scaling, B / scaling
    return Initial(A, B)


def _leading(G: Tensor, r: int, niter: int | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    check_rank(r, G, factor=2)
    if not G.any():
        raise ValueError("G is zero: the loss does not depend on the weight")
    return low_rank(G, 2 * r, niter=niter, q=4 * r, generator=generator)


def _divided(direction: str, r: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Which of 2r directions are A's, and which B's."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    order = torch.arange(2 * r)
    if direction == "random":
        order = torch.randperm(2 * r, generator=generator)
    if direction == "ArBr":
        return order[1::2], order[::2]
    first, second = order[:r], order[r:]
    return (second, first) if direction == "A2rBr" else (first, second)


def _stable(weight: Tensor, gamma: float) -> float:
    if not gamma > 0:
        raise ValueError(f"stable_gamma must be > 0, got {gamma!r}")
    return len(weight) ** 0.25 / gamma**0.5
