"""One adapter of a model from several that it has."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..nn.linear import FusedLoraLinear
from ..nn.settings import check_adapter_name
from ..registry import method
from .combine import Adapter, combine
from .injection import lora_layers
from .kinds import LoraLayer
from .whole_modules import whole_modules

Model = TypeVar("Model", bound=nn.Module)


@method(
    "Average of plugins",
    equation="W = W0 + Σ w_k s_k B_k A_k",
    use='add_weighted_adapter(model, ["law", "chemistry"], [0.5, 0.5], "mean", "cat")',
    changes="C",
    source="PEFT, https://github.com/huggingface/peft",
    test="test_combine_models.py::test_cat_of_a_model_computes_what_both_do",
)
@method(
    "ControlPE",
    equation="W = W0 + w s B A, w chosen in [0, 1] at inference",
    use='add_weighted_adapter(model, ["brief"], [0.4], "rather brief", "cat")',
    changes="C",
    source="Sun et al. 2023, https://arxiv.org/abs/2311.09773",
    test="test_combine.py::test_one_adapter_s_weight_is_a_dial",
)
def add_weighted_adapter(
    model: Model,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    *,
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    generator: torch.Generator | None = None,
) -> Model:
    """Adds to every LoRA layer of the model a new adapter made of those that it has: `combine`, with PEFT's argument names.

    The new adapter has scaling 1, the dropout and the dtype of the first one, and is not active before `set_adapter`. Biases of
    B (`lora_bias`) become Σ w_i s_i bias_i whatever the method; PEFT leaves them at zero. DoRA adapters are refused, because
    magnitudes of adapters are none of their combination; PEFT makes a DoRA adapter with ‖W0‖ for its magnitude. Two
    arguments of PEFT's are left out because there is nothing that they could choose (`svd_full_matrices`, `svd_driver`), and
    `svd_clamp` because what it clips depends on the signs of singular vectors, which are arbitrary.

    Args:
        model: with layers that `add_lora` made, each of which has the adapters.
        adapters: names.
        weights: one for each name.
        adapter_name: a new name.
        combination_type, svd_rank, density, majority_sign_method, generator: as of `combine`, whose
            `method` is `combination_type`. From a
            generator, layers draw one after the other in the order of `lora_layers`.

    Returns:
        model.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name, or, with the layer's name, a layer in which the adapters
            cannot be combined. The model is as it was.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("model has no layer with LoRA; see add_lora")
    check_adapter_name(adapter_name)
    adapters = list(adapters)
    combined: dict[str, Adapter] = {}
    biases: dict[str, Tensor | None] = {}
    for name, layer in layers.items():
        unknown = [adapter for adapter in adapters if adapter not in layer.lora_A]
        if unknown:
            raise ValueError(f"adapters must be of {name or 'model'}'s {list(layer.lora_A)}, got {unknown[0]!r}")
        if adapter_name in layer.lora_A:
            raise ValueError(f"adapter_name must be a new name, got {adapter_name!r}, which {name or 'model'} has already")
        dora = [adapter for adapter in adapters if layer.use_dora[adapter]]
        if dora:
            raise ValueError(
                f"adapters must be without DoRA, whose magnitudes cannot be combined, got {dora[0]!r} in {name or 'model'}"
            )
    for name, wrapper in whole_modules(model):
        trained = [adapter for adapter in adapters if adapter in wrapper.modules_to_save]
        if trained:
            raise ValueError(f"adapters must not train whole modules, got {trained[0]!r}, which trains {name}")
    for name, layer in layers.items():
        try:
            combined[name] = combine(
                [_beside_w0(layer, a) for a in adapters],
                weights,
                combination_type,
                svd_rank=svd_rank,
                density=density,
                majority_sign_method=majority_sign_method,
                generator=generator,
            )
            biases[name] = _combined_bias(layer, adapters, weights)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name or 'model'}: {error}; the model was left untouched") from error
    for name, layer in layers.items():
        lora_A, lora_B, _ = combined[name]
        r, dropout = lora_A.shape[0], layer.lora_dropout[adapters[0]]
        bias = biases[name]
        layer.add_adapter(
            adapter_name, r, lora_alpha=r, lora_dropout=dropout, adapter_dtype=lora_A.dtype, lora_bias=bias is not None
        )
        for factors, values in ((layer.lora_A, lora_A), (layer.lora_B, lora_B)):
            factors[adapter_name].data.copy_(values.view_as(factors[adapter_name]))
        if bias is not None:
            layer.lora_B_bias[adapter_name].data.copy_(bias)
    return model


def _beside_w0(layer: LoraLayer, adapter_name: str) -> Adapter:
    """An adapter as what it adds to W0, of which one with a weight of its own (`lora_ops.init`) has subtracted something."""
    A, B = layer._matrices(adapter_name)
    if isinstance(layer, FusedLoraLinear):
        A, B, _, _ = layer.plain_lora(adapter_name)
    return Adapter(A, B, layer.scaling[adapter_name])


def _combined_bias(layer: LoraLayer, adapters: Sequence[str], weights: Sequence[float]) -> Tensor | None:
    """Σ w_i s_i bias_i over those adapters that have a bias of B, in fp64, rounded once to the first adapter's dtype."""
    terms = [
        w * layer.scaling[a] * layer.lora_B_bias[a].detach().double()
        for w, a in zip(weights, adapters, strict=True)
        if layer.lora_bias[a]
    ]
    if not terms:
        return None
    bias = torch.stack(terms).sum(0).to(layer.lora_A[adapters[0]].dtype)
    if not torch.isfinite(bias).all():
        raise ValueError(f"the combined bias of B is not finite in {bias.dtype}: weights {list(weights)}")
    return bias
