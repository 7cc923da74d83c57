"""VB-LoRA: A and B put together from a bank of vectors that all layers share."""

import torch
from torch import Tensor, nn

from ..registry import method
from .base import Factors, check_divides, check_positive, shape_of


class VectorBank(nn.Module):
    """The vectors, (num_vectors, vector_length), uniform in ±`bound` at first."""

    def __init__(self, num_vectors: int = 256, vector_length: int = 256, *, bound: float = 0.02) -> None:
        super().__init__()
        check_positive(num_vectors=num_vectors, vector_length=vector_length)
        self.vectors = nn.Parameter(torch.empty(num_vectors, vector_length).uniform_(-bound, bound))

    def mix(self, logits: Tensor, topk: int) -> Tensor:
        """Of each (..., num_vectors) the top k: Σ softmax(their logits) · their vectors, (..., vector_length)."""
        best, indices = logits.topk(topk, dim=-1)
        return (best.softmax(-1).unsqueeze(-1) * self.vectors[indices]).sum(-2)


@method(
    "VB-LoRA",
    equation="A's rows and B's columns in pieces, each Σ_{top k} softmax(logits) · vectors of a bank that all layers share",
    use="FactoredLinear(linear, factors.VBLora(linear, factors.VectorBank(90, vector_length=4), r=4))",
    changes="P",
    source="Li et al. 2024, https://arxiv.org/abs/2405.15179; code: leo-yangli/VB-LoRA",
    test="test_factors_peft.py::test_vb_lora_is_peft_s",
    note="B is not zero at first: a layer starts away from W0.",
)
class VBLora(nn.Module):
    """Logits of a layer: `logits_A` (r, K / length, num_vectors) and `logits_B` (N / length, r, num_vectors), as PEFT has them.
    Scaling is 1. The authors' learning rates: 1e-3 for the bank, 1e-2 for the logits.

    Args:
        linear: the layer that gets it.
        shared: the bank of all layers.
        r: rank.
        topk: how many vectors a piece is of.
        logits_std: standard deviation of the logits at first.

    Raises:
        ValueError: the bank's vector_length does not divide N and K, or topk is more than it has vectors.
    """

    def __init__(self, linear: nn.Module, shared: VectorBank, r: int = 4, *, topk: int = 2, logits_std: float = 0.1) -> None:
        super().__init__()
        N, K = shape_of(linear)
        num_vectors, length = shared.vectors.shape
        check_positive(r=r, topk=topk)
        check_divides("vector_length", length, N=N, K=K)
        if topk > num_vectors:
            raise ValueError(f"topk must be at most the bank's num_vectors = {num_vectors}, got {topk}")
        self.topk, self.shared = topk, shared
        self.logits_A = nn.Parameter(torch.randn(r, K // length, num_vectors) * logits_std)
        self.logits_B = nn.Parameter(torch.randn(N // length, r, num_vectors) * logits_std)

    def forward(self, x: Tensor) -> Factors:
        A, B = (self.shared.mix(logits, self.topk) for logits in (self.logits_A, self.logits_B))
        return Factors(A.flatten(1), B.transpose(1, 2).flatten(0, 1))
