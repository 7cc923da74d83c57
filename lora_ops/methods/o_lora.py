"""O-LoRA: a new task does not read what earlier ones read."""

from collections.abc import Sequence

from torch import nn

from ..registry import method
from ..training import TrainingMethod, low_rank_paths
from .regularizers import Regularizer, subspace_overlap, total_norm


@method(
    "O-LoRA",
    equation="+ λ₁ Σ |A_old Aᵀ| + λ₂ Σ ‖A‖, ‖B‖ over the frozen adapters of earlier tasks",
    use="method = methods.o_lora(model, new='default', old=[])",
    changes="L",
    source="Wang et al. 2023, https://arxiv.org/abs/2310.14152",
    test="test_continual.py::test_o_lora_is_zero_for_orthogonal_subspaces",
)
def o_lora(model: nn.Module, new: str, old: Sequence[str], *, lambda1: float = 0.5, lambda2: float = 0.0) -> TrainingMethod:
    """Activates all adapters, of which the new one alone trains, in the orthogonal complement of what the old ones read.

    Args:
        model: `FusedLoraLinear`s with these adapters.
        new, old: adapters' names.
        lambda1: of the overlap of subspaces.
        lambda2: of the norms.

    Raises:
        ValueError: a name that a layer does not have, or no layer with LoRA.
    """
    layers = list(dict.fromkeys(path.layer for path in low_rank_paths(model) if path.adapter is not None))
    for layer in layers:
        layer._check_names([*old, new])
    for layer in layers:
        layer.set_adapter([*old, new])
        for name in old:
            for parameters in layer.parameter_dicts:
                if name in parameters:
                    parameters[name].requires_grad_(False)
    pairs = [(layer.lora_A[name], layer.lora_A[new]) for layer in layers for name in old]
    trained = [p for layer in layers for p in (layer.lora_A[new], layer.lora_B[new])]
    return TrainingMethod(
        Regularizer(lambda1 if pairs else 0.0, lambda: subspace_overlap(pairs)),
        Regularizer(lambda2, lambda: total_norm(trained)),
    )
