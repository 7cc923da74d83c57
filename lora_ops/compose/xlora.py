"""X-LoRA: a classifier of the frozen model's hidden states weights adapters, token by token."""

from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..adapters.injection import lora_layers
from ..registry import method
from .routing import add_router, last_hidden_state, set_adapter_gate

Model = TypeVar("Model", bound=nn.Module)


class XLoraRouter(nn.Module):
    """g = global_scaling_weight · top_k(softmax(MLP(h) / T)), (batch, tokens, n), of the hidden states h of a first pass.

    Args:
        hidden_size: of h.
        adapters, layers: n, and how many layers there are.
        xlora_depth, xlora_size, xlora_dropout_p: linear layers of the MLP, their width, and the dropout between them.
        enable_softmax, softmax_temperature: whether the MLP's outputs go through a softmax, and its T.
        layerwise_scalings: whether every layer has weights of its own.
        top_k_lora, enable_softmax_topk: how many adapters a token keeps, and whether a softmax of their weights follows.
        scaling_pass_value: the weight of every adapter in the first pass.
        global_scaling_weight: multiplies all weights.
    """

    def __init__(
        self,
        hidden_size: int,
        adapters: int,
        layers: int,
        *,
        xlora_depth: int = 1,
        xlora_size: int = 2048,
        xlora_dropout_p: float = 0.2,
        enable_softmax: bool = True,
        softmax_temperature: float = 1.0,
        layerwise_scalings: bool = False,
        top_k_lora: int | None = None,
        enable_softmax_topk: bool = False,
        scaling_pass_value: float = 0.0,
        global_scaling_weight: float = 1.0,
    ) -> None:
        if xlora_depth < 1:
            raise ValueError(f"xlora_depth must be an integer >= 1, got {xlora_depth}")
        if top_k_lora is not None and not 1 <= top_k_lora <= adapters:
            raise ValueError(f"top_k_lora must be in [1, {adapters}], the number of adapters, or None, got {top_k_lora}")
        if not softmax_temperature > 0:
            raise ValueError(f"softmax_temperature must be positive, got {softmax_temperature}")
        super().__init__()
        widths = [hidden_size] + [xlora_size] * (xlora_depth - 1)
        hidden: list[nn.Module] = []
        for before, after in pairwise(widths):
            hidden += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(xlora_dropout_p)]
        last = nn.Linear(widths[-1], adapters * (layers if layerwise_scalings else 1))
        self.layers = nn.Sequential(*hidden, last)
        self.adapters, self.layerwise_scalings = adapters, layerwise_scalings
        self.enable_softmax, self.softmax_temperature = enable_softmax, softmax_temperature
        self.top_k_lora, self.enable_softmax_topk = top_k_lora, enable_softmax_topk
        self.scaling_pass_value, self.global_scaling_weight = scaling_pass_value, global_scaling_weight

    def forward(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor | list[Tensor]:
        scalings = self.scalings(self._first_pass(model, *args, **kwargs))
        return list(scalings.unbind(-2)) if self.layerwise_scalings else scalings

    def scalings(self, hidden: Tensor) -> Tensor:
        """The gate of hidden states: (..., n), or (..., layers, n) with `layerwise_scalings`."""
        g = self.layers(hidden.to(next(self.parameters()).dtype))
        if self.layerwise_scalings:
            g = g.unflatten(-1, (-1, self.adapters))
        if self.enable_softmax:
            g = (g / self.softmax_temperature).softmax(-1)
        hidden_ones = torch.zeros_like(g, dtype=torch.bool)
        if self.top_k_lora is not None:
            hidden_ones = ~hidden_ones.scatter(-1, g.topk(self.top_k_lora, dim=-1).indices, True)
            g = g.masked_fill(hidden_ones, 0.0)
        if self.enable_softmax_topk:
            g = g.masked_fill(hidden_ones, float("-inf")).softmax(-1)
        return g * self.global_scaling_weight

    def _first_pass(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if self.scaling_pass_value == 0.0:
            return last_hidden_state(model, *args, **kwargs)
        set_adapter_gate(model, next(self.parameters()).new_full((self.adapters,), self.scaling_pass_value))
        return last_hidden_state(model, *args, without_adapters=False, **kwargs)


@method(
    "X-LoRA",
    equation="y = x W0ᵀ + Σ_k g_k s_k (x A_kᵀ) B_kᵀ, g = softmax(MLP(h)) per token (and layer), h from a pass without adapters",
    use='compose.add_xlora(model, ["law", "chemistry"])',
    changes="C",
    source="Buehler and Buehler 2024, https://arxiv.org/abs/2402.07148",
    test="test_xlora.py::test_outputs_are_peft_s",
)
def add_xlora(model: Model, adapters: list[str], *, use_trainable_adapters: bool = False, **options: Any) -> Model:
    """Weights a model's adapters token by token: `add_router` with an `XLoraRouter`, in the model's dtype and on its device.

    X-LoRA: Buehler and Buehler 2024 (https://arxiv.org/abs/2402.07148). A first pass without adapters gives hidden states, a
    classifier of them the weights, a second pass the outputs. Names and defaults of the options are PEFT's.

    Args:
        model: a transformers model with adapters of linear layers.
        adapters: names.
        use_trainable_adapters: whether they train beside the classifier.
        options: of `XLoraRouter`.

    Raises:
        TypeError, ValueError: as `add_router` and `XLoraRouter`.
    """
    layers = [layer for _, layer in lora_layers(model)]
    size = model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
    router = XLoraRouter(size, len(adapters), len(layers), **options)
    parameter = next(model.parameters())
    return add_router(model, adapters, router.to(parameter.device, parameter.dtype), train_adapters=use_trainable_adapters)
