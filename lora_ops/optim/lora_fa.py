"""LoRA-FA: A is frozen, and B's gradient is what the full gradient would make of it."""

import math

import torch
from torch import Tensor, nn

from ..registry import method
from ..training import TrainingMethod, low_rank_paths
from .freezing import freeze


@torch.no_grad()
def lorafa_precondition(grad_B: Tensor, lora_A: Tensor, scaling: float) -> Tensor:
    """ĝ = g (A Aᵀ + δ I)⁺ / scaling², δ = 1e-8: of all changes of B, the one that changes the weight, by scaling · ĝ A, most
    like the full gradient G does: scaling · ĝ A = G Aᵀ (A Aᵀ)⁻¹ A, as g = scaling · G Aᵀ.

    Args:
        grad_B: g, (N, r).
        lora_A: A, (r, K).
        scaling: finite, not 0.

    Returns:
        (N, r) in grad_B's dtype, computed in fp32 at least.

    Raises:
        ValueError: scaling 0 or not finite.
    """
    if not math.isfinite(scaling) or scaling == 0:
        raise ValueError(f"scaling must be finite and not 0, got {scaling}")
    wide = torch.promote_types(lora_A.dtype, torch.float32)
    A = lora_A.to(wide)
    gram = A @ A.T + 1e-8 * torch.eye(len(A), dtype=wide, device=A.device)
    return (grad_B.to(wide) @ torch.linalg.pinv(gram) / scaling**2).to(grad_B.dtype)


@method(
    "LoRA-FA",
    equation="A frozen; ĝ_B = g_B (A Aᵀ)⁻¹ / s²",
    use="method = optim.LoraFA(model)",
    changes="O",
    source="Zhang et al. 2023, https://arxiv.org/abs/2308.03303",
    test="test_optim.py::test_lora_fa_is_pefts",
    note="PEFT multiplies g_B by the inverse in bf16 wherever the machine has bf16, also in fp32 training.",
)
class LoraFA(TrainingMethod):
    """Freezes A of the whole model and preconditions B's gradients (`lorafa_precondition`) before every step. PEFT's
    `create_lorafa_optimizer` is this with AdamW, eps 1e-6. Without preconditioning, as in the paper's first version:
    `freeze(model, "lora_A")`.

    Raises:
        ValueError: no layer with LoRA.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.paths = low_rank_paths(model)
        freeze(model, "lora_A")

    def on_backward(self, step: int) -> None:
        for path in self.paths:
            if path.lora_B.grad is not None:
                path.lora_B.grad = lorafa_precondition(path.lora_B.grad, path.lora_A, path.scaling)
