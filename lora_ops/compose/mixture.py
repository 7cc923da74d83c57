"""Mixtures of experts in one layer: K low-rank experts whose weights a router computes from the layer's input."""

import math

import torch
from torch import Tensor, nn

from ..factors import Factors
from ..registry import method
from ..stacking import rank_gate
from .experts import SoftmaxRouter


@method(
    "MoLORA",
    equation="y = x W0ᵀ + s Σ_k g_k (x A_kᵀ) B_kᵀ, g = softmax(x W_gᵀ) per token",
    use="FactoredLinear(linear, compose.LoraMixture.of(linear, num_experts=8, r=2), scaling=16 / 2)",
    changes="P",
    source="Zadouri et al. 2023, https://arxiv.org/abs/2309.05444",
    test="test_mixture.py::test_is_the_weighted_sum_of_its_experts",
)
@method(
    "HydraLoRA",
    equation="y = x W0ᵀ + s Σ_k g_k (x Aᵀ) B_kᵀ, one A, g = softmax(x W_gᵀ) per token",
    use="FactoredLinear(linear, compose.LoraMixture.of(linear, num_experts=3, r=8, shared_A=True), scaling=32 / 8)",
    changes="P",
    source="Tian et al. 2024, https://arxiv.org/abs/2404.19245",
    test="test_mixture.py::test_is_the_weighted_sum_of_its_experts",
)
class LoraMixture(nn.Module):
    """Factors of y = x W0ᵀ + s Σ_k g_k (x A_kᵀ) B_kᵀ, g = router(x): one LoRA of rank num_experts · r with a gate per row.

    MoLORA: Zadouri et al., "Pushing Mixture of Experts to the Limit", 2023 (https://arxiv.org/abs/2309.05444). With `shared_A`
    all experts have one A: HydraLoRA, Tian et al. 2024 (https://arxiv.org/abs/2404.19245). Parameters: `lora_A`
    (num_experts · r, K), or (r, K) with `shared_A`; `lora_B` (N, num_experts · r), zero at first; `router`.

    Args:
        in_features, out_features: K and N.
        num_experts, r: how many experts, and the rank of each.
        shared_A: whether they share A.
        router: a module from x to (..., num_experts). None: a `SoftmaxRouter`.
        std: of A's normal initialisation (0.02 in MoLORA). None: uniform in ±1/sqrt(K), as LoRA's.

    Raises:
        ValueError: num_experts or r below 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int = 8,
        r: int = 8,
        *,
        shared_A: bool = False,
        router: nn.Module | None = None,
        std: float | None = None,
    ) -> None:
        for name, value in (("num_experts", num_experts), ("r", r)):
            if value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value}")
        super().__init__()
        self.num_experts, self.r, self.shared_A = num_experts, r, shared_A
        self.lora_A = nn.Parameter(torch.empty(r if shared_A else num_experts * r, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, num_experts * r))
        if std is None:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        else:
            nn.init.normal_(self.lora_A, std=std)
        self.router = SoftmaxRouter(in_features, num_experts) if router is None else router

    @classmethod
    def of(cls, linear: nn.Module, num_experts: int = 8, r: int = 8, **options: object) -> "LoraMixture":
        """For a layer of that size, on its device."""
        N, K = linear.out_features, linear.in_features
        return cls(K, N, num_experts, r, **options).to(linear.weight.device)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Factors:
        A = self.lora_A.repeat(self.num_experts, 1) if self.shared_A else self.lora_A
        return Factors(A, self.lora_B, rank_gate(self.router(x), [self.r] * self.num_experts))


@method(
    "MoV",
    equation="y = z ∘ Σ_k g_k l_k, z = x W0ᵀ + bias, g = softmax(z W_gᵀ) per token",
    use="compose.MixtureOfVectors(linear, num_experts=8)",
    changes="P",
    source="Zadouri et al. 2023, https://arxiv.org/abs/2309.05444",
    test="test_mixture.py::test_vectors_scale_the_output",
)
class MixtureOfVectors(nn.Module):
    """y = z ∘ Σ_k g_k l_k of a frozen layer's output z, g = router(z): a mixture of (IA)3's vectors.

    MoV: Zadouri et al. 2023 (https://arxiv.org/abs/2309.05444). `vectors` (num_experts, N) are 1 at first: y = z.

    Args:
        linear: any module with `out_features`; its parameters are frozen.
        num_experts: how many vectors.
        router: a module from z to (..., num_experts). None: a `SoftmaxRouter`.
    """

    def __init__(self, linear: nn.Module, num_experts: int = 8, router: nn.Module | None = None) -> None:
        super().__init__()
        N: int = linear.out_features  # type: ignore[assignment]
        self.linear = linear.requires_grad_(False)
        self.vectors = nn.Parameter(torch.ones(num_experts, N))
        self.router = SoftmaxRouter(N, num_experts) if router is None else router

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x)
        return (z * (self.router(z) @ self.vectors)).to(z.dtype)
