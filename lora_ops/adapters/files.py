"""Adapters in PEFT's files: adapter_config.json and adapter_model.safetensors, written and read without PEFT.

base_model.model.<module>.lora_A.weight (r, K)          base_model.model.<module>.lora_B.weight (N, r)
base_model.model.<module>.lora_embedding_A (r, V)       base_model.model.<module>.lora_embedding_B (N, r)
base_model.model.<module>.lora_B.bias (N,)              with lora_bias
base_model.model.<module>.lora_magnitude_vector (N,)    with use_dora
base_model.model.<module>.base_layer.bias (N,)          where LoraConfig.bias is not "none"
base_model.model.<module>.<anything>                    of modules_to_save
base_model.model.<module>.base_layer.weight             of embeddings and output layers, see save_embedding_layers
"""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from .config import LoraConfig, is_all_linear
from .embeddings import base_embeddings, check_not_tied, embeddings_to_save
from .injection import Injection, add_lora, lora_layers, original_weight
from .kinds import LoraLayer, check_variants, factor_names, factor_shapes
from .starts import FOLLOW_FROM_W0, KEEP_W0, Plain, initialisation_in_file, start_of
from .switching import add_adapter
from .targets import check_replaceable, targeted_modules
from .whole_modules import ModulesToSaveWrapper, modules_to_save, whole_modules
from .writing import write_files

Model = TypeVar("Model", bound=nn.Module)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEYS = ("lora_B.bias", "lora_magnitude_vector")  # of a layer's parameter_dicts behind A and B

# What PEFT 0.21 writes of features that are not used. Another value of one of them is another forward, and is refused.
_UNUSED: dict[str, Any] = {
    "alora_invocation_tokens": None, "arrow_config": None, "kasa_config": None, "layer_replication": None,
    "megatron_config": None, "monteclora_config": None, "target_parameters": None, "trainable_token_indices": None,
    "use_bdlora": None, "use_qalora": False, "velora_config": None,
}  # fmt: skip
# What says nothing of the forward of a finished adapter.
_NOTES: dict[str, Any] = {
    "auto_mapping": None, "base_model_name_or_path": None, "corda_config": None, "ensure_weight_tying": False,
    "eva_config": None, "fan_in_fan_out": False, "inference_mode": True, "lora_ga_config": None,
    "megatron_core": "megatron.core", "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16,
    "revision": None, "task_type": None,
}  # fmt: skip
_OURS = (
    "r", "target_modules", "lora_alpha", "lora_dropout", "bias", "use_rslora", "exclude_modules", "init_lora_weights",
    "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "layers_pattern", "use_dora", "lora_bias",
    "loftq_config",
)  # fmt: skip


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    save_embedding_layers: bool | str = "auto",
) -> Path:
    """Writes an adapter of the model as PEFT's `save_pretrained` does; `PeftModel.from_pretrained` reads it.

    An adapter with a weight of its own is saved as PEFT would if that weight follows from W0 ("pissa", "olora", "loftq"): who
    reads it initialises first. Otherwise ("pissa_niter_4", "milora", "lora_ga", ...) nobody could, and the file has the plain
    adapter beside W0, of rank 2r, that `FusedLoraLinear.convert_to_plain_lora` makes; the model keeps its own.

    Dtypes are kept. Both files are written beside the old ones and take their names at the end: what goes wrong before leaves
    the directory as it was.

    Of a model that is sharded (fully_shard, tensor parallelism), every process must call it: the first one writes, and all of
    them return when it has.

    Args:
        model: what `add_lora` was called with.
        directory: is made where it does not exist. An adapter that is not "default" goes to a folder of its name in it.
        save_embedding_layers: whether the weights W0 of a transformers model's embedding and output layer are saved, too:
            those of the two that have adapters, or else both. "auto": where a list of `target_modules` has "embed_tokens" or
            "lm_head" in it, or a regular expression matches a module of such a name, and where the vocabulary is not that of
            the directory which the model came from.

    Returns:
        The folder of the two files.

    Raises:
        ValueError: no layer has an adapter of that name, or its layers differ in what a configuration has once for all.
        OSError: a file cannot be written, by its name; the directory is as it was.
    """
    if save_embedding_layers not in (True, False, "auto"):
        raise ValueError(f'save_embedding_layers must be True, False or "auto", got {save_embedding_layers!r}')
    layers = {name: layer for name, layer in lora_layers(model) if adapter_name in layer.lora_A}
    if not layers:
        raise ValueError(f"adapter_name must be an adapter of the model's LoRA layers, got {adapter_name!r}")
    init, plain = initialisation_in_file(layers, adapter_name, _injected_config(model).init_lora_weights)
    config = _NOTES | _UNUSED | _configuration(model, layers, adapter_name, plain) | init
    config["base_model_name_or_path"] = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    tensors: dict[str, Tensor] = {**_parameters(layers, adapter_name)}
    for name, (lora_A, lora_B, _, _) in plain.items():
        tensors |= dict(zip((f"{name}.{factor}" for factor in factor_names(layers[name])), (lora_A, lora_B), strict=True))
    tensors |= _beside_factors(model, layers, config["bias"], _whole(model, adapter_name), adapter_name)
    targets = _injected_config(model).target_modules
    tensors |= embeddings_to_save(model, layers, targets, save_embedding_layers)
    for name in plain:
        if f"{name}.base_layer.weight" in tensors:
            tensors[f"{name}.base_layer.weight"] = original_weight(layers[name])  # type: ignore[assignment]
    sharded = any(hasattr(t, "full_tensor") for t in tensors.values())
    tensors = _apart({_PREFIX + name: _gathered(t.detach()).cpu().contiguous() for name, t in tensors.items()})

    folder = Path(directory) if adapter_name == "default" else Path(directory) / adapter_name
    if sharded and torch.distributed.get_rank() != 0:
        torch.distributed.barrier()
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True)
    write_files(
        {
            folder / WEIGHTS: lambda path: save_file(tensors, path, metadata={"format": "pt"}),
            folder / CONFIG: lambda path: path.write_text(text),  # JSON in ASCII
        }
    )
    if sharded:
        torch.distributed.barrier()
    return folder


