"""Base weights that PEFT saves beside an adapter: those of a transformers model's embedding and output layer."""

import json
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .config import Targets, is_all_linear, matches_targets
from .whole_modules import ModulesToSaveWrapper

_NAMES = ("embed_tokens", "lm_head")  # PEFT's EMBEDDING_LAYER_NAMES


def embeddings_to_save(model: nn.Module, layers: Container[str], targets: Targets, save: bool | str) -> dict[str, Tensor]:
    """What PEFT's `save_embedding_layers` saves, by its name in a PEFT model.

    Args:
        layers: the names of the layers with adapters.
        targets: `target_modules` as the user gave it.
        save: True, False, or "auto": where `target_modules` names an embedding (a list by `embed_tokens` or `lm_head`, a
            regular expression any name that ends so), or where `config.vocab_size` is not that of the model's directory.
    """
    targeted = _is_targeted(model, targets)
    if save is False or (save == "auto" and not (targeted or _is_resized(model))):
        return {}
    return {name: t for name, t in base_embeddings(model, layers).items() if (".base_layer." in name) == targeted}


def base_embeddings(model: nn.Module, layers: Container[str]) -> dict[str, Tensor]:
    """Weights and biases of a transformers model's embedding and output layer, unmerged, by their names in a PEFT model. Not
    those in 4 bits."""
    ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if not any(module is end for end in ends) or isinstance(module, ModulesToSaveWrapper):
            continue
        weight = getattr(module, "unmerged_weight", None)
        weight = getattr(module, "weight", None) if weight is None else weight
        prefix = f"{name}.base_layer" if name in layers else name
        if isinstance(weight, Tensor) and weight.is_floating_point():
            found[f"{prefix}.weight"] = weight
            if getattr(module, "bias", None) is not None:
                found[f"{prefix}.bias"] = module.bias
    return found


def check_not_tied(fields: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError for the configuration of an adapter whose two ends PEFT has tied (`ensure_weight_tying`)."""
    named = [fields.get(field) for field in ("target_modules", "modules_to_save")]
    names = [name.split(".")[-1] for listed in named if isinstance(listed, list) for name in listed if isinstance(name, str)]
    if fields.get("ensure_weight_tying") and any(name in _NAMES for name in names):
        raise ValueError(f"{path}: ensure_weight_tying is True for an embedding, which is not supported")


def _is_targeted(model: nn.Module, targets: Targets) -> bool:
    if targets is None or is_all_linear(targets):
        return False
    if isinstance(targets, str):
        names = [name for name, _ in model.named_modules() if any(re.match(rf"(.*\.)?{end}$", name) for end in _NAMES)]
        return any(matches_targets(targets, name) for name in names)
    return any(name in targets for name in _NAMES)


def _is_resized(model: nn.Module) -> bool:
    """Whether the vocabulary is not that of the directory which the model came from."""
    config: Any = getattr(model, "config", None)
    path = Path(getattr(config, "_name_or_path", None) or "") / "config.json"
    if not path.is_file():
        return False
    try:
        before = json.loads(path.read_text()).get("vocab_size")
    except (ValueError, AttributeError):
        return False
    return before is not None and before != getattr(config, "vocab_size", before)
