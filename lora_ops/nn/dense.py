"""What layers over a dense weight have in common beside their adapters: the weight, and what is merged into it."""

from typing import Any

import torch
from torch import Tensor, nn

from .adapter import NamedAdapters


class DenseAdapters(NamedAdapters):
    """A frozen weight W0 of any shape, with adapters whose ΔW, `delta_weight`, has that shape."""

    weight: Tensor
    bias: Tensor | None
    # W0 while it is merged: the very parameter, so that what is tied to it stays tied. Not registered: no state dict has it.
    unmerged_weight: Tensor | None
    unmerged_bias: None  # which DoRA and biases of B would change
    merge_error: float | None  # None, always: that of a weight in 4 bits (`FusedLoraLinear`)

    def _setup(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight.requires_grad_(False)
        self.bias = None if bias is None else bias.requires_grad_(False)
        self.unmerged_weight = self.unmerged_bias = self.merge_error = None
        self._setup_adapters()

    def _new_adapter(self, *args: Any, **initial: Any) -> None:
        *_, init_lora_weights, _, use_dora, lora_bias = args
        check_plain(use_dora, lora_bias, init_lora_weights)
        super()._new_adapter(*args)

    @property
    def merged(self) -> bool:
        """Whether `weight` holds W0 + ΔW at present."""
        return self.unmerged_weight is not None

    @property
    def _is_frozen_layer(self) -> bool:
        """Whether the layer computes with `weight` alone."""
        return self.merged or self.adapters_disabled or not self.active_adapters

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        """B A in the weight's shape."""
        raise NotImplementedError

    @torch.no_grad()
    def delta_weight(self, adapter_name: str | None = None) -> Tensor:
        """scaling · B A in the weight's shape, in fp32 (fp64 for fp64 adapters), of an adapter, or the sum of those that are
        active.

        Raises:
            ValueError: the weight has no place for it (convolutions in groups).
        """
        names = [adapter_name] if adapter_name else self.active_adapters
        total: Any = 0
        for name in names:
            wide = torch.promote_types(self.lora_A[name].dtype, torch.float32)
            A, B = (factors[name].to(wide) for factors in (self.lora_A, self.lora_B))
            total = total + self.scaling[name] * self._delta(A, B)
        return total

    @torch.no_grad()
    def merge(self, to: torch.dtype | None = None) -> None:
        """Replaces `weight` by W0 + ΔW, rounded once, of all active adapters. W0 is kept aside: whoever shares it, as the
        output layer of a model with tied weights does, does not notice.

        Args:
            to: the dtype of the merged weight, float32, bfloat16, float16 or float64. None: the weight's.

        Raises:
            RuntimeError: already merged, or no adapter is active.
            ValueError: the merged weight would not be finite, or there is none (`delta_weight`).
            TypeError: another dtype.
        """
        if self.merged:
            raise RuntimeError(f"{self._active()} is merged already; call unmerge() first")
        if not self.active_adapters:
            raise RuntimeError("no adapter is active: there is nothing to merge; call set_adapter() first")
        if to not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise TypeError(f"to must be float32, bfloat16, float16, float64 or None, got {to!r}")
        weight = self.weight
        merged = (self.delta_weight() + weight).to(to or weight.dtype)
        if not torch.isfinite(merged).all():
            raise ValueError(f"{self._active()} gives a merged weight that is not finite; nothing was changed")
        self.weight = nn.Parameter(merged, requires_grad=False)
        self.__dict__["unmerged_weight"] = weight

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts W0 back, bit for bit.

        Raises:
            RuntimeError: not merged.
        """
        if self.unmerged_weight is None:
            raise RuntimeError("nothing is merged; call merge() first")
        self.weight, self.unmerged_weight = self.unmerged_weight, None

    def _apply(self, fn: Any, recurse: bool = True) -> "DenseAdapters":
        if self.unmerged_weight is not None:
            self.unmerged_weight.data = fn(self.unmerged_weight.data)
        return super()._apply(fn, recurse)

    def _merged_repr(self) -> str:
        return f"{self._adapters_repr()}{', merged' if self.merged else ''}"


def check_plain(use_dora: bool, lora_bias: bool, init_lora_weights: bool | str = True) -> None:
    """Raises ValueError for what embeddings and convolutions cannot have."""
    if init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f'init_lora_weights must be True, False or "gaussian" for an embedding or a convolution, got {init_lora_weights!r}'
        )
    for field, value in (("use_dora", use_dora), ("lora_bias", lora_bias)):
        if value:
            raise ValueError(f"{field} must be False for an embedding or a convolution, got True")
