"""What trains at all."""

import torch
from torch import nn

from ..registry import method
from ..training import low_rank_paths


def freeze(model: nn.Module, *parts: str) -> None:
    """Freezes every parameter with one of these parts in its name, and forgets its gradient. `freeze(model, "lora_A")` is
    LoRA-FA in its first form: the backward then keeps (rows, r) of a layer instead of its input.

    Raises:
        ValueError: no parameter has a name with that part. Nothing is changed then.
    """
    names = dict(model.named_parameters())
    for part in parts:
        if not any(part in name for name in names):
            raise ValueError(f"parts must be parts of parameters' names, got {part!r}, which no name has")
    for name, p in names.items():
        if any(part in name for part in parts):
            p.requires_grad_(False)
            p.grad = None


@torch.no_grad()
def asymmetric(model: nn.Module) -> None:
    """A of every low-rank path becomes random with orthonormal rows, and frozen; B becomes zero, and alone trains: Asymmetric
    LoRA (Zhu et al. 2024, https://arxiv.org/abs/2402.16842).

    Raises:
        ValueError: no layer with LoRA, or a rank above the layer's inputs, whose rows cannot be orthonormal.
    """
    paths = low_rank_paths(model)
    for path in paths:
        r, K = path.lora_A.shape
        if r > K:
            raise ValueError(f"model must have ranks of at most the layers' inputs, got {r} over {K} in {path.name}")
    for path in paths:
        q = torch.empty_like(path.lora_A, dtype=torch.promote_types(path.lora_A.dtype, torch.float32))
        path.lora_A.copy_(nn.init.orthogonal_(q))
        path.lora_A.requires_grad_(False)
        path.lora_B.zero_()


@method(
    "LongLoRA",
    equation="embeddings and norms train beside LoRA",
    use="optim.train_embeddings_and_norms(model)",
    changes="L",
    source="Chen et al. 2023, https://arxiv.org/abs/2309.12307",
    test="test_optim.py::test_longlora_trains_embeddings_and_norms",
    note="Only its rule of what trains: its shifted sparse attention is no linear layer.",
)
def train_embeddings_and_norms(model: nn.Module) -> None:
    """Unfreezes every floating-point parameter with "embed" or "norm" in its name, LoRA's own aside."""
    for name, p in model.named_parameters():
        if ("embed" in name or "norm" in name) and "lora_" not in name and p.is_floating_point():
            p.requires_grad_(True)