def _gathered(t: Tensor) -> Tensor:
    """A DTensor as a whole."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def load_adapter(model: Model, directory: str | os.PathLike[str], adapter_name: str = "default") -> Model:
    """Reads an adapter that `save_adapter` or PEFT's `save_pretrained` wrote.

    A model without LoRA layers gets them (`add_lora`), one with them a further adapter, or new numbers in the one of that
    name. Dtypes are kept where the kernels take them beside the layer's weight; another half becomes fp32. Nothing but
    safetensors is read.

    Raises:
        FileNotFoundError: one of the two files is not there.
        ValueError: a file is damaged, uses a feature that is not supported, or does not fit the model; the first key or field
            that is wrong is named. The model is as it was.
    """
    folder = Path(directory)
    if not (folder / CONFIG).exists() and (folder / adapter_name / CONFIG).exists():
        folder = folder / adapter_name
    config, tensors = _read_config(folder / CONFIG), _read_tensors(folder / WEIGHTS)
    layers = dict(lora_layers(model))
    targeted = targeted_modules(model, config)
    targets = {name: module for module, name in targeted.items()}
    try:
        check_replaceable(model, {m: name for m, name in targeted.items() if not isinstance(m, LoraLayer)})
        whole = modules_to_save(model, config, targeted)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    beside = _beside_factors(model, targets, config.bias, whole, adapter_name)
    _check_tensors(tensors, targets, config, beside, base_embeddings(model, targets), folder / WEIGHTS)
    if layers and layers.keys() != targets.keys():
        name = sorted(layers.keys() ^ targets.keys())[0]
        raise ValueError(f"{folder / CONFIG}: target_modules and the model's LoRA layers differ in {name}")
    for name, layer in layers.items():
        if adapter_name not in layer.lora_A:
            continue
        start = start_of(layer, adapter_name)
        wanted = config.initialisation if config.init_lora_weights in FOLLOW_FROM_W0 else None
        fields = [(field, getattr(layer, field)[adapter_name]) for field in ("r", "use_dora", "lora_bias")]
        asked_of = {"r": config.rank_of(name), "use_dora": config.use_dora, "lora_bias": config.lora_bias}
        for field, found in [*fields, ("init_lora_weights", start)]:
            asked = asked_of.get(field, wanted)
            if found != asked:
                raise ValueError(
                    f'{name} has an adapter "{adapter_name}" with {field}={found}, and {folder / CONFIG} says {asked}: '
                    "delete_adapter() it first, or load it under another name"
                )
    if any(adapter_name in layer.lora_A for layer in layers.values()) and whole.keys() != _whole(model, adapter_name).keys():
        raise ValueError(f'{folder / CONFIG}: modules_to_save is not what the model\'s adapter "{adapter_name}" has')

    dtype, of_magnitude = (_adapter_dtype(tensors, targets, magnitudes=magnitudes) for magnitudes in (False, True))
    is_new = True
    if not layers:
        add_lora(model, config, adapter_name, adapter_dtype=dtype)
    elif not all(adapter_name in layer.lora_A for layer in layers.values()):
        add_adapter(model, config, adapter_name, adapter_dtype=dtype)
    else:
        is_new = False
    layers = dict(lora_layers(model))
    with torch.no_grad():
        for name, layer in layers.items():
            if is_new and config.use_dora:
                magnitude = layer.lora_magnitude_vector[adapter_name]
                magnitude.data = magnitude.data.to(of_magnitude)
            layer.set_scaling(adapter_name, config.alpha_of(name), config.use_rslora)
        places = _beside_factors(model, layers, config.bias, _whole(model, adapter_name), adapter_name)
        places |= _parameters(layers, adapter_name)
        for name, place in (places | base_embeddings(model, layers)).items():
            if _PREFIX + name in tensors:
                place.copy_(tensors[_PREFIX + name])
    return model


def _configuration(model: nn.Module, layers: Mapping[str, LoraLayer], adapter_name: str, plain: Plain) -> dict[str, Any]:
    """What the layers are, as a configuration: the most common rank and lora_alpha, and a pattern for each other."""
    found = {}
    for field in ("lora_dropout", "use_rslora", "use_dora", "lora_bias"):
        values = {getattr(layer, field)[adapter_name] for layer in layers.values()}
        if len(values) > 1:
            raise ValueError(f'{field} must be the same in all layers of adapter "{adapter_name}", got {sorted(values)}')
        (found[field],) = values
    for i, field, pattern in ((2, "r", "rank_pattern"), (3, "lora_alpha", "alpha_pattern")):
        of_layers = {name: getattr(layer, field)[adapter_name] for name, layer in layers.items()}
        of_layers |= {name: of_plain[i] for name, of_plain in plain.items()}
        common = Counter(of_layers.values()).most_common(1)[0][0]
        found[field] = common
        found[pattern] = {re.escape(name): value for name, value in of_layers.items() if value != common}
    config, whole = _injected_config(model), sorted(_whole(model, adapter_name).values())
    same = bool(whole) and all(name.endswith(tuple(config.modules_to_save or ())) for name in whole)
    targets = config.target_modules
    short = not (targets is None or is_all_linear(targets) or config.exclude_modules)
    short = short and config.layers_to_transform is None and same == bool(config.modules_to_save)
    short = short and len(layers) == len(dict(lora_layers(model)))
    return found | {
        "target_modules": targets if short and isinstance(targets, str) else sorted(targets if short and targets else layers),
        "exclude_modules": None,
        "modules_to_save": (list(config.modules_to_save or ()) if same else whole) or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "bias": config.bias,
    }


def _parameters(layers: Mapping[str, LoraLayer], adapter_name: str) -> dict[str, nn.Parameter]:
    """An adapter's, by their names in a PEFT model's file."""
    return {
        f"{name}.{key}": parameters[adapter_name]
        for name, layer in layers.items()
        for key, parameters in zip((*factor_names(layer), *_KEYS), layer.parameter_dicts, strict=True)
        if adapter_name in parameters
    }


def _injected_config(model: nn.Module) -> LoraConfig:
    injection: Injection | None = vars(model).get("lora_injection")
    return injection.config if injection is not None else LoraConfig()


def _whole(model: nn.Module, adapter_name: str) -> dict[nn.Module, str]:
    """The wrappers that have the adapter's copies."""
    return {wrapper: name for name, wrapper in whole_modules(model) if adapter_name in wrapper.modules_to_save}


