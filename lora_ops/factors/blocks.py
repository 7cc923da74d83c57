"""Factors with structure: blocks on the diagonal, pooled columns."""

import torch
from torch import Tensor, nn

from ..registry import method
from .base import Factors, check_divides, check_positive, shape_of


@method(
    "MELoRA",
    equation="A = diag(A_1 ... A_n), B = diag(B_1 ... B_n), A_k (r, K / n), B_k (N / n, r): rank n · r, parameters of rank r",
    use="FactoredLinear(linear, factors.MELora(linear, r=8, minis=2), scaling=16 / 8)",
    changes="P",
    source="Ren et al. 2024, https://arxiv.org/abs/2402.17263; code: ChasonShi/MELoRA",
    test="test_factors_blocks.py::test_melora_is_one_small_lora_for_each_slice",
    note="Saves parameters; the products here are those of rank n · r.",
)
class MELora(nn.Module):
    """n small LoRAs side by side, each from a slice of x to a slice of y. Scaling is alpha / r with the r of one.

    Args:
        linear: the layer that gets it.
        r: rank of each.
        minis: n, which divides N and K.
    """

    def __init__(self, linear: nn.Module, r: int = 8, *, minis: int = 2) -> None:
        super().__init__()
        N, K = shape_of(linear)
        check_positive(r=r)
        check_divides("minis", minis, N=N, K=K)
        bound = (K // minis) ** -0.5
        self.lora_A = nn.Parameter(torch.empty(minis, r, K // minis).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(minis, N // minis, r))

    def forward(self, x: Tensor) -> Factors:
        return Factors(torch.block_diag(*self.lora_A), torch.block_diag(*self.lora_B))


@method(
    "QA-LoRA",
    equation="y = x W0ᵀ + scaling · (AvgPool_L(x) Aᵀ) Bᵀ + bias, A (r, K / L): merges into the zero points of groups of L",
    use="FactoredLinear(linear, factors.QALora(linear, r=8, group_size=4), scaling=16 / 8)",
    changes="QP",
    source="Xu et al. 2023, https://arxiv.org/abs/2309.14717; code: yuhuixu1993/qa-lora",
    test="test_factors_blocks.py::test_qa_lora_merges_into_the_zero_points",
    note="PEFT multiplies the mean by K / L: its adapters are not these.",
)
class QALora(nn.Module):
    """LoRA of x pooled over groups of columns, the groups of a weight in integers with a scale and a zero point for each.
    Pooling is a product with A's columns repeated, each 1/L of it: x stays as it is.

    Args:
        linear: the layer that gets it.
        r: rank.
        group_size: L, which divides K.
    """

    def __init__(self, linear: nn.Module, r: int = 64, *, group_size: int = 32) -> None:
        super().__init__()
        N, K = shape_of(linear)
        check_positive(r=r)
        check_divides("group_size", group_size, K=K)
        self.group_size, bound = group_size, (K // group_size) ** -0.5
        self.lora_A = nn.Parameter(torch.empty(r, K // group_size).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(N, r))

    def forward(self, x: Tensor) -> Factors:
        return Factors((self.lora_A / self.group_size).repeat_interleave(self.group_size, dim=1), self.lora_B)

    @torch.no_grad()
    def merged_zeros(self, zeros: Tensor, scales: Tensor, scaling: float) -> Tensor:
        """The zero points with which W0 = (codes - zeros) · scales, all (N, K / L) but the codes, becomes W0 + ΔW:
        zeros - scaling · B A / (L · scales). Codes and scales stay, and zero points are no integers any more.

        Raises:
            ValueError: a shape that does not fit, by name.
        """
        shape = (self.lora_B.shape[0], self.lora_A.shape[1])
        for name, t in (("zeros", zeros), ("scales", scales)):
            if t.shape != shape:
                raise ValueError(f"{name} must have shape (N, K / group_size) = {shape}, got {tuple(t.shape)}")
        return zeros - scaling * (self.lora_B @ self.lora_A) / (self.group_size * scales)
