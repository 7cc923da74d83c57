"""LoRA in a whole model: layers are replaced in place and put back."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..nn.factored import FactoredLinear
from ..nn.frozen import FrozenWeight
from ..nn.linear import FusedLoraLinear, is_conv1d
from ..nn.quantized import check_quant, is_linear4bit
from ..nn.settings import check_adapter_name
from ..quant import NF4Weight
from ..registry import method
from .config import LoraConfig
from .kinds import LoraLayer, from_layer, replace_modules
from .targets import check_replaceable, some, targeted_modules, warn_of_tied_weights
from .whole_modules import copies_of, modules_to_save, whole_modules, wrap

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Injection:
    """What `add_lora` did to a model, kept as its attribute `lora_injection`."""

    adapter_name: str
    config: LoraConfig
    requires_grad: dict[str, bool]  # of every parameter before, by name


def add_lora(
    model: Model,
    config: LoraConfig,
    adapter_name: str = "default",
    *,
    adapter_dtype: torch.dtype | None = None,
    prepack: bool = False,
    quant: str | None = None,
    blocksize: int = 64,
    double_quant: bool = True,
) -> Model:
    """Replaces the targeted layers of `model`, in place, by layers with adapters and freezes every other parameter.

    Targeted are the layers that PEFT's LoRA would target: linear layers become `FusedLoraLinear`s, embeddings
    `FusedLoraEmbedding`s, convolutions `FusedLoraConv1d`s, 2d's and 3d's. Weights are shared, not copied; the names in the
    state dict stay, and `<layer>.lora_A.<adapter_name>` (r, K) and `<layer>.lora_B.<adapter_name>` (N, r) join them (of an
    embedding, `lora_embedding_A` and `lora_embedding_B`), as do, (N,) each, `<layer>.lora_B_bias.<adapter_name>` with
    `lora_bias` and `<layer>.lora_magnitude_vector.<adapter_name>` with `use_dora`, which linear layers alone can have. A module
    that sits in several places is replaced in all of them by one layer. A layer's forward and backward hooks go on running.

    A weight that is tied stays so: an output layer that shares an embedding's weight has that weight, without the embedding's
    adapter, also while this is merged. What `modules_to_save` names is wrapped in a `ModulesToSaveWrapper`, which has a copy of
    it to train: its names in the state dict are `<module>.original_module.*` and `<module>.modules_to_save.<adapter_name>.*`.

    With `quant`, the targeted linear layers' weights are quantised to 4 bits, copies that nothing else shares. Layers that
    bitsandbytes has quantised are taken over with their codes. Either is in the state dict under bitsandbytes' keys.

    Args:
        model: holds nn.Linear, transformers' Conv1D, bitsandbytes' Linear4bit, nn.Embedding, nn.Conv1d, nn.Conv2d or nn.Conv3d
            layers, with weights in float32, bfloat16, float16 or float64, or in 4 bits.
        config: see `LoraConfig`.
        adapter_name: the key of the adapter's parameters.
        adapter_dtype: see `FusedLoraLinear`.
        prepack: of linear layers, see `FusedLoraLinear`.
        quant, blocksize, double_quant: see `FusedLoraLinear.from_linear`.

    Returns:
        model.

    Raises:
        ValueError: `target_modules` matches nothing, the model has an adapter already (one at a time), a weight cannot be
            quantised, a rank is no multiple of a convolution's groups, or `modules_to_save` names what has or holds an adapter.
        TypeError: a targeted module is not a layer that can be replaced, `modules_to_save` names a mere container, or an
            argument is of the wrong type. The model is as it was, whatever is raised.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config must be a lora_ops.LoraConfig, got {type(config).__module__}.{type(config).__name__}")
    config = dataclasses.replace(config)  # checked anew: its fields may have been assigned to
    check_adapter_name(adapter_name)
    check_quant(quant, blocksize)
    of_linear = {"prepack": prepack, "quant": quant, "blocksize": blocksize, "double_quant": double_quant}

    def layer_for(name: str, module: nn.Module) -> LoraLayer:
        make = from_layer(module)
        return make(
            module,
            **config.adapter_of(name),
            adapter_dtype=adapter_dtype,
            adapter_name=adapter_name,
            **(of_linear if make == FusedLoraLinear.from_linear else {}),
        )

    inject(model, config, adapter_name, layer_for)
    return model


