"""LoRA in a whole model: the configuration, and the replacement of layers."""

from .config import LoraConfig
from .injection import Injection, add_lora, lora_layers, lora_parameters, merge_lora, remove_lora, unmerge_lora

__all__ = [
    "Injection",
    "LoraConfig",
    "add_lora",
    "lora_layers",
    "lora_parameters",
    "merge_lora",
    "remove_lora",
    "unmerge_lora",
]
