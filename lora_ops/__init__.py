"""Fused kernels for LoRA fine-tuning: y = x W0ᵀ + scaling · (x Aᵀ) Bᵀ + bias and its backward, without ever forming B A."""

import torch  # noqa: F401  (before _C: the extension shares torch's OpenMP runtime)

from . import reference
from ._version import __version__
from .adapters import LoraConfig, add_lora, lora_layers, lora_parameters, merge_lora, remove_lora, unmerge_lora
from .build_info import build_info
from .cuda import dispatch as _cuda  # noqa: F401  (registers)
from .functional import lora_linear, qlora_linear
from .multi import AdapterBank, multi_lora_linear
from .nn.linear import FusedLoraLinear
from .ops import pack_weight
from .quant import NF4Weight, quantize_nf4

__all__ = [
    "AdapterBank",
    "FusedLoraLinear",
    "LoraConfig",
    "NF4Weight",
    "__version__",
    "add_lora",
    "build_info",
    "lora_layers",
    "lora_linear",
    "lora_parameters",
    "merge_lora",
    "multi_lora_linear",
    "pack_weight",
    "qlora_linear",
    "quantize_nf4",
    "reference",
    "remove_lora",
    "unmerge_lora",
]
