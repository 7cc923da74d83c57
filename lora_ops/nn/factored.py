"""FactoredLinear: a frozen linear layer whose low-rank factors a provider makes."""

import math

import torch
from torch import Tensor, nn

from ..functional import lora_linear, qlora_linear
from ..quant import NF4Weight
from .linear import _weight_of


class FactoredLinear(nn.Module):
    """y = m ∘ (x W0ᵀ + scaling · (((drop(x) Aᵀ) ∘ g) R) Bᵀ) + bias, with A, B, g, R, m = factors(x).

    Args:
        linear: nn.Linear or transformers' Conv1D (or bitsandbytes' Linear4bit); its weight and bias are shared and frozen.
        factors: a provider, see `lora_ops.factors`. Several layers may share one, or parts of one.
        scaling: finite.
        lora_dropout: probability in [0, 1) that training hides an element of x from A.
    """

    weight: Tensor | NF4Weight
    bias: Tensor | None

    def __init__(self, linear: nn.Module, factors: nn.Module, *, scaling: float = 1.0, lora_dropout: float = 0.0) -> None:
        if not math.isfinite(scaling):
            raise ValueError(f"scaling must be finite, got {scaling}")
        if not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout}")
        super().__init__()
        weight, bias = _weight_of(linear)
        self.out_features, self.in_features = weight.shape
        self.weight = weight if isinstance(weight, NF4Weight) else weight.requires_grad_(False)
        self.bias = None if bias is None else bias.requires_grad_(False)
        self.factors = factors
        self.scaling, self.lora_dropout = scaling, lora_dropout

    def forward(self, x: Tensor) -> Tensor:
        f = self.factors(x)
        linear = qlora_linear if isinstance(self.weight, NF4Weight) else lora_linear
        return linear(
            x, self.weight, f.lora_A, f.lora_B, scaling=self.scaling, bias=self.bias, dropout_p=self.lora_dropout,
            training=self.training, gate=f.gate, core=f.core, out_scale=f.out_scale,
        )  # fmt: skip

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """scaling · B (g core)ᵀ A, (N, K), in fp32 at least, of factors that do not depend on x."""
        f = self.factors(torch.zeros(0, self.in_features))
        A, B = f.lora_A.float(), f.lora_B.float()
        if f.core is not None:
            B = B @ f.core.float().T
        if f.gate is not None:
            B = B * f.gate
        return self.scaling * (B @ A)
