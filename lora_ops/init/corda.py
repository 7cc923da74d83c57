"""CorDA: singular vectors of the weight as the inputs see it."""

import torch
from torch import Tensor

from ..registry import method
from .base import Initial, check_rank, initialisation, split


@method(
    "CorDA",
    equation="W0 C = U S Vᵀ, V̂ᵀ = Vᵀ C⁻¹; A = √(S/s) V̂ᵀ, B = U √(S/s) of the first (IPM) or last (KPM) r, W0 ← W0 − s B A",
    use='init.initialize(model, "corda", batches, corda_method="kpm")',
    changes="ID",
    source="Yang et al. 2024, https://arxiv.org/abs/2406.05223",
    test="test_init_data.py::test_corda_is_peft_s",
    note="The official code and PEFT divide inputs by |max x|, which may be 0, instead of max |x|; PEFT takes batches of one "
    "sequence only, and reads a saved adapter only beside the statistics that it was made of.",
)
@initialisation("corda", offset=True, calibrated=True)
def corda(
    weight: Tensor,
    r: int,
    scaling: float,
    *,
    X: Tensor | None = None,
    covariance: Tensor | None = None,
    corda_method: str = "ipm",
) -> Initial:
    """Components of the weight oriented by its inputs (Yang et al. 2024, https://arxiv.org/abs/2406.05223):

        C = Xᵀ X of X / max |X|      W0 C = U S Vᵀ      V̂ᵀ = Vᵀ C⁻¹      A = √(S_r / scaling) V̂_rᵀ      B = U_r √(S_r / scaling)

    and the weight W0 − scaling · B A. "ipm" (instruction-previewed) trains the r largest components, "kpm"
    (knowledge-preserved) the r smallest: the outputs for such inputs hardly depend on them. C is damped until it can be
    inverted: 0.01, 0.02, 0.04, ... of its mean diagonal are added to the diagonal until ‖C C⁻¹ − 1‖ < 0.05.

    Args:
        X: (M, K) inputs.
        covariance: C (K, K), instead of X.
        corda_method: "ipm" or "kpm".

    Raises:
        ValueError: r > min(N, K), an argument that does not fit, or a covariance that cannot be inverted.
    """
    check_rank(r, weight)
    if corda_method not in ("ipm", "kpm"):
        raise ValueError(f'corda_method must be "ipm" or "kpm", got {corda_method!r}')
    if (X is None) == (covariance is None):
        raise ValueError("X must be given for 'corda', or covariance (K, K)")
    C = input_covariance(X) if X is not None else covariance
    assert C is not None
    damped, inverse = _inverted(C.to(weight.dtype))
    U, S, Vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    kept = slice(0, r) if corda_method == "ipm" else slice(len(S) - r, len(S))
    return split(U[:, kept], S[kept], Vh[kept] @ inverse, scaling)


def input_covariance(X: Tensor) -> Tensor:
    """Xᵀ X (K, K) of inputs X (M, K) divided by their largest magnitude."""
    largest = X.abs().max()
    X = X / largest if largest > 0 else X
    return X.T @ X


def _inverted(C: Tensor) -> tuple[Tensor, Tensor]:
    """C with damping, and the inverse of that."""
    eye = torch.eye(len(C), dtype=C.dtype, device=C.device)
    diagonal = C.diagonal().mean()
    damping = 0.01
    while damping < 100:
        damped = C + damping * diagonal * eye
        inverse, info = torch.linalg.inv_ex(damped)
        if info == 0 and torch.dist(damped @ inverse, eye) < 0.05:
            return damped, inverse
        damping *= 2
    raise ValueError(f"covariance cannot be inverted: its mean diagonal is {float(diagonal):.3g}")
