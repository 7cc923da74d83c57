"""Methods that live on the singular value decomposition of W0 = U diag(S) Vᵀ."""

import torch
from torch import Tensor, nn

from ..registry import method
from .base import Factors, check_rank, wide_weight
from .pair import Gated, Pair


def _svd(linear: nn.Module, r: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U (N, r), S (r,) and Vᵀ (r, K), the largest r of them; None: all."""
    weight = wide_weight(linear)
    if r is not None:
        check_rank(r, (weight.shape[0], weight.shape[1]))
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return U[:, :r].contiguous(), S[:r].clone(), Vh[:r].contiguous()


@method(
    "SAM-PARSER",
    equation="ΔW = U diag(gate) Vᵀ, gate (min(N, K),) = 0 at first",
    use="FactoredLinear(linear, factors.sam_parser(linear))",
    changes="P",
    source="Peng et al. 2023, https://arxiv.org/abs/2308.14604",
    test="test_factors_spectral.py::test_singular_values_train",
)
def sam_parser(linear: nn.Module) -> Gated:
    """The singular values of W0 train, U and V stay. Of full rank: it runs, and nothing is gained over W0's own product."""
    U, S, Vh = _svd(linear)
    return Gated(Pair(Vh, U, train=()), gate=torch.zeros_like(S))


@method(
    "SVDiff",
    equation="ΔW = U diag(relu(S + shift) - S) Vᵀ, shift (min(N, K),) = 0 at first",
    use="FactoredLinear(linear, factors.SVDiff(linear))",
    changes="P",
    source="Han et al. 2023, https://arxiv.org/abs/2303.11305; code: mkshing/svdiff-pytorch",
    test="test_factors_spectral.py::test_singular_values_train",
)
class SVDiff(nn.Module):
    """`sam_parser` with singular values that stay >= 0."""

    S: Tensor  # (min(N, K),)

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        U, S, Vh = _svd(linear)
        self.pair = Pair(Vh, U, train=())
        self.register_buffer("S", S)
        self.shift = nn.Parameter(torch.zeros_like(S))

    def forward(self, x: Tensor) -> Factors:
        return Factors(self.pair.lora_A, self.pair.lora_B, gate=torch.relu(self.S + self.shift) - self.S)


@method(
    "Spectral Adapter",
    equation="ΔW = (U_r + dU) diag(S_r) (V_r + dV)ᵀ - U_r diag(S_r) V_rᵀ, dU (N, r) and dV (K, r) = 0 at first",
    use="FactoredLinear(linear, factors.SpectralAdapter(linear, r=8))",
    changes="P",
    source="Zhang and Pilanci 2024, https://arxiv.org/abs/2405.13952; code: pilancilab/spectral_adapter",
    test="test_factors_spectral.py::test_spectral_adapter_is_the_product_that_it_expands",
    note="Its three terms have rank 2r together: dU S Vᵀ + (U + dU) S dVᵀ.",
)
class SpectralAdapter(nn.Module):
    """The top r singular vectors of W0 train, additively.

    A = [V_rᵀ; dVᵀ] (2r, K), B = [dU, U_r + dU] (N, 2r), gate = [S_r, S_r]: W0 never has anything subtracted from it, so that
    the layer starts as W0 exactly.
    """

    U: Tensor  # (N, r)
    Vh: Tensor  # (r, K)
    gate: Tensor  # (2r,)

    def __init__(self, linear: nn.Module, r: int = 8) -> None:
        super().__init__()
        U, S, Vh = _svd(linear, r)
        for name, t in {"U": U, "Vh": Vh, "gate": torch.cat([S, S])}.items():
            self.register_buffer(name, t)
        self.dU, self.dVh = nn.Parameter(torch.zeros_like(U)), nn.Parameter(torch.zeros_like(Vh))

    def forward(self, x: Tensor) -> Factors:
        return Factors(torch.cat([self.Vh, self.dVh]), torch.cat([self.dU, self.U + self.dU], dim=1), self.gate)
