"""Training methods: what happens around the optimiser's steps. Each is made of the few blocks that are here, too."""

from ..optim.state import reset_moments
from ..training import Path, TrainingMethod, low_rank_paths
from .adaptive_rank import SoRA, adalora, dynamic_dora
from .aflora import AFLoRA
from .allocation import Allocator, CubicSchedule, top_k
from .alora import ALoRA
from .bilevel import Bilevel, hypergradient
from .dropbp import DropBP, drop_backward
from .dylora import DyLoRA
from .importance import Importance, component_norms, gradient_magnitude, sensitivity
from .learned_gates import autolora, autolora_ranks, bilora
from .lora_drop import lora_drop, output_energy
from .loraprune import LoRAPrune, estimated_gradient
from .merge_restart import MergeAndRestart, absorb
from .o_lora import o_lora
from .online_lora import HardBuffer, LossDetector, OnlineLoRA, output_importance
from .pruning import Pruner, hessian_gradient, synaptic_flow
from .ranks import drop_zero_ranks, resize_rank
from .regularizers import (
    Regularizer,
    binary_entropy,
    factor_variance,
    mean_magnitude,
    orthogonality,
    subspace_overlap,
    total_norm,
    weighted_distance,
)
from .restarts import cola, cosine_restarts, relora, xgblora
from .sparse import PRILoRA, prilora_ranks, roselora, sparse_adapter
from .trainer import trainer_callback

__all__ = [
    "AFLoRA",
    "ALoRA",
    "Allocator",
    "Bilevel",
    "CubicSchedule",
    "DropBP",
    "DyLoRA",
    "HardBuffer",
    "Importance",
    "LoRAPrune",
    "LossDetector",
    "MergeAndRestart",
    "OnlineLoRA",
    "PRILoRA",
    "Path",
    "Pruner",
    "Regularizer",
    "SoRA",
    "TrainingMethod",
    "absorb",
    "adalora",
    "autolora",
    "autolora_ranks",
    "bilora",
    "binary_entropy",
    "cola",
    "component_norms",
    "cosine_restarts",
    "drop_backward",
    "drop_zero_ranks",
    "dynamic_dora",
    "estimated_gradient",
    "factor_variance",
    "gradient_magnitude",
    "hessian_gradient",
    "hypergradient",
    "lora_drop",
    "low_rank_paths",
    "mean_magnitude",
    "o_lora",
    "orthogonality",
    "output_energy",
    "output_importance",
    "prilora_ranks",
    "relora",
    "reset_moments",
    "resize_rank",
    "roselora",
    "sensitivity",
    "sparse_adapter",
    "subspace_overlap",
    "synaptic_flow",
    "top_k",
    "total_norm",
    "trainer_callback",
    "weighted_distance",
    "xgblora",
]
