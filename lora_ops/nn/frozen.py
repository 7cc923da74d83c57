"""A frozen weight, dense or in 4 bits, with what is merged into it: what all layers with an update have in common."""

from typing import Any

import torch
from torch import Tensor, nn

from ..quant import NF4Weight
from .quantized import applied, loaded, requantise, split_state


class FrozenWeight(nn.Module):
    """W0 and a bias, frozen and perhaps shared with another layer: never written to, but replaced."""

    in_features: int
    out_features: int
    adapters_disabled: bool
    weight: Any  # a parameter, or an NF4Weight
    bias: Tensor | None
    # W0 while it is merged: the very parameter, so that what is tied to it stays tied. Not registered: no state dict has it.
    unmerged_weight: Any
    # The bias of before, likewise, while a bias of B is merged into it.
    unmerged_bias: Tensor | None
    # Of a merged weight that went back to 4 bits: its relative Frobenius error against the one that it stands for. Else None.
    merge_error: float | None

    def _setup_weight(self, weight: Tensor | NF4Weight, bias: Tensor | None, *, fan_in_fan_out: bool = False) -> None:
        self.weight = weight if isinstance(weight, NF4Weight) else weight.requires_grad_(False)
        self.bias = None if bias is None else bias.requires_grad_(False)
        self.fan_in_fan_out = fan_in_fan_out  # whether the state dict holds weight as (K, N), as Conv1D does
        self.unmerged_weight = self.unmerged_bias = self.merge_error = None
        self.adapters_disabled = False

    @property
    def merged(self) -> bool:
        """Whether `weight` holds the update at present."""
        return self.unmerged_weight is not None

    @property
    def base_weight(self) -> Any:
        """W0, whether an update is merged into `weight` or not."""
        return self.unmerged_weight if self.merged else self.weight

    def disable_adapters(self) -> None:
        """The layer is the frozen layer alone, until `enable_adapters`. What is merged stays merged."""
        self.adapters_disabled = True

    def enable_adapters(self) -> None:
        self.adapters_disabled = False

    @torch.no_grad()
    def merge(self, to: torch.dtype | None = None) -> None:
        """Replaces `weight` by the weight that computes with the update, W0 + ΔW where it is a sum, rounded once. Several
        active adapters follow one another, and DoRA makes c ∘ (W + ΔW) of the W that the ones before have made. `bias` gets
        what they add to it. W0 and the bias are kept aside: whoever shares them, as the output layer of a model with tied
        weights does, does not notice.

        A 4-bit weight is dequantised for that, and quantised again in the same format, which costs as much as the first time:
        `merge_error` then holds |W - W'| / |W'|, Frobenius, W' being the weight that it stands for; about 0.09 for NF4 in
        blocks of 64.

        Args:
            to: the dtype of the merged weight, float32, bfloat16, float16 or float64, which then is a dense parameter. None:
                the dtype or the 4-bit format that the weight has.

        Raises:
            RuntimeError: already merged, or there is nothing to merge because no adapter is active.
            ValueError: there is no such weight, or it or the bias would not be finite, or there is a bias of B (`lora_bias`)
                and no bias.
            TypeError: another dtype.
        """
        if self.merged:
            raise RuntimeError(f"{self._active()} is merged already; call unmerge() first")
        if to not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise TypeError(f"to must be float32, bfloat16, float16, float64 or None, got {to!r}")
        weight = self.weight
        merged, added = self._with_update()
        if not (isinstance(weight, NF4Weight) and to is None):
            merged = merged.to(to or weight.dtype)
        if not torch.isfinite(merged).all():
            raise ValueError(f"{self._active()} gives a merged weight that is not finite; nothing was changed")
        bias = None
        if added is not None:
            if self.bias is None:
                raise ValueError(
                    f"{self._active()} has a bias of B (lora_bias), and the layer has no bias to take it; nothing was changed"
                )
            bias = (self.bias + added).to(self.bias.dtype)
            if not torch.isfinite(bias).all():
                raise ValueError(f"{self._active()} gives a merged bias that is not finite; nothing was changed")
        if isinstance(weight, NF4Weight) and to is None:
            self.weight, self.merge_error = requantise(weight, merged)
        else:
            self.weight = nn.Parameter(merged, requires_grad=False)
        self.__dict__["unmerged_weight"] = weight
        if bias is not None:
            self.__dict__["unmerged_bias"] = self.bias
            self.bias = nn.Parameter(bias, requires_grad=False)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts W0 and the bias back, bit for bit.

        Raises:
            RuntimeError: not merged.
        """
        if self.unmerged_weight is None:
            raise RuntimeError("nothing is merged; call merge() first")
        if isinstance(self.unmerged_weight, NF4Weight):
            self._parameters.pop("weight", None)
        self.weight = self.unmerged_weight
        if self.unmerged_bias is not None:
            self.bias = self.unmerged_bias
        self.unmerged_weight = self.unmerged_bias = self.merge_error = None

    def _with_update(self) -> tuple[Tensor, Tensor | None]:
        """The weight that computes with the update, in fp32 at least, and what is added to the bias.

        Raises:
            ValueError, RuntimeError: there is none.
        """
        raise NotImplementedError

    def _dense_weight(self, dtype: torch.dtype) -> Tensor:
        """W0, dequantised to that dtype if it is in 4 bits."""
        return self.weight.dequantize(dtype) if isinstance(self.weight, NF4Weight) else self.weight

    def _active(self) -> str:
        """What makes the update, for errors."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> "FrozenWeight":
        for name in ("weight", "unmerged_weight"):
            weight = getattr(self, name)
            if isinstance(weight, NF4Weight):
                setattr(self, name, applied(weight, fn))
        for unmerged in (self.unmerged_weight, self.unmerged_bias):
            if isinstance(unmerged, Tensor):
                unmerged.data = fn(unmerged.data)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if isinstance(self.weight, NF4Weight):
            destination.update(self.weight.to_bitsandbytes(prefix))
        elif self.fan_in_fan_out:
            destination[f"{prefix}weight"] = destination[f"{prefix}weight"].t()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        key, new = f"{prefix}weight", None
        if isinstance(self.weight, NF4Weight):
            state, state_dict = split_state(state_dict, prefix)
            if state:
                new = loaded(state, prefix, self.weight, local_metadata.get("assign_to_params_buffers", False))
            elif strict:
                missing_keys.append(key)
        elif self.fan_in_fan_out and key in state_dict:
            state_dict = {**state_dict, key: state_dict[key].t()}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
        if new is not None:
            self.weight = new


def adapter_dtype_for(weight: Tensor | NF4Weight, adapter_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of A and B beside a weight: `adapter_dtype`, or float32 over half precision, as in PEFT, else the weight's."""
    half = weight.dtype in (torch.bfloat16, torch.float16)
    return adapter_dtype or (torch.float32 if half else weight.dtype)
