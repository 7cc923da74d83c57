"""MixLoRA: feed-forward blocks as sparse mixtures of experts that share their weights and differ in their LoRAs."""

import math
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.kinds import replace_modules
from ..registry import method
from .experts import load_balancing_loss

Model = TypeVar("Model", bound=nn.Module)

_LAYERS = ("gate_proj", "up_proj", "down_proj")


@method(
    "MixLoRA (TUDB-Labs)",
    equation="y = Σ_e g_e FFN_e(x), of the top 2 of softmax(x W_gᵀ), FFN_e with W0 + s B_e A_e in each of its three layers",
    use="compose.add_mixlora(model, num_experts=8, top_k=2)",
    changes="P",
    source="Li et al. 2024, https://arxiv.org/abs/2404.15159",
    test="test_mixlora.py::test_is_the_weighted_sum_of_its_experts",
    note="Not VT-NLP's MixLoRA (conditional mixture of vectors, https://arxiv.org/abs/2402.15896).",
)
class MixLoraFFN(nn.Module):
    """y = Σ_e g_e [ (act(G_e(x)) ∘ U_e(x)) D_eᵀ ], each of the three layers of expert e having W0 + s B_e A_e.

    MixLoRA: Li et al. 2024 (https://arxiv.org/abs/2404.15159). A token goes to the `top_k` experts of largest softmax(x W_gᵀ),
    with those weights divided by their sum. Experts share W0, so x W0ᵀ is computed once for all of them, and so is the last
    product, of Σ_e g_e h_e.

    Args:
        mlp: has nn.Linear (or Linear4bit) layers gate_proj, up_proj and down_proj and an activation `act_fn`; it is frozen.
        num_experts, top_k: how many there are, and how many take a token.
        r, lora_alpha: of every expert's LoRAs.
        lora_dropout: probability that training hides an element of an expert's input from its A.

    After a forward, `balance` is `load_balancing_loss` of its routing, to be added to the loss (times 0.001 in the code).

    Raises:
        ValueError: top_k is not in [1, num_experts], or mlp has other layers.
    """

    balance: Tensor | None

    def __init__(
        self,
        mlp: Any,
        num_experts: int = 8,
        top_k: int = 2,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.05,
    ) -> None:
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be in [1, {num_experts}], the number of experts, got {top_k}")
        if not is_gated_mlp(mlp):
            raise ValueError(f"mlp must have {', '.join(_LAYERS)} and act_fn, got {type(mlp).__name__}")
        super().__init__()
        self.mlp = mlp.requires_grad_(False)
        self.top_k, self.scaling, self.lora_dropout = top_k, lora_alpha / r, lora_dropout
        K, device = mlp.gate_proj.in_features, mlp.gate_proj.weight.device
        self.router = nn.Parameter(torch.randn(num_experts, K, device=device) * 0.02)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for name in _LAYERS:
            layer = getattr(mlp, name)
            A = torch.empty(num_experts, r, layer.in_features, device=device)
            bound = 1 / math.sqrt(layer.in_features)
            self.lora_A[name] = nn.Parameter(A.uniform_(-bound, bound))
            self.lora_B[name] = nn.Parameter(torch.zeros(num_experts, layer.out_features, r, device=device))
        self.balance = None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        logits = F.linear(rows, self.router.to(rows.dtype))
        probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        g, chosen = probabilities.topk(self.top_k, dim=-1)
        g = (g / g.sum(-1, keepdim=True)).to(rows.dtype)
        self.balance = load_balancing_loss(probabilities, chosen)
        gate, up = self.mlp.gate_proj(rows), self.mlp.up_proj(rows)
        mixed = rows.new_zeros(gate.shape)
        low_rank = rows.new_zeros(rows.shape[0], self.mlp.down_proj.out_features)
        for e in range(self.router.shape[0]):
            at, place = torch.where(chosen == e)
            x_e = rows[at]
            h = self.mlp.act_fn(gate[at] + self._low_rank("gate_proj", e, x_e)) * (up[at] + self._low_rank("up_proj", e, x_e))
            h = h * g[at, place, None]
            mixed = mixed.index_add(0, at, h)
            low_rank = low_rank.index_add(0, at, self._low_rank("down_proj", e, h))
        return (self.mlp.down_proj(mixed) + low_rank).view(*x.shape[:-1], -1)

    def _low_rank(self, name: str, e: int, x: Tensor) -> Tensor:
        A, B = self.lora_A[name][e], self.lora_B[name][e]
        x_e = F.dropout(x, self.lora_dropout, self.training).to(A.dtype)
        return (self.scaling * F.linear(F.linear(x_e, A), B)).to(x.dtype)


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether it has the three layers and the activation of LLaMA's feed-forward blocks."""
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in _LAYERS) and hasattr(module, "act_fn")


def add_mixlora(model: Model, num_experts: int = 8, **options: Any) -> Model:
    """Replaces every feed-forward block of LLaMA's kind by a `MixLoraFFN`, in place, and freezes all that the model had.

    Attention layers get their LoRA by `add_lora`, called before with `target_modules` that name them alone.

    Raises:
        ValueError: the model has no such block; an option of `MixLoraFFN` is out of its range. It is as it was.
    """
    blocks = [module for module in model.modules() if is_gated_mlp(module)]
    if not blocks:
        raise ValueError(f"model must have blocks with {', '.join(_LAYERS)} and act_fn, {type(model).__name__} has none")
    trained = [p for p in model.parameters() if p.requires_grad]
    has_lora = "lora_injection" in vars(model)
    replace_modules(model, {mlp: MixLoraFFN(mlp, num_experts, **options) for mlp in blocks})
    for p in trained:
        p.requires_grad_(has_lora and p.requires_grad)
    return model


def balance_of(model: nn.Module) -> Tensor:
    """The sum of `balance` over all `MixLoraFFN`s of the model."""
    return torch.stack([m.balance for m in model.modules() if isinstance(m, MixLoraFFN) and m.balance is not None]).sum()
