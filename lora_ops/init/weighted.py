"""Initialisations of a weight in 4 bits by what matters of the loss: as inputs see it, or gradients. LQER, LQ-LoRA."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..quant import NF4Weight, quantize_nf4
from ..registry import method
from .base import Initial, check_rank, initialisation, split
from .low_rank import low_rank
from .quantised import Quantize


@method(
    "LQER",
    equation="Q = nf4(W0), s B A = SVD_r((W0 − Q) diag(a)) diag(a)⁻¹, a = mean |x|",
    use='init.initialize(model, "lqer", batches, quant="nf4")',
    changes="DQ",
    source="Zhang et al. 2024, https://arxiv.org/abs/2402.02446",
    test="test_init_quantised.py::test_lqer_repairs_what_the_inputs_see",
)
@initialisation("lqer")
def lqer(
    weight: Tensor,
    r: int,
    scaling: float,
    *,
    X: Tensor | None = None,
    col_w: Tensor | None = None,
    quantize: Quantize = quantize_nf4,
) -> Initial:
    """Factors of the quantisation error as the inputs see it, for inference (Zhang et al. 2024,
    https://arxiv.org/abs/2402.02446): Q = quantize(W0), and of the decomposition (W0 − Q) diag(a) = U S Vᵀ,

        A = √(S_r / scaling) V_rᵀ diag(a)⁻¹      B = U_r √(S_r / scaling)      a_k = mean |x_k|, at least 1e-4

    Args:
        X: (M, K) inputs. Without X and col_w a = 1 (LQER without activations, and LoftQ of one iteration).
        col_w: (K,), a itself.

    Raises:
        ValueError: r > min(N, K).
    """
    check_rank(r, weight)
    if col_w is None and X is not None:
        col_w = X.abs().mean(0)
    Q = quantize(weight.float())
    col_w = None if col_w is None else col_w.clamp(min=1e-4)
    return split(*low_rank(weight - Q.dequantize(weight.dtype), r, col_w=col_w), scaling)._replace(weight=Q)


@method(
    "LQ-LoRA",
    equation="in turn: s B A = argmin ‖√F ∘ (W0 − Q − s B A)‖ for F ≈ f_rows f_colsᵀ, Q = nf4(W0 − s B A), while it falls",
    use='init.initialize(model, "lq_lora", batches, quant="nf4", bits=4.2)',
    changes="IDQ",
    source="Guo et al. 2023, https://arxiv.org/abs/2311.12023",
    test="test_init_quantised.py::test_lq_lora_is_the_best_for_a_fisher_matrix_of_rank_one",
    note="Its integer linear programme is exact dynamic programming here, over the formats that the kernels have.",
)
@initialisation("lq_lora")
def lq_lora(
    weight: Tensor,
    r: int,
    scaling: float,
    *,
    G: Tensor | None = None,
    row_w: Tensor | None = None,
    col_w: Tensor | None = None,
    iterations: int = 100,
    quantize: Quantize = quantize_nf4,
) -> Initial:
    """LoftQ's alternation weighted by the Fisher matrix F ≈ E[G ∘ G], as far as its rows and columns tell (Guo et al. 2023,
    https://arxiv.org/abs/2311.12023). With row_w = √(mean of F over columns), col_w = √(mean of F over rows):

        A, B: the r leading components of diag(row_w) (W0 − Q) diag(col_w), unweighted      Q = quantize(W0 − scaling · B A)

    from Q = 0, until the weighted error ‖diag(row_w) (W0 − Q − scaling · B A) diag(col_w)‖ rises; the best is kept.

    Args:
        G: (N, K), a gradient for the weight. Without G and weights F is constant.
        row_w, col_w: (N,) and (K,), positive; instead of G.
        iterations: at most so many.

    Raises:
        ValueError: r > min(N, K), iterations < 1.
    """
    check_rank(r, weight)
    if iterations < 1:
        raise ValueError(f"iterations must be an integer >= 1, got {iterations!r}")
    if G is not None and row_w is None and col_w is None:
        row_w, col_w = fisher_weights(G.square().mean(1), G.square().mean(0))
    best: _Kept | None = None
    left = weight
    for _ in range(iterations):
        U, S, Vh = low_rank(left, r, row_w, col_w)
        product = (U * S) @ Vh
        Q = quantize((weight - product).float())
        left = weight - Q.dequantize(weight.dtype)
        error = weighted_norm(left - product, row_w, col_w)
        if best is not None and error >= best.error:
            break
        best = _Kept(error, U, S, Vh, Q)
    assert best is not None
    return split(best.U, best.S, best.Vh, scaling)._replace(weight=best.Q)


class _Kept(NamedTuple):
    error: float
    U: Tensor
    S: Tensor
    Vh: Tensor
    Q: NF4Weight


def fisher_weights(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """row_w (N,) and col_w (K,) from the means of F over columns, (N,), and over rows, (K,); no row or column is forgotten
    altogether, so that nothing is divided by zero."""
    row_w, col_w = (mean.sqrt() for mean in (rows, columns))
    return row_w.clamp(min=1e-4 * float(row_w.max()) or 1.0), col_w.clamp(min=1e-4 * float(col_w.max()) or 1.0)


def weighted_norm(M: Tensor, row_w: Tensor | None, col_w: Tensor | None) -> float:
    """‖diag(row_w) M diag(col_w)‖, Frobenius."""
    M = M if row_w is None else row_w[:, None].to(M.dtype) * M
    return torch.linalg.vector_norm(M if col_w is None else M * col_w.to(M.dtype)).item()
