"""Fused kernels for LoRA fine-tuning: y = x W0ᵀ + scaling · (x Aᵀ) Bᵀ + bias and its backward, without ever forming B A."""

import torch  # noqa: F401  (before _C: the extension shares torch's OpenMP runtime)

from . import compose, factors, init, methods, optim, reference
from . import flops as _flops  # noqa: F401  (registers)
from ._version import __version__
from .adapters import (
    Adapter,
    LoraConfig,
    ModulesToSaveWrapper,
    add_adapter,
    add_factors,
    add_lora,
    add_weighted_adapter,
    combine,
    delete_adapter,
    disable_adapter,
    factors_to_lora,
    hotswap_adapter,
    load_adapter,
    lora_layers,
    lora_parameters,
    merge_and_unload,
    merge_lora,
    pad_adapter,
    remove_lora,
    save_adapter,
    set_adapter,
    unmerge_lora,
)
from .build_info import build_info
from .cuda import dispatch as _cuda  # noqa: F401  (registers)
from .dora import dora_linear
from .functional import lora_linear, qlora_linear
from .memory import keep_memory
from .multi import AdapterBank, multi_lora_linear
from .nn.conv import FusedLoraConv1d, FusedLoraConv2d, FusedLoraConv3d
from .nn.embedding import FusedLoraEmbedding
from .nn.factored import FactoredLinear
from .nn.linear import FusedLoraLinear
from .ops import pack_weight
from .quant import NF4Weight, quantize_nf4

__all__ = [
    "Adapter",
    "AdapterBank",
    "FactoredLinear",
    "FusedLoraConv1d",
    "FusedLoraConv2d",
    "FusedLoraConv3d",
    "FusedLoraEmbedding",
    "FusedLoraLinear",
    "LoraConfig",
    "ModulesToSaveWrapper",
    "NF4Weight",
    "__version__",
    "add_adapter",
    "add_factors",
    "add_lora",
    "add_weighted_adapter",
    "build_info",
    "combine",
    "compose",
    "delete_adapter",
    "disable_adapter",
    "dora_linear",
    "factors",
    "factors_to_lora",
    "hotswap_adapter",
    "init",
    "keep_memory",
    "load_adapter",
    "lora_layers",
    "lora_linear",
    "lora_parameters",
    "merge_and_unload",
    "merge_lora",
    "methods",
    "multi_lora_linear",
    "optim",
    "pack_weight",
    "pad_adapter",
    "qlora_linear",
    "quantize_nf4",
    "reference",
    "remove_lora",
    "save_adapter",
    "set_adapter",
    "unmerge_lora",
]
