"""Parameter groups."""

import math
from typing import Any

from torch import nn

from ..nn.embedding import FusedLoraEmbedding
from ..registry import method


@method(
    "LoRA+",
    equation="learning rate of A: η, of B: ratio · η",
    use="optimizer = torch.optim.AdamW(optim.loraplus_groups(model, lr=1e-4, ratio=16))",
    changes="O",
    source="Hayou et al. 2024, https://arxiv.org/abs/2402.12354",
    test="test_optim.py::test_loraplus_is_pefts",
    note="Texts differ on how the best ratio grows with the width n, as √n or as n: both are limits. On digits (docs/study) it "
    "is far above 1 and does not grow; a grid of learning rates that misses the best one of ratio 1 makes the gain too large.",
)
def loraplus_groups(
    model: nn.Module,
    lr: float,
    ratio: float,
    *,
    weight_decay: float = 0.0,
    embedding_lr: float = 1e-6,
) -> list[dict[str, Any]]:
    """Groups for any torch optimiser, each trainable parameter in exactly one: B learns `ratio` times as fast as A.

        embedding     adapters of embeddings            embedding_lr, weight_decay
        B             "lora_B" in the name, or 1-D      lr · ratio,   weight_decay
        B, no decay   of those, biases and norms        lr · ratio,   0
        A             all the others                    lr,           weight_decay

    They are those of PEFT's `create_loraplus_optimizer`. With ratio 1 and no decay it is plain LoRA, bit for bit.

    Args:
        model: with trainable parameters, of any kind.
        lr, embedding_lr: learning rates, >= 0.
        ratio: > 0. The authors use 1 to 80, and 16 where nothing is known.
        weight_decay: >= 0.

    Returns:
        Groups with "params", "lr" and "weight_decay"; empty ones are left out.

    Raises:
        ValueError: an argument out of its range, by name; nothing trains.
    """
    for name, value in (("lr", lr), ("embedding_lr", embedding_lr), ("weight_decay", weight_decay)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and >= 0, got {value}")
    if not (math.isfinite(ratio) and ratio > 0):
        raise ValueError(f"ratio must be finite and > 0, got {ratio}")
    groups: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "B_no_decay": []}
    embedded = {p for m in model.modules() if isinstance(m, FusedLoraEmbedding) for p in m.parameters()}
    norms = {p for m in model.modules() if type(m).__name__.endswith("Norm") for p in m.parameters(recurse=False)}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p in embedded:
            groups["embedding"].append(p)
        elif "lora_B" in name or p.ndim == 1:
            groups["B_no_decay" if "bias" in name or p in norms else "B"].append(p)
        else:
            groups["A"].append(p)
    if not any(groups.values()):
        raise ValueError("model must have a parameter that trains, it has none")
    rates = {"A": lr, "embedding": embedding_lr, "B": lr * ratio, "B_no_decay": lr * ratio}
    return [
        {"params": params, "lr": rates[key], "weight_decay": 0.0 if key == "B_no_decay" else weight_decay}
        for key, params in groups.items()
        if params
    ]