def inject(
    model: nn.Module, config: LoraConfig, adapter_name: str, layer_for: Callable[[str, nn.Module], FrozenWeight]
) -> list[FrozenWeight]:
    """Replaces each module that the configuration targets by `layer_for(its name, it)`, and freezes all but what those train:
    what `add_lora` and `add_factors` have in common. The layers come in the order of the model's modules."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.Linear) or is_conv1d(model):
        raise TypeError(
            f"model is itself a {type(model).__name__}, which cannot be replaced in place: "
            "use FusedLoraLinear.from_linear(model) or FactoredLinear(model, ...)"
        )
    _check_no_adapter(model)
    targets = targeted_modules(model, config)
    check_replaceable(model, targets)
    whole = modules_to_save(model, config, targets)
    warn_of_tied_weights(model, [*targets, *whole])

    requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    layers: dict[nn.Module, FrozenWeight] = {}
    try:
        for module, name in targets.items():
            try:
                layers[module] = layer_for(name, module)
            except (ValueError, TypeError) as error:
                raise type(error)(f"{name}: {error}; the model was left untouched") from error
        copies = copies_of(whole)
    except BaseException:
        _set_requires_grad(model, requires_grad)  # a layer freezes what it shares
        raise

    model.requires_grad_(False)
    for module, layer in layers.items():
        share_hooks(module, layer)
        vars(layer)["original"] = emptied(module)  # not through setattr, which would make it a submodule
    replace_modules(model, {**layers})
    _train_biases(model, config.bias)
    wrap(model, copies, adapter_name)
    for _, wrapper in whole_modules(model):
        wrapper.set_adapter([adapter_name])
    model.lora_injection = Injection(adapter_name, config, requires_grad)  # type: ignore[assignment]
    return list(layers.values())


def remove_lora(model: Model) -> Model:
    """Undoes `add_lora` or `add_factors`: puts the original modules back, unmerged, with the `requires_grad` flags of before.

    Biases that were trained (`LoraConfig.bias`) keep their values; copies of whole modules (`modules_to_save`) go. A layer
    that was quantised on the way comes back as what it was, nn.Linear or Conv1D, with the dequantised weight: the one before is
    gone. A Linear4bit has its codes again.

    Raises:
        ValueError: neither `model` nor a part of it is a model that `add_lora` or `add_factors` was called with.
    """
    for owner in reversed(
        injected_models(model)
    ):  # inner ones first: what the outermost one remembers of the flags is the oldest
        originals: dict[nn.Module, nn.Module] = {}
        for _, layer in updated_layers(owner):
            original = vars(layer).get("original")
            if original is None:  # a layer that the user placed
                continue
            if layer.merged:
                layer.unmerge()
            original.weight = _weight_for(original, original_weight(layer))
            if "bias" in original._parameters:
                original.bias = layer.bias
            original._buffers.update({name: t for name, t in layer._buffers.items() if name in original._buffers})
            original.training = layer.training
            originals[layer] = original
        originals |= {wrapper: wrapper.original_module.train(wrapper.training) for _, wrapper in whole_modules(owner)}
        replace_modules(owner, originals)
        _set_requires_grad(owner, vars(owner).pop("lora_injection").requires_grad)
    return model


def injected_models(model: nn.Module) -> list[nn.Module]:
    """`model` and the parts of it that `add_lora` was called with, outermost first.

    Raises:
        ValueError: there is none.
    """
    found = [m for m in model.modules() if "lora_injection" in vars(m)]
    if not found:
        raise ValueError("model has no LoRA to remove: it is not what add_lora was called with")
    return found


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """(name, layer) for every layer of the model with adapters of ours, each layer once."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer))


def updated_layers(model: nn.Module) -> Iterator[tuple[str, FrozenWeight]]:
    """`lora_layers`, and the `FactoredLinear`s likewise."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, FrozenWeight))


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The trainable parameters of the model's adapters: every A and B, biases of B and DoRA's magnitudes, those of factor
    providers, and the modules that are trained as a whole (`modules_to_save`), each once. The layers' own biases
    (`LoraConfig.bias`) are not among them.

    Raises:
        ValueError: there are none.
    """
    layers = [layer for _, layer in lora_layers(model)]
    parameters = [p for layer in layers for of_adapters in layer.parameter_dicts for p in of_adapters.values()]
    parameters += [p for m in model.modules() if isinstance(m, FactoredLinear) for p in m.factors.parameters()]
    parameters += [p for _, wrapper in whole_modules(model) for p in wrapper.parameters()]
    trainable = [p for p in dict.fromkeys(parameters) if p.requires_grad]
    if not trainable:
        raise ValueError(f"model has no trainable adapter parameter ({len(layers)} layers with LoRA); see add_lora")
    return iter(trainable)


