"""LoRAHub: weights of adapters found without gradients, by trying them."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

from ..adapters.combine import Adapter
from ..adapters.injection import lora_layers
from ..adapters.kinds import LoraLayer
from ..adapters.switching import delete_adapter, set_adapter
from ..registry import method

Model = TypeVar("Model", bound=nn.Module)


def weighted_factors(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """A = Σ w_k A_k, B = Σ w_k B_k: ΔW = s (Σ w_k B_k)(Σ w_k A_k), with the products of different adapters on top of w_k² ΔW_k.

    Raises:
        ValueError: adapters of different shapes or scalings, or not as many weights.
    """
    if not adapters or len(weights) != len(adapters):
        raise ValueError(f"weights must be one for each of {len(adapters)} adapters, at least one, got {len(weights)}")
    first = adapters[0]
    for i, adapter in enumerate(adapters):
        kinds = [(tuple(a.lora_A.shape), tuple(a.lora_B.shape), float(a.scaling)) for a in (first, adapter)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"adapters[{i}] must have A, B and scaling as the first, {kinds[0]}, got {kinds[1]}")
    A = sum(w * a.lora_A for a, w in zip(adapters, weights, strict=True))
    B = sum(w * a.lora_B for a, w in zip(adapters, weights, strict=True))
    return Adapter(A, B, first.scaling)  # type: ignore[arg-type]


def search_weights(
    loss: Callable[[list[float]], float],
    n: int,
    *,
    steps: int = 40,
    bound: float = 1.5,
    l1: float = 0.05,
    generator: torch.Generator | None = None,
) -> tuple[list[float], float]:
    """n weights in [-bound, bound] for a small loss(w) + l1 · mean |w|, and that value, from `steps` evaluations.

    A (1+1) evolution strategy from w = 0 whose steps grow with success and shrink without (one fifth rule: Rechenberg 1973).

    Raises:
        ValueError: steps below 1, or a bound that is not positive.
    """
    if steps < 1:
        raise ValueError(f"steps must be an integer >= 1, got {steps}")
    if not bound > 0:
        raise ValueError(f"bound must be positive, got {bound}")

    def value(w: torch.Tensor) -> float:
        found = float(loss(w.tolist())) + l1 * w.abs().mean().item()
        return math.inf if math.isnan(found) else found

    best, sigma = torch.zeros(n, dtype=torch.float64), bound / 3
    lowest = value(best)
    for _ in range(steps - 1):
        tried = (best + sigma * torch.randn(n, dtype=torch.float64, generator=generator)).clamp(-bound, bound)
        found = value(tried)
        sigma *= 1.5 if found <= lowest else 1.5**-0.25
        if found <= lowest:
            best, lowest = tried, found
    return best.tolist(), lowest


@method(
    "LoRAHub",
    equation="ΔW = s (Σ w_k B_k)(Σ w_k A_k), w = argmin loss + 0.05 mean |w| within ±1.5, without gradients",
    use='compose.lorahub(model, ["law", "chemistry"], "both", loss)',
    changes="C",
    source="Huang et al. 2023, https://arxiv.org/abs/2307.13269",
    test="test_lorahub.py::test_composes_with_cross_terms",
    note="A survey names CMA-ES; the official code uses nevergrad's NGOpt. Cross terms by definition.",
)
@torch.no_grad()
def lorahub(
    model: Model,
    adapters: Sequence[str],
    adapter_name: str,
    loss: Callable[[Model], float],
    *,
    steps: int = 40,
    bound: float = 1.5,
    l1: float = 0.05,
    generator: torch.Generator | None = None,
) -> list[float]:
    """Adds an adapter, `weighted_factors` of others with the weights that `search_weights` finds, and makes it the active one.

    LoRAHub: Huang et al., "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition", 2023
    (https://arxiv.org/abs/2307.13269).

    Args:
        model: with layers that `add_lora` made, each of which has the adapters, of one rank and scaling.
        adapters: names.
        adapter_name: a new name.
        loss: `loss(model)`, of a few examples, is evaluated without gradient.
        steps, bound, l1, generator: of `search_weights`.

    Returns:
        The weights.

    Raises:
        ValueError: an argument that does not fit.
        RuntimeError: a layer is merged. In each case, and after an error of `loss`, the model is as it was.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("model has no layer with LoRA; see add_lora")
    for layer in layers.values():
        layer._check_names(list(adapters))
        layer._check_not_merged("lorahub")
        weighted_factors(_of_layer(layer, adapters), [0.0] * len(adapters))
        if adapter_name in layer.lora_A:
            raise ValueError(f"adapter_name must be a new name, got {adapter_name!r}")
    before = {layer: layer.active_adapters for layer in layers.values()}
    for layer in layers.values():
        like = adapters[0]
        dtype = layer.lora_A[like].dtype
        layer.add_adapter(
            adapter_name, layer.r[like], lora_alpha=layer.lora_alpha[like], lora_dropout=layer.lora_dropout[like],
            use_rslora=layer.use_rslora[like], adapter_dtype=dtype,
        )  # fmt: skip

    def compose(weights: list[float]) -> None:
        for layer in layers.values():
            A, B, _ = weighted_factors(_of_layer(layer, adapters), weights)
            layer.lora_A[adapter_name].copy_(A)
            layer.lora_B[adapter_name].copy_(B)

    def loss_of(weights: list[float]) -> float:
        compose(weights)
        return float(loss(model))

    set_adapter(model, adapter_name)
    try:
        weights, _ = search_weights(loss_of, len(adapters), steps=steps, bound=bound, l1=l1, generator=generator)
    except BaseException:
        delete_adapter(model, adapter_name)
        for layer, names in before.items():
            layer.set_adapter(names)
        raise
    compose(weights)
    return weights


def _of_layer(layer: LoraLayer, adapters: Sequence[str]) -> list[Adapter]:
    return [Adapter(layer.lora_A[name], layer.lora_B[name], layer.scaling[name]) for name in adapters]
