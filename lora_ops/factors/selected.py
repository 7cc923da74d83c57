"""MixLoRA: rows of A and columns of B that each instance selects for itself."""

import torch
from torch import Tensor, nn

from ..registry import method
from .base import Factors, check_positive, shape_of


@method(
    "MixLoRA (conditional mixture)",
    equation="of each instance: ΔW = Σ_k b_{j_k} a_{i_k}, the r rows i and columns j its own, of E each; j depends on i",
    use="FactoredLinear(linear, factors.MixLora(linear, experts=8, r=4), scaling=2 * 8 / 4)",
    changes="P",
    source="Shen et al. 2024, https://arxiv.org/abs/2402.15896; code: VT-NLP/MixLoRA",
    test="test_factors_selected.py::test_mixlora_is_the_lora_of_each_instance_s_selection",
    note="The code's routers get no gradient: it takes indices alone from them, so they stay at their random first values. "
    "`scored=True` trains them. Not the MoE of whole FFN LoRAs (TUDB-Labs) of the same name.",
)
class MixLora(nn.Module):
    """The selections of n instances are one adapter of rank n · r with a gate that is 1 for the instance's own.

    Routers see the mean of an instance's tokens, m (K,). A: the r largest of m Rᵀ. B: the r largest of
    softmax(m R_Bᵀ) + softmax(Σ_k softmax(a_{i_k} C_kᵀ)), with C (r, E, K).

    Args:
        linear: the layer that gets it.
        experts: E.
        r: how many of them, at most E.
        scored: whether each selected row and column is multiplied by its router's softmax, normalised over those selected.

    Factors depend on x, (instances, ..., tokens, K): there is no merged weight.
    """

    def __init__(self, linear: nn.Module, experts: int = 8, r: int = 4, *, scored: bool = False) -> None:
        super().__init__()
        check_positive(experts=experts, r=r)
        if r > experts:
            raise ValueError(f"r must be at most experts = {experts}, got {r}")
        N, K = shape_of(linear)
        self.r, self.scored = r, scored
        bound = K**-0.5
        self.lora_A = nn.Parameter(torch.empty(experts, K).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(N, experts))
        self.router_A, self.router_B = nn.Linear(K, experts, bias=False), nn.Linear(K, experts, bias=False)
        self.router_AB = nn.Parameter(torch.empty(r, experts, K).uniform_(-bound, bound))

    def select(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Of every instance, the indices of A's rows and B's columns and what they are multiplied by, (instances, r) each."""
        mean = x.to(self.lora_A.dtype).flatten(1, -2).mean(1)
        of_A = self._largest(self.router_A(mean))
        rows = self.lora_A[of_A[0]]  # (instances, r, K)
        from_A = torch.einsum("nrk,rek->nre", rows, self.router_AB).softmax(-1).sum(1)
        return of_A, self._largest(self.router_B(mean).softmax(-1) + from_A.softmax(-1))

    def _largest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        best, indices = logits.topk(self.r, dim=-1)
        return indices, best.softmax(-1) if self.scored else torch.ones_like(best)

    def forward(self, x: Tensor) -> Factors:
        if x.dim() < 3:
            raise ValueError(
                f"x must be (instances, ..., tokens, K): each instance selects its own factors, got {tuple(x.shape)}"
            )
        n = x.shape[0]
        if n == 0:
            return Factors(self.lora_A[: self.r], self.lora_B[:, : self.r])
        (of_A, score_A), (of_B, score_B) = self.select(x)
        A = (self.lora_A[of_A] * score_A.unsqueeze(-1)).flatten(0, 1)
        B = self.lora_B[:, of_B.flatten()] * score_B.flatten()
        own = torch.eye(n, dtype=A.dtype, device=x.device).repeat_interleave(self.r, dim=1)
        return Factors(A, B, gate=own.view(n, *[1] * (x.dim() - 2), -1).expand(*x.shape[:-1], -1))
