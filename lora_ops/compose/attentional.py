"""AM-LoRA: the adapters of several tasks, and none, weighted by attention over what they add."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..adapters.combine import Adapter
from ..factors import Factors
from ..registry import method
from ..stacking import rank_gate, stack


@method(
    "AM-LoRA",
    equation="y = x W0ᵀ + Σ_k g_k h_k, h_k = s_k (x A_kᵀ) B_kᵀ and h_0 = 0, g = softmax(e), e_k = w_k · h_k",
    use="FactoredLinear(linear, compose.AttentionalMixture([of_task_1, of_task_2]))",
    changes="C",
    source="Liu et al. 2024, https://arxiv.org/abs/2409.19611",
    test="test_mixture.py::test_attention_weighs_what_adapters_add",
    note="The selector's dense layer is taken as one row for each task, without bias: the zero adapter has e_0 = 0.",
)
class AttentionalMixture(nn.Module):
    """Factors of y = x W0ᵀ + Σ_k g_k h_k with h_k = s_k (x A_kᵀ) B_kᵀ, h_0 = 0, and g = softmax(e), e_0 = 0, e_k = w_k · h_k.

    AM-LoRA: Liu et al., "Learning Attentional Mixture of LoRAs for Language Model Continual Learning", 2024
    (https://arxiv.org/abs/2409.19611). No h_k is formed for it: e = x Qᵀ with the rows q_k = s_k A_kᵀ B_kᵀ w_k. Parameters:
    `selector` (tasks, N), zero at first, and of every task `lora_A[k]`, `lora_B[k]`, frozen except for the last task's.

    Args:
        adapters: of the tasks, the last one being trained. The tensors are kept as they are.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        super().__init__()
        if not adapters:
            raise ValueError("adapters must hold at least one adapter, got none")
        trains = [False] * (len(adapters) - 1) + [True]
        self.lora_A = nn.ParameterList(nn.Parameter(a.lora_A, t) for a, t in zip(adapters, trains, strict=True))
        self.lora_B = nn.ParameterList(nn.Parameter(a.lora_B, t) for a, t in zip(adapters, trains, strict=True))
        self.scalings = [float(a.scaling) for a in adapters]
        B = adapters[0].lora_B
        self.selector = nn.Parameter(torch.zeros(len(adapters), B.shape[0], dtype=B.dtype, device=B.device))

    def forward(self, x: Tensor) -> Factors:
        A, B, scaling = stack(list(self.lora_A), list(self.lora_B), self.scalings)
        scores = x @ self._queries().T.to(x.dtype)
        with_none = torch.nn.functional.pad(scores.to(torch.promote_types(x.dtype, torch.float32)), (1, 0))
        gate = with_none.softmax(-1)[..., 1:]
        return Factors(A, B if scaling == 1.0 else B * scaling, rank_gate(gate, [len(a) for a in self.lora_A]))

    def penalty(self) -> Tensor:
        """‖selector‖₁, which makes the weights sparse when some λ times it joins the loss."""
        return self.selector.abs().sum()

    def _queries(self) -> Tensor:
        of_tasks = zip(self.scalings, self.lora_A, self.lora_B, self.selector, strict=True)
        return torch.stack([s * (w @ B) @ A for s, A, B, w in of_tasks])
