"""FactoredLinear: a frozen linear layer whose low-rank factors a provider makes."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..functional import lora_linear, qlora_linear, without_autocast
from ..quant import NF4Weight
from .frozen import FrozenWeight, adapter_dtype_for
from .linear import is_conv1d, weight_of
from .quantized import check_quant, frozen_linear, quantised

if TYPE_CHECKING:
    from ..factors.base import Factors


class FactoredLinear(FrozenWeight):
    """y = m ∘ (x W0ᵀ + scaling · (((drop(x) Aᵀ) ∘ g) R) Bᵀ) + bias, with A, B, g, R, m = factors(x).

    Operator and numerics: `lora_ops.lora_linear`, over a weight in 4 bits `lora_ops.qlora_linear`. Weight and bias are shared
    with `linear` and frozen; the state dict holds them under their names, and the provider's parameters as `factors.*`.

    Args:
        linear: nn.Linear, transformers' Conv1D, which keeps its (K, N) in the state dict, or bitsandbytes' Linear4bit.
        factors: a provider, see `lora_ops.factors`. Several layers may share one, or parts of one. It is moved to the weight's
            device and cast, in place, as `adapter_dtype` says; autocast is off while it runs.
        scaling: finite.
        lora_dropout: probability in [0, 1) that training hides an element of x from A.
        adapter_dtype: of the provider. None: float32 over a half-precision or 4-bit weight, else the weight's dtype.
        quant: "nf4", "fp4" or None: whether the weight becomes a copy in 4 bits (`FusedLoraLinear.from_linear`).

    Raises:
        ValueError, TypeError: an argument out of its range, by name; the layer is as it was.
    """

    weight: Tensor | NF4Weight

    def __init__(
        self,
        linear: nn.Module,
        factors: nn.Module,
        *,
        scaling: float = 1.0,
        lora_dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
        quant: str | None = None,
    ) -> None:
        if not isinstance(factors, nn.Module):
            raise TypeError(f"factors must be an nn.Module that returns Factors, got {type(factors).__name__}")
        check_path(scaling, lora_dropout)
        check_quant(quant, 64)
        super().__init__()
        weight, bias = weight_of(linear)
        weight = quantised(weight, quant, 64, True)
        self.out_features, self.in_features = weight.shape
        self._setup_weight(weight, bias, fan_in_fan_out=is_conv1d(linear) and isinstance(weight, Tensor))
        self.factors = factors.to(weight.device, adapter_dtype_for(weight, adapter_dtype))
        self.scaling, self.lora_dropout = scaling, lora_dropout
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.merged or self.adapters_disabled:
            return frozen_linear(x, weight, self.bias)
        A, B, gate, core, out_scale = self._factors(x)
        options: dict[str, Any] = {
            "scaling": self.scaling, "bias": self.bias, "dropout_p": self.lora_dropout, "training": self.training,
            "gate": gate, "core": core, "out_scale": out_scale,
        }  # fmt: skip
        if isinstance(weight, NF4Weight):
            return qlora_linear(x, weight, A, B, **options)
        return lora_linear(x, weight, A, B, **options)

    def _factors(self, x: Tensor) -> "Factors":
        """Made in the provider's own dtype, whatever autocast would make of its products."""
        with without_autocast(x.device):
            return self.factors(x)

    @torch.no_grad()
    def fixed_factors(self) -> "Factors":
        """What the provider makes for every x, in fp32, or fp64 where it is fp64.

        Raises:
            ValueError: it depends on x.
        """
        x = torch.zeros(1, self.in_features, device=self.weight.device, dtype=self.weight.dtype)
        f = self._factors(x)
        if f.gate is not None and f.gate.dim() > 1:
            raise ValueError(f"factors must not depend on x to be merged or exported, and {type(self.factors).__name__}'s do")
        wide = torch.promote_types(f.lora_A.dtype, torch.float32)
        return type(f)(*(None if t is None else t.to(wide) for t in f))  # type: ignore[arg-type]

    @torch.no_grad()
    def plain_factors(self) -> tuple[Tensor, Tensor]:
        """A (r, K) and B diag(gate) core: those of a LoRA of the same scaling and ΔW.

        Raises:
            ValueError: the factors depend on x, or scale the output.
        """
        f = self.fixed_factors()
        if f.out_scale is not None:
            raise ValueError(
                "factors must not scale the output to be exported: out_scale ∘ W0 has no low rank; merge() does it"
            )
        return f.lora_A, _folded(f)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """scaling · B (diag(gate) core)ᵀ A, (N, K), in fp32, or fp64 where the factors are fp64; out_scale is not in it.

        Raises:
            ValueError: the factors depend on x.
        """
        f = self.fixed_factors()
        return self.scaling * (_folded(f) @ f.lora_A)

    def _with_update(self) -> tuple[Tensor, None]:
        f = self.fixed_factors()
        merged = self._dense_weight(f.lora_A.dtype) + self.scaling * (_folded(f) @ f.lora_A)
        return merged if f.out_scale is None else f.out_scale[:, None] * merged, None

    def _active(self) -> str:
        return f"the update of {type(self.factors).__name__}"

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scaling={self.scaling}, lora_dropout={self.lora_dropout}{', merged' if self.merged else ''}"
        )


def _folded(f: "Factors") -> Tensor:
    """B of the plain LoRA with the same A."""
    B = f.lora_B
    if f.core is not None:
        B = B @ f.core.T
    return B if f.gate is None else B * f.gate


def check_path(scaling: float, lora_dropout: float) -> None:
    """Raises ValueError naming the argument that does not fit, what it is and what it may be."""
    if not isinstance(scaling, int | float) or not math.isfinite(scaling):
        raise ValueError(f"scaling must be a finite number, got {scaling!r}")
    if not isinstance(lora_dropout, int | float) or not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout must be a number in [0, 1), got {lora_dropout!r}")
