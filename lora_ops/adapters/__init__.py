"""LoRA in a whole model: the configuration, and the replacement of layers."""

from .combine import Adapter, combine
from .config import LoraConfig
from .export import merge_and_unload
from .factored import add_factors, factors_to_lora
from .files import load_adapter, save_adapter
from .hotswap import hotswap_adapter, pad_adapter
from .injection import Injection, add_lora, lora_layers, lora_parameters, merge_lora, remove_lora, unmerge_lora
from .switching import add_adapter, delete_adapter, disable_adapter, set_adapter
from .weighted import add_weighted_adapter
from .whole_modules import ModulesToSaveWrapper

__all__ = [
    "Adapter",
    "Injection",
    "LoraConfig",
    "ModulesToSaveWrapper",
    "add_adapter",
    "add_factors",
    "add_lora",
    "add_weighted_adapter",
    "combine",
    "delete_adapter",
    "disable_adapter",
    "factors_to_lora",
    "hotswap_adapter",
    "load_adapter",
    "lora_layers",
    "lora_parameters",
    "merge_and_unload",
    "merge_lora",
    "pad_adapter",
    "remove_lora",
    "save_adapter",
    "set_adapter",
    "unmerge_lora",
]
