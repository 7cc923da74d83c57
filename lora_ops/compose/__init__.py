"""What becomes of several adapters, or of several tuned models: mixtures, routers, searches, compression, averages."""

from .attentional import AttentionalMixture
from .averaging import sparse_rest, task_arithmetic
from .centroids import CentroidRouter, PrototypeRouter, kmeans
from .compeft import TernaryTensors, adapter_tensors, compress, set_adapter_tensors
from .experts import SoftmaxRouter, load_balancing_loss
from .fisher import fisher_diagonal, fisher_merge
from .linearized import LinearizedFactors, linearize
from .lorahub import lorahub, search_weights, weighted_factors
from .mixlora import MixLoraFFN, add_mixlora, balance_of
from .mixture import LoraMixture, MixtureOfVectors
from .poly import PolyLinear, add_poly, set_task_ids
from .regmean import input_grams, regmean
from .routing import add_router, last_hidden_state, mean_hidden_state, remove_router, set_adapter_gate
from .xlora import XLoraRouter, add_xlora

__all__ = [
    "AttentionalMixture",
    "CentroidRouter",
    "LinearizedFactors",
    "LoraMixture",
    "MixLoraFFN",
    "MixtureOfVectors",
    "PolyLinear",
    "PrototypeRouter",
    "SoftmaxRouter",
    "TernaryTensors",
    "XLoraRouter",
    "adapter_tensors",
    "add_mixlora",
    "add_poly",
    "add_router",
    "add_xlora",
    "balance_of",
    "compress",
    "fisher_diagonal",
    "fisher_merge",
    "input_grams",
    "kmeans",
    "last_hidden_state",
    "linearize",
    "load_balancing_loss",
    "lorahub",
    "mean_hidden_state",
    "regmean",
    "remove_router",
    "search_weights",
    "set_adapter_gate",
    "set_adapter_tensors",
    "set_task_ids",
    "sparse_rest",
    "task_arithmetic",
    "weighted_factors",
]