@method(
    "Merging and task switch",
    equation="W = W0 + s B A; another task: W0 again, then W0 + s B_2 A_2",
    use="merge_lora(model); unmerge_lora(model)",
    changes="C",
    source="Hu et al. 2021, https://arxiv.org/abs/2106.09685",
    test="test_named_adapters.py::test_switching_a_merged_task_is_a_fresh_merge",
    note="Subtracting s B A from a merged half-precision weight does not give W0; here W0 itself is kept and put back.",
)
def merge_lora(model: Model, to: torch.dtype | None = None) -> Model:
    """Merges every layer's adapter into its weight (`FusedLoraLinear.merge`): all layers, or none if one fails.

    Raises:
        RuntimeError: a layer is merged already.
        TypeError: `to` is no dtype of a weight.
        ValueError: there is no layer with LoRA, or one that cannot be merged (a weight that would not be finite, a bias of B
            and no bias to take it).
    """
    layers = _layers_to_change(model, merged=False)
    merge_layers(layers, dict.fromkeys(layers, to))
    return model


def unmerge_lora(model: Model) -> Model:
    """Undoes `merge_lora`: every weight is W0 again, bit for bit.

    Raises:
        RuntimeError: a layer is not merged; none is changed then.
        ValueError: there is no layer with LoRA.
    """
    for layer in _layers_to_change(model, merged=True).values():
        layer.unmerge()
    return model


def merge_layers(layers: Mapping[str, FrozenWeight], to: Mapping[str, torch.dtype | None]) -> None:
    """Merges these layers, each to its dtype, or none if one fails."""
    done: list[FrozenWeight] = []
    for name, layer in layers.items():
        try:
            layer.merge(to[name])
        except BaseException as error:
            for other in done:
                other.unmerge()
            if isinstance(error, ValueError):
                raise ValueError(f"{name}: {error}") from error
            raise
        done.append(layer)


def _layers_to_change(model: nn.Module, *, merged: bool) -> dict[str, FrozenWeight]:
    layers = dict(updated_layers(model))
    if not layers:
        raise ValueError("model has no layer with LoRA; see add_lora")
    wrong = [name for name, layer in layers.items() if layer.merged != merged]
    if wrong:
        state = "not merged" if merged else "merged already"
        raise RuntimeError(f"{len(wrong)} of {len(layers)} layers are {state} ({some(wrong)}); nothing was changed")
    return layers


def _check_no_adapter(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, FrozenWeight):
            raise ValueError(
                f"model already has LoRA: {module._active()} in {name or 'model'}. "
                "Call remove_lora(model) first; the model was left untouched"
            )
        if hasattr(module, "base_layer") and type(module).__module__.startswith("peft."):
            raise ValueError(
                f"model already has an adapter of PEFT's in {name}. Call unload() of the PeftModel first; "
                "the model was left untouched"
            )


def emptied(module: nn.Module) -> nn.Module:
    """A shell without parameters: nothing that is moved, cast or freed later lives on in it."""
    if is_linear4bit(module):
        vars(module).update(params4bit=type(module.weight), quant_state=None)
    module._parameters.update({name: None for name in ("weight", "bias") if name in module._parameters})
    return module


def original_weight(layer: FrozenWeight) -> Tensor | NF4Weight:
    """W0 of a layer that is not merged."""
    return layer.original_weight if isinstance(layer, FusedLoraLinear) else layer.weight


def _weight_for(original: nn.Module, weight: Tensor | NF4Weight) -> nn.Parameter:
    """A layer's weight as the parameter that the module had."""
    params4bit = vars(original).pop("params4bit", None)
    if params4bit is not None and isinstance(weight, NF4Weight):
        state = weight.to_bitsandbytes(quant_storage=original.quant_storage)  # type: ignore[arg-type]
        packed = state.pop("weight")
        stats = {key.removeprefix("weight."): t for key, t in state.items()}
        return params4bit.from_prequantized(packed, stats, device=weight.device, module=original)
    dense = weight.dequantize() if isinstance(weight, NF4Weight) else weight
    if is_conv1d(original):
        return nn.Parameter(dense.data.t())
    return dense if isinstance(dense, nn.Parameter) else nn.Parameter(dense)


def share_hooks(module: nn.Module, layer: nn.Module) -> None:
    """The same dicts, so that hooks and the handles that remove them work on either module."""
    prefixes = ("_forward_", "_backward_", "_is_full_backward_hook")
    vars(layer).update({key: value for key, value in vars(module).items() if key.startswith(prefixes)})


def _set_requires_grad(model: nn.Module, requires_grad: Mapping[str, bool]) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_(requires_grad.get(name, p.requires_grad))


def _train_biases(model: nn.Module, bias: str) -> None:
    if bias == "all":
        for name, p in model.named_parameters():
            if name == "bias" or name.endswith(".bias"):
                p.requires_grad_(True)
    elif bias == "lora_only":
        for _, layer in lora_layers(model):
            if layer.bias is not None:
                layer.bias.requires_grad_(True)