def _beside_factors(
    model: nn.Module, layers: Mapping[str, nn.Module], bias: str, whole: Mapping[nn.Module, str], adapter_name: str
) -> dict[str, Tensor]:
    """The biases that train, and the modules that do as a whole, wrapped already or not, by their names in PEFT's files."""
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if bias != "none" and getattr(layer, "bias", None) is not None:
            found[f"{name}.base_layer.bias"] = layer.bias  # type: ignore[assignment]
    inside = set(layers) | {name for name, _ in whole_modules(model)} | set(whole.values())
    for name, p in model.named_parameters() if bias == "all" else ():
        if name.endswith("bias") and not any(name.startswith(f"{other}.") for other in inside):
            found[name] = p
    for module, name in whole.items():
        original: Any = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
        wrapped = isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
        copied: Any = module.modules_to_save[adapter_name] if wrapped else original  # type: ignore[index]
        for key, t in copied.state_dict(keep_vars=True).items():
            found[f"{name}.{key}"] = t
            if bias == "all" and f".{key}".endswith(".bias"):  # PEFT saves them thrice
                found[f"{name}.modules_to_save.{key}"] = t
                found[f"{name}.original_module.{key}"] = original.state_dict(keep_vars=True)[key]
    return found


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each in memory of its own: safetensors has no word for weights that are tied."""
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, t in tensors.items():
        address = t.untyped_storage().data_ptr()
        apart[name] = t.clone() if address in seen else t
        seen.add(address)
    return apart


def _read_config(path: Path) -> LoraConfig:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are of the first kind
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(fields).__name__}")
    if fields.get("peft_type") != "LORA":
        raise ValueError(f'{path}: peft_type must be "LORA", got {fields.get("peft_type")!r}')
    for field, value in fields.items():
        known = field in _OURS or field in _NOTES
        if not known and value != _UNUSED.get(field) and value not in (None, False, {}, []):
            raise ValueError(f"{path}: {field} is {value!r}, which is not supported")
    if not fields.get("target_modules"):
        raise ValueError(f"{path}: target_modules must name modules, got {fields.get('target_modules')!r}")
    init = fields.get("init_lora_weights", True)
    if init not in (*KEEP_W0, *FOLLOW_FROM_W0):
        raise ValueError(
            f"{path}: init_lora_weights is {init!r}, which changes the base weights as nobody can repeat; convert the adapter "
            "(PEFT's save_pretrained with path_initial_model_for_weight_conversion)"
        )
    check_not_tied(fields, path)
    chosen = {field: fields[field] for field in _OURS if field in fields}
    chosen["init_lora_weights"] = init if init in (True, False, "gaussian", *FOLLOW_FROM_W0) else True
    if init != "loftq":
        chosen.pop("loftq_config", None)
    try:
        return LoraConfig(**chosen)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; only safetensors are read")
    try:
        return load(path.read_bytes())  # safetensors' load_file (0.8) leaves memory behind at every call
    except KeyError as error:
        raise ValueError(f"{path} has a tensor of dtype {error}, which torch does not have") from error
    except (SafetensorError, ValueError, RuntimeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _check_tensors(
    tensors: Mapping[str, Tensor],
    targets: Mapping[str, nn.Module],
    config: LoraConfig,
    beside: Mapping[str, Tensor],
    optional: Mapping[str, Tensor],
    path: Path,
) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in targets.items():
        try:
            check_variants(module, config.use_dora, config.lora_bias)
            of_A, of_B = factor_shapes(module, config.rank_of(name))
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from error
        shapes |= {f"{_PREFIX}{name}.{factor}": shape for factor, shape in zip(factor_names(module), (of_A, of_B), strict=True)}
        if config.lora_bias:
            shapes[f"{_PREFIX}{name}.lora_B.bias"] = of_B[:1]
        if config.use_dora:
            shapes[f"{_PREFIX}{name}.lora_magnitude_vector"] = of_B[:1]
    given = {name: t for name, t in optional.items() if _PREFIX + name in tensors}
    shapes |= {_PREFIX + name: tuple(t.shape) for name, t in {**beside, **given}.items()}
    whole_numbers = {_PREFIX + name: t.dtype for name, t in beside.items() if not t.is_floating_point()}
    for key in sorted(shapes.keys() | tensors.keys()):
        if key not in tensors:
            raise ValueError(f"{path} lacks {key}")
        if key not in shapes:
            raise ValueError(f"{path} has {key}, which the model or the configuration has no place for")
        t = tensors[key]
        if tuple(t.shape) != shapes[key]:
            raise ValueError(f"{path}: {key} must have shape {shapes[key]}, got {tuple(t.shape)}")
        if key in whole_numbers:  # a buffer
            if t.dtype != whole_numbers[key]:
                raise ValueError(f"{path}: {key} must be {whole_numbers[key]}, got {t.dtype}")
            continue
        if not t.is_floating_point() or t.dtype.itemsize < 2:
            raise ValueError(f"{path}: {key} must be float32, bfloat16, float16 or float64, got {t.dtype}")
        if not torch.isfinite(t).all():
            raise ValueError(f"{path}: {key} has values that are not finite")
        again = key.replace(".modules_to_save.", ".")
        if again != key and again in tensors and not torch.equal(t, tensors[again]):
            raise ValueError(f"{path}: {key} and {again} are one bias, and differ")


def _adapter_dtype(tensors: Mapping[str, Tensor], targets: Mapping[str, nn.Module], *, magnitudes: bool) -> torch.dtype:
    """The files' dtype, of magnitudes or of the rest, where the kernels take it beside every weight, else fp32 (fp64 beside
    fp64)."""
    dtypes = {t.dtype for name, t in tensors.items() if ".lora_" in name and name.endswith("magnitude_vector") == magnitudes}
    weights = {module.weight.dtype for module in targets.values()}  # uint8 is in 4 bits
    (dtype,) = dtypes if len(dtypes) == 1 else {torch.float32}
    beside_half = dtype == torch.float32 and torch.float64 not in weights
    if beside_half or weights == {dtype}:
        return dtype
    return torch.float64 if torch.float64 in weights else torch.float32
