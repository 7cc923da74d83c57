"""Initialisations of a weight in 4 bits: factors that repair what quantising loses. LoftQ, QPiSSA."""

from collections.abc import Callable

from torch import Tensor

from ..quant import NF4Weight, quantize_nf4
from ..registry import method
from .base import Initial, check_rank, initialisation, split
from .low_rank import low_rank

Quantize = Callable[[Tensor], NF4Weight]


@method(
    "LoftQ",
    equation="T times: Q = nf4(W0 − s B A), s B A = SVD_r(W0 − Q); the weight is Q",
    use='add_lora(model, LoraConfig(target_modules="all-linear", init_lora_weights="loftq"), quant="nf4")',
    changes="IQ",
    source="Li et al. 2023, https://arxiv.org/abs/2310.08659",
    test="test_init_quantised.py::test_loftq_is_peft_s_but_for_the_scaling",
    note="PEFT does not divide by the scaling, so that its layer starts with Q + s L R instead of Q + L R; and it runs on a "
    "GPU only. A text calls LoftQ mixed-precision; its code has one precision a run.",
)
@initialisation("loftq")
def loftq(weight: Tensor, r: int, scaling: float, *, loftq_iter: int = 1, quantize: Quantize = quantize_nf4) -> Initial:
    """The weight in 4 bits, and factors of what that loses (Li et al. 2023, https://arxiv.org/abs/2310.08659). From A = B = 0:

        Q = quantize(W0 − scaling · B A)      A, B = √(S_r / scaling) V_rᵀ, U_r √(S_r / scaling) of W0 − Q = U S Vᵀ

    Args:
        loftq_iter: how often, T >= 1. The paper's 5 are better than 1, which PEFT takes.
        quantize: (N, K) → NF4Weight.

    Raises:
        ValueError: r > min(N, K), loftq_iter < 1.
    """
    check_rank(r, weight)
    if loftq_iter < 1:
        raise ValueError(f"loftq_iter must be an integer >= 1, got {loftq_iter!r}")
    product: Tensor | float = 0.0
    for _ in range(loftq_iter):
        Q = quantize((weight - product).float())
        U, S, Vh = low_rank(weight - Q.dequantize(weight.dtype), r)
        product = (U * S) @ Vh
    return split(U, S, Vh, scaling)._replace(weight=Q)


@method(
    "QPiSSA",
    equation="s B A = SVD_r(W0), Q = nf4(W0 − s B A); T − 1 times: s B A = SVD_r(W0 − Q), Q = nf4(W0 − s B A)",
    use='add_lora(model, LoraConfig(target_modules="all-linear", init_lora_weights="pissa"), quant="nf4")',
    changes="IQ",
    source="Meng et al. 2024, https://arxiv.org/abs/2404.02948",
    test="test_init_quantised.py::test_qpissa_loses_less_than_qlora",
)
@initialisation("qpissa")
def qpissa(weight: Tensor, r: int, scaling: float, *, iterations: int = 1, quantize: Quantize = quantize_nf4) -> Initial:
    """PiSSA's factors beside its residual in 4 bits, whose range is smaller than W0's (Meng et al. 2024,
    https://arxiv.org/abs/2404.02948):

        A, B of SVD_r(W0)      Q = quantize(W0 − scaling · B A)      and again, of SVD_r(W0 − Q), `iterations` − 1 times

    With one iteration it is "pissa" of a layer that is quantised.

    Raises:
        ValueError: r > min(N, K), iterations < 1.
    """
    check_rank(r, weight)
    if iterations < 1:
        raise ValueError(f"iterations must be an integer >= 1, got {iterations!r}")
    left = weight
    for _ in range(iterations):
        U, S, Vh = low_rank(left, r)
        Q = quantize((weight - (U * S) @ Vh).float())
        left = weight - Q.dequantize(weight.dtype)
    return split(U, S, Vh, scaling)._replace(weight=Q)
