"""Initialisations by a decomposition of the weight: PiSSA, MiLoRA, OLoRA, LoRA-XS."""

import torch
from torch import Tensor, nn

from ..factors.base import Factors
from ..registry import method
from .base import Initial, check_rank, initialisation, split
from .low_rank import low_rank


@method(
    "PiSSA",
    equation="W0 = U S Vᵀ; A = √(S_r/s) V_rᵀ, B = U_r √(S_r/s), W0 ← W0 − s B A",
    use='add_lora(model, LoraConfig(target_modules="all-linear", init_lora_weights="pissa_niter_4"))',
    changes="I",
    source="Meng et al. 2024, https://arxiv.org/abs/2404.02948",
    test="test_init_singular.py::test_pissa_is_peft_s",
    note="PEFT reads a file that says pissa_niter_N with another random start, hence beside another weight, than it was "
    "trained with; here such adapters are saved as plain LoRA.",
)
@initialisation("pissa", offset=True)
def pissa(
    weight: Tensor, r: int, scaling: float, *, niter: int | None = None, generator: torch.Generator | None = None
) -> Initial:
    """The r principal components train, the residual is frozen (Meng et al. 2024, https://arxiv.org/abs/2404.02948):

        W0 = U S Vᵀ      A = √(S_r / scaling) V_rᵀ      B = U_r √(S_r / scaling)      W0 − scaling · B A = Σ_{k>r} S_k u_k v_kᵀ

    Args:
        niter: None: the exact decomposition; otherwise, as PEFT's "pissa_niter_N", N subspace iterations (`low_rank`).

    Raises:
        ValueError: r > min(N, K).
    """
    check_rank(r, weight)
    return split(*low_rank(weight, r, niter=niter, generator=generator), scaling)


@method(
    "MiLoRA",
    equation="as PiSSA, of the r smallest singular values",
    use='add_lora(model, LoraConfig(target_modules="all-linear", init_lora_weights="milora"))',
    changes="I",
    source="Wang et al. 2024, https://arxiv.org/abs/2406.09044",
    test="test_init_singular.py::test_milora_leaves_the_principal_part",
)
@initialisation("milora", offset=True)
def milora(weight: Tensor, r: int, scaling: float) -> Initial:
    """The r minor components train, the principal ones are frozen (Wang et al. 2024, https://arxiv.org/abs/2406.09044): PiSSA's
    formulas with the last r singular triplets.

    Raises:
        ValueError: r > min(N, K).
    """
    check_rank(r, weight)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return split(U[:, -r:], S[-r:], Vh[-r:], scaling)


@method(
    "OLoRA",
    equation="W0 = Q R; A = R_r, B = Q_r, W0 ← W0 − s B A",
    use='add_lora(model, LoraConfig(target_modules="all-linear", init_lora_weights="olora"))',
    changes="I",
    source="Büyükakyüz 2024, https://arxiv.org/abs/2406.01775",
    test="test_init_singular.py::test_olora_is_peft_s",
)
@initialisation("olora", offset=True)
def olora(weight: Tensor, r: int, scaling: float) -> Initial:
    """Orthonormal columns of B (Büyükakyüz 2024, https://arxiv.org/abs/2406.01775): W0 = Q R, A the first r rows of R, B the
    first r columns of Q, the weight W0 − scaling · B A.

    Raises:
        ValueError: r > min(N, K).
    """
    check_rank(r, weight)
    Q, R = torch.linalg.qr(weight)
    return Initial(R[:r], Q[:, :r])


@initialisation("lora_xs")
def lora_xs(weight: Tensor, r: int, scaling: float, *, generator: torch.Generator | None = None) -> Initial:
    """A = S_r V_rᵀ and B = U_r, of W0 = U S Vᵀ, frozen, and a core (r, r) normal with standard deviation 1e-5, which alone
    trains (Bałazy et al. 2024, https://arxiv.org/abs/2405.17604). See `LoraXS`.

    Raises:
        ValueError: r > min(N, K).
    """
    check_rank(r, weight)
    U, S, Vh = low_rank(weight, r)
    return Initial(S[:, None] * Vh, U, core=weight.new_empty(r, r).normal_(std=1e-5, generator=generator))


@method(
    "LoRA-XS",
    equation="y = x W0ᵀ + s ((x Aᵀ) R) Bᵀ, A and B frozen singular vectors of W0, R (r, r) trains",
    use="FactoredLinear(linear, init.LoraXS(linear.weight, r=8), scaling=16 / 8)",
    changes="PI",
    source="Bałazy et al. 2024, https://arxiv.org/abs/2405.17604",
    test="test_init_singular.py::test_lora_xs_trains_a_core_between_singular_vectors",
)
class LoraXS(nn.Module):
    """Factors for `FactoredLinear` in which a core (r, r) alone trains: r² parameters a layer. See `lora_xs`.

    Buffers `lora_A` (r, K) and `lora_B` (N, r), parameter `core` (r, r), float32 (float64 for a float64 weight).

    Args:
        weight: (N, K), of the layer.
        r: rank, at most min(N, K).
        generator: of the core's first values. None: torch's default.
    """

    lora_A: Tensor  # noqa: N815
    lora_B: Tensor  # noqa: N815

    def __init__(self, weight: Tensor, r: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        initial = lora_xs(weight, r, 1.0, generator=generator)
        self.register_buffer("lora_A", initial.lora_A)
        self.register_buffer("lora_B", initial.lora_B)
        assert initial.core is not None
        self.core = nn.Parameter(initial.core)

    def forward(self, x: Tensor) -> Factors:
        return Factors(self.lora_A, self.lora_B, core=self.core)
