"""LoRA-drop: layers whose LoRA does little share one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import method
from ..training import Path, low_rank_paths


@torch.no_grad()
def output_energy(model: nn.Module, run: Callable[[], Any]) -> dict[str, float]:
    """Σ_x ‖s B A x‖² of every path over what `run` passes through the model, by the layer's name, divided by their sum.

    From the r x r matrices Σ (A x)(A x)ᵀ and Bᵀ B; no output of LoRA is formed.

    Raises:
        ValueError: no layer with LoRA, or one with several adapters or gates.
        RuntimeError: the sum is 0: B is zero, or nothing ran.
    """
    paths = _plain_paths(model)
    energy = dict.fromkeys((path.name for path in paths), 0.0)

    def observer(path: Path) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def observe(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            S = (inputs[0].reshape(-1, path.lora_A.shape[1]).to(path.lora_A.dtype) @ path.lora_A.T).double()
            B = path.lora_B.double()
            energy[path.name] += path.scaling**2 * float(((S.T @ S) * (B.T @ B)).sum())

        return observe

    handles = [path.layer.register_forward_pre_hook(observer(path)) for path in paths]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    total = sum(energy.values())
    if total == 0:
        raise RuntimeError("run must pass data through layers whose LoRA does something; all outputs of LoRA are zero")
    return {name: value / total for name, value in energy.items()}


@method(
    "LoRA-drop",
    equation="importance Σ_x ‖s B A x‖²; the smallest top set with 0.9 of the sum keeps its own A and B, others share",
    use="kept = methods.lora_drop(model, run=lambda: model(x))",
    changes="DL",
    source="Zhou et al. 2024, https://arxiv.org/abs/2402.07721",
    test="test_lora_drop.py::test_shares_what_does_little",
    note="A survey says that the shared LoRA stays fixed in training; in the paper it trains.",
)
def lora_drop(model: nn.Module, run: Callable[[], Any], threshold: float = 0.9) -> list[str]:
    """After some steps of training on a part of the data: the layers outside the smallest set with `threshold` of the
    importance get one A and one B for all of a shape and a dtype, those of the first of them. All adapters start anew then.

    Args:
        model: `FusedLoraLinear`s with one active adapter each. Make the optimiser of its parameters after this call.
        run: passes data through the model.
        threshold: in (0, 1].

    Returns:
        The names of the layers that keep their own, most important first.

    Raises:
        ValueError: no such layer, or an argument out of its range.
        RuntimeError: all outputs of LoRA are zero.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold}")
    importance = output_energy(model, run)
    order = sorted(importance, key=importance.__getitem__, reverse=True)
    kept: list[str] = []
    while len(kept) < len(order) and sum(importance[name] for name in kept) < threshold:
        kept.append(order[len(kept)])
    shared: dict[tuple[Any, ...], Path] = {}
    for path in _plain_paths(model):
        path.layer.reset_lora_parameters(path.adapter)
        if path.name not in kept:
            first = shared.setdefault((path.lora_A.shape, path.lora_B.shape, path.lora_A.dtype, path.lora_A.device), path)
            path.layer.lora_A[path.adapter], path.layer.lora_B[path.adapter] = first.lora_A, first.lora_B
    return kept


def _plain_paths(model: nn.Module) -> list[Path]:
    paths = low_rank_paths(model)
    names = [path.name for path in paths]
    for path in paths:
        if path.adapter is None or names.count(path.name) > 1:
            raise ValueError(f"model must have FusedLoraLinears with one active adapter each, {path.name} is not one")
    return paths
