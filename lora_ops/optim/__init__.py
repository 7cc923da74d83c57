"""Pieces for the user's torch optimiser: parameter groups, what trains at all, and what is done to gradients before a step and
to parameters after it. None of them owns an optimiser."""

from .delta_lora import DeltaLora
from .freezing import asymmetric, freeze, train_embeddings_and_norms
from .groups import loraplus_groups
from .lora_fa import LoraFA, lorafa_precondition
from .projected import ProjectedGradient, flora, galore
from .proximal import prox_l1_

__all__ = [
    "DeltaLora",
    "LoraFA",
    "ProjectedGradient",
    "asymmetric",
    "flora",
    "freeze",
    "galore",
    "lorafa_precondition",
    "loraplus_groups",
    "prox_l1_",
    "train_embeddings_and_norms",
]
