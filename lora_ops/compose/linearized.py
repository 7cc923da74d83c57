"""L-LoRA: adapters that act by their first derivative, so that what several add is the sum of what each adds."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from ..adapters.injection import lora_layers
from ..adapters.kinds import replace_modules
from ..factors import Factors
from ..nn.factored import FactoredLinear
from ..nn.linear import FusedLoraLinear
from ..registry import method

Model = TypeVar("Model", bound=nn.Module)


@method(
    "L-LoRA",
    equation="y = x W0ᵀ + s [(x A0ᵀ) Bᵀ + (x (A - A0)ᵀ) B0ᵀ]: f(θ0) + J(θ0)(θ - θ0) of θ = (A, B)",
    use="compose.linearize(model)",
    changes="P",
    source="Tang et al. 2023, https://arxiv.org/abs/2310.04742",
    test="test_linearized.py::test_is_the_first_order_taylor_expansion",
    note="With B0 = 0, LoRA's start, the derivative by A is zero: L-LoRA is LoRA with A frozen, and its official jvp computes "
    "a product whose factor is zero.",
)
class LinearizedFactors(nn.Module):
    """Factors of f(θ0) + J(θ0)(θ - θ0) for f = LoRA's output, θ = (A, B):

        s [(x A0ᵀ) B0ᵀ + (x (A - A0)ᵀ) B0ᵀ + (x A0ᵀ) (B - B0)ᵀ] = s [(x A0ᵀ) Bᵀ + (x (A - A0)ᵀ) B0ᵀ]

    which is one LoRA of rank 2r, [A0; A - A0] and [B B0], affine in A and B; of rank r, A0 and B, where B0 is zero.

    L-LoRA: Tang et al., "Parameter Efficient Multi-task Model Fusion with Partial Linearization", ICLR 2024
    (https://arxiv.org/abs/2310.04742).

    Args:
        lora_A, lora_B: A0 (r, K) and B0 (N, r), where A and B start.
    """

    A0: Tensor
    B0: Tensor

    def __init__(self, lora_A: Tensor, lora_B: Tensor) -> None:
        super().__init__()
        self.register_buffer("A0", lora_A.detach().clone())
        self.register_buffer("B0", lora_B.detach().clone())
        self.lora_A, self.lora_B = nn.Parameter(lora_A.detach().clone()), nn.Parameter(lora_B.detach().clone())
        self.starts_at_zero = not bool(lora_B.any())
        if self.starts_at_zero:
            self.lora_A.requires_grad_(False)  # its derivative is zero

    def forward(self, x: Tensor) -> Factors:
        if self.starts_at_zero:
            return Factors(self.A0, self.lora_B)
        return Factors(torch.cat([self.A0, self.lora_A - self.A0]), torch.cat([self.lora_B, self.B0], 1))


def linearize(model: Model, adapter_name: str = "default") -> Model:
    """Replaces every `FusedLoraLinear` of the model by one that acts by its adapter's first derivative, in place.

    The adapter's present values are A0 and B0. Layers keep their weight, which is shared, their scaling and their dropout.

    Raises:
        ValueError: there is no linear layer with LoRA, or one has no adapter of that name, or one of DoRA or with a bias of B.
        RuntimeError: a layer is merged. In each case the model is as it was.
    """
    layers = {n: layer for n, layer in lora_layers(model) if isinstance(layer, FusedLoraLinear)}
    for name, layer in layers.items():
        layer._check_names([adapter_name])
        layer._check_not_merged("linearize")
        if adapter_name in layer.lora_magnitude_vector or adapter_name in layer.lora_B_bias:
            raise ValueError(f"adapter_name must be neither DoRA nor have a bias of B, got {adapter_name!r} in {name}")
    if not layers:
        raise ValueError("model has no linear layer with LoRA; see add_lora")
    replace_modules(model, {layer: _linearized(layer, adapter_name) for layer in layers.values()})
    return model


def _linearized(layer: FusedLoraLinear, name: str) -> FactoredLinear:
    frozen = nn.Linear(1, 1, device="meta")
    del frozen.weight  # a parameter's place, where a weight in 4 bits cannot be
    frozen.weight, frozen.bias = layer.weight, layer.bias  # type: ignore[assignment]
    new = FactoredLinear(
        frozen,
        LinearizedFactors(layer.lora_A[name], layer.lora_B[name]),
        scaling=layer.scaling[name],
        lora_dropout=layer.lora_dropout[name],
    )
    return new.train(layer.training)
