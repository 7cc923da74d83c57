"""Which modules of a model get an adapter."""

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..nn.conv import is_conv
from ..nn.embedding import is_embedding
from ..nn.linear import FusedLoraLinear, is_conv1d
from ..nn.quantized import is_linear4bit
from .config import LoraConfig, Targets, in_layers, is_all_linear, is_saved_whole, matches_pattern, matches_targets

# PEFT's choice of target_modules where the user makes none.
_DEFAULT_TARGETS: dict[tuple[str, ...], str] = {
    ("q_proj", "v_proj"): ("bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt qwen2 qwen3 stablelm"),
    ("query_key_value",): "bloom gpt_neox chatglm falcon RefinedWeb RefinedWebModel",
    ("query", "value"): "bert roberta xlm-roberta electra layoutlm",
    ("q", "v"): "t5 mt5",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("c_proj", "c_attn"): "btlm",
    ("in_proj",): "deberta",
    ("query_proj", "value_proj"): "deberta-v2",
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("Wqkv",): "mpt",
    ("qkv_proj",): "codegen",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    ("key", "value", "receptance", "output"): "rwkv",
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
}


def _default_targets(model: nn.Module) -> Targets:
    """`target_modules` for a transformers model of a known type; None for any other."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type == "gemma4":
        return r".*language_model\..*\.(q_proj|v_proj)"
    return next((list(t) for t, types in _DEFAULT_TARGETS.items() if model_type in types.split()), None)


def targeted_modules(model: nn.Module, config: LoraConfig) -> dict[nn.Module, str]:
    """The modules that the configuration names, each with the first of its names that is targeted.

    Raises:
        ValueError: there are none.
    """
    modules = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if name]
    linears = {m for _, m in modules if isinstance(m, nn.Linear | FusedLoraLinear) or is_conv1d(m)}
    has = f"The model has linear layers such as {some(name for name, m in modules if m in linears)}"
    wanted = config.target_modules or _default_targets(model)
    if wanted is None:
        raise ValueError(f"target_modules is None, and there is no default for this model's config.model_type. {has}")
    if is_all_linear(wanted):
        output = getattr(model, "get_output_embeddings", lambda: None)()
        found = [(name, m) for name, m in modules if m in linears and m is not output]
    else:
        found = [(name, m) for name, m in modules if matches_targets(wanted, name) and in_layers(config, name)]
    excluded = [name for name, _ in found if matches_targets(config.exclude_modules, name) or is_saved_whole(config, name)]
    kept = [(name, m) for name, m in found if name not in excluded]
    if not kept:
        fields = ("exclude_modules", "modules_to_save") if found else ("layers_to_transform", "layers_pattern")
        given = [f"{field}={value!r}" for field in fields if (value := getattr(config, field)) is not None]
        but = f" but what {' and '.join(given)} takes away" if found else f" with {' and '.join(given)}" if given else ""
        raise ValueError(f"target_modules={wanted!r} matches nothing in the model{but}. {has}")
    for field in ("rank_pattern", "alpha_pattern"):
        unused = [key for key in getattr(config, field) if not any(matches_pattern(key, name) for name, _ in kept)]
        if unused:
            warnings.warn(f"{field} has keys that match no targeted module: {some(unused)}", stacklevel=3)
    if config.exclude_modules and not any(matches_targets(config.exclude_modules, name) for name, _ in modules):
        warnings.warn(f"exclude_modules={config.exclude_modules!r} matches nothing in the model", stacklevel=3)
    targets: dict[nn.Module, str] = {}
    for name, module in kept:
        targets.setdefault(module, name)
    return targets


def check_replaceable(model: nn.Module, targets: Mapping[nn.Module, str]) -> None:
    """Raises TypeError for a layer that none of ours can stand in for."""
    # They read the weights of their children instead of calling them (the encoder layer does so in eval mode).
    readers = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    read = {child: type(m).__name__ for m in model.modules() if isinstance(m, readers) for child in m.children()}
    for module, name in targets.items():
        weight = module._parameters.get("weight")
        four_bit = is_linear4bit(module)
        plain = type(module).forward is nn.Linear.forward or is_conv1d(module) or four_bit
        if not (plain or is_embedding(module) or is_conv(module)) or "forward" in vars(module):
            why = (
                "only nn.Linear, transformers' Conv1D, bitsandbytes' quantised Linear4bit, nn.Embedding, nn.Conv1d, nn.Conv2d "
                "and nn.Conv3d are, with their own forward"
            )
        elif module in read:
            why = f"{read[module]} reads its weight without calling it"
        elif four_bit:
            continue
        elif type(weight) is not nn.Parameter or is_lazy(weight):
            why = f"its weight is no plain nn.Parameter but {type(getattr(module, 'weight', None)).__name__}"
        elif weight.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            why = f"its weight is {weight.dtype}"
        else:
            continue
        raise TypeError(
            f"target_modules takes in {name}, a {type(module).__name__}, which is not supported: {why}. "
            "Leave it out with exclude_modules; the model was left untouched"
        )


def warn_of_tied_weights(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Warns where a module that gets an adapter, or a copy of its own, shares a weight with another one."""
    changed = {part for module in modules for part in module.modules()}
    users: dict[nn.Parameter, dict[nn.Module, str]] = {}
    for name, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None:
                users.setdefault(p, {})[module] = name
    for of_weight in users.values():
        if len(of_weight) > 1 and changed & of_weight.keys():
            names = " and ".join(of_weight.values())
            warnings.warn(
                f"{names} share a weight. Each keeps it, merged or not: what the adapter of one learns changes nothing of the "
                "other. In PEFT, merging changes both",
                stacklevel=3,
            )


def some(names: Iterable[str], at_most: int = 5) -> str:
    """The first few names, for an error."""
    names = list(names)
    return ", ".join(names[:at_most]) + (", ..." if len(names) > at_most else "")
