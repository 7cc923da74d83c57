"""What an adapter is made with, whatever its layer: the keywords of every constructor, their defaults and their checks."""

import sys
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import nn

# Of initialisations that have them. The papers take 16 at most; a file that asks for a billion is damaged.
MOST_ITERATIONS = 100


class AdapterOptions(TypedDict, total=False):
    """By keyword, beside r: see `AdapterSettings`."""

    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    init_lora_weights: bool | str
    adapter_dtype: torch.dtype | None
    use_dora: bool
    lora_bias: bool


@dataclass(frozen=True)
class AdapterSettings:
    """Of one adapter of a layer. The fields are explained where `FusedLoraLinear` has them.

    Raises:
        ValueError, TypeError: a field out of its range, by name, with what it was and what it may be.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    adapter_dtype: torch.dtype | None = None
    use_dora: bool = False
    lora_bias: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ValueError(f"r must be an integer >= 1, got {self.r!r}")
        # What is above is an integer that no float holds.
        if not isinstance(self.lora_alpha, int | float) or not abs(self.lora_alpha) <= sys.float_info.max:
            raise ValueError(f"lora_alpha must be a finite number, got {self.lora_alpha!r}")
        if not isinstance(self.lora_dropout, int | float) or not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must be a number in [0, 1), got {self.lora_dropout!r}")
        check_init_lora_weights(self.init_lora_weights)
        if self.adapter_dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise TypeError(f"adapter_dtype must be float32, bfloat16, float16, float64 or None, got {self.adapter_dtype!r}")
        for field in ("use_rslora", "use_dora", "lora_bias"):
            if not isinstance(getattr(self, field), bool):
                raise TypeError(f"{field} must be True or False, got {getattr(self, field)!r}")
        if self.lora_bias and self.use_dora:
            raise ValueError("lora_bias must be False with use_dora, got True")
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            raise ValueError(f"init_lora_weights must be True or False with lora_bias, got {self.init_lora_weights!r}")


def check_init_lora_weights(init_lora_weights: bool | str) -> None:
    """Raises ValueError for what is no way to start a layer without data."""
    if init_lora_weights not in (True, False, "gaussian"):
        # Not above: lora_ops.init has functions on whole models, which need this file.
        from ..init import check_init_lora_weights

        check_init_lora_weights(init_lora_weights)


def check_adapter_name(adapter_name: str) -> None:
    """Raises ValueError for what cannot be a key of an nn.ParameterDict."""
    taken = isinstance(adapter_name, str) and hasattr(nn.ParameterDict(), adapter_name)
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name or taken:
        raise ValueError(
            "adapter_name must be a non-empty string without a dot that is no attribute of nn.ParameterDict, "
            f"got {adapter_name!r}"
        )
