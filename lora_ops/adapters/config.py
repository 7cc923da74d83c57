"""LoraConfig: which layers get an adapter, and which adapter."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..nn.settings import MOST_ITERATIONS, AdapterSettings
from ..registry import method

Targets = Iterable[str] | str | None

# What a field's expression stands in: a key of a pattern, one of layers_pattern, one of modules_to_save.
_PATTERN, _IN_LAYERS, _SAVED = r"(.*\.)?({})$", r"(?:^|.*?\.){}\.(?P<index>\d+)\.", r"(^|.*\.){}($|\..*)"


@method(
    "Placement",
    equation="which layers have an adapter, and of which rank and lora_alpha",
    use='LoraConfig(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 16})',
    changes="P",
    source="Hu et al. 2021, section 7.1; PEFT",
    test="test_injection.py::test_parameters_of_a_large_llama",
)
@dataclass
class LoraConfig:
    """What `add_lora` does to a model. Names, defaults and meanings are those of PEFT's `LoraConfig`.

    Args:
        r: rank, >= 1.
        target_modules: the layers that get an adapter. A list of names, each a whole module name or its end ("q_proj",
            "mlp.up_proj"); or a regular expression that a whole module name must match; or "all-linear": every
            nn.Linear and Conv1D but the output layer (`model.get_output_embeddings()`). None: PEFT's choice for the
            model's `config.model_type`.
        lora_alpha: scaling = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.
        lora_dropout: probability in [0, 1) that training hides an element of a layer's input from A.
        bias: which of the model's biases train: "none", "all", or "lora_only" (those of the layers with an adapter).
        use_rslora: rank-stabilised scaling (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
        exclude_modules: layers that get none although `target_modules` names them: a list or a regular expression.
        init_lora_weights: True, False, "gaussian", or, for linear layers, one of `lora_ops.init` that needs no data, see
            `FusedLoraLinear`. Those that do: `lora_ops.init.initialize`.
        loftq_config: of "loftq": {"loftq_iter": T}, 1 <= T <= 100, T = 1 without it; "loftq_bits" may be 4.
        rank_pattern, alpha_pattern: {regular expression: r or lora_alpha} for layers that differ. An expression must
            match a whole module name or its end after a dot; the first that matches counts.
        modules_to_save: modules that get no adapter but are trained as a whole, as copies that belong to the adapter: a list
            of names' ends.
        layers_to_transform: the indices, one or a list, of the layers in which a list of `target_modules` counts; those
            named in full count anywhere. None: all.
        layers_pattern: the names, or regular expressions, in front of such an index ("layers", "h"). None: any.
        use_dora: DoRA, see `FusedLoraLinear`.
        lora_bias: B has a bias that trains, see `FusedLoraLinear`. Not with `use_dora` or "gaussian".

    Raises:
        ValueError, TypeError: a field out of its range, by name.
    """

    r: int = 8
    target_modules: Targets = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    exclude_modules: Targets = None
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    use_dora: bool = False
    lora_bias: bool = False
    loftq_config: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        adapter = AdapterSettings(
            self.r,
            self.lora_alpha,
            self.lora_dropout,
            self.use_rslora,
            self.init_lora_weights,
            use_dora=self.use_dora,
            lora_bias=self.lora_bias,
        )
        _check_loftq(self.loftq_config, self.init_lora_weights)
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f'bias must be "none", "all" or "lora_only", got {self.bias!r}')
        _check_targets("target_modules", self.target_modules)
        _check_targets("exclude_modules", self.exclude_modules)
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name)
            if not isinstance(pattern, Mapping):
                raise TypeError(f"{name} must be a dict of {{regular expression: value}}, got {pattern!r}")
            for key, value in pattern.items():
                _check_regex(f"{name}'s key", key, _PATTERN)
                try:
                    replace(adapter, **{"r" if name == "rank_pattern" else "lora_alpha": value})
                except ValueError as error:
                    raise ValueError(f"{name}[{key!r}]: {error}") from None
        _check_modules_to_save(self.modules_to_save)
        _check_layers(self.layers_to_transform, self.layers_pattern, self.target_modules)

    @property
    def initialisation(self) -> bool | str:
        """`init_lora_weights`, "loftq" with its number of iterations."""
        iterations = self.loftq_config.get("loftq_iter", 1)
        return f"loftq_iter_{iterations}" if self.init_lora_weights == "loftq" and iterations > 1 else self.init_lora_weights

    def rank_of(self, module_name: str) -> int:
        """r of the layer of that name."""
        return next((r for key, r in self.rank_pattern.items() if matches_pattern(key, module_name)), self.r)

    def alpha_of(self, module_name: str) -> float:
        """lora_alpha of the layer of that name."""
        return next((a for key, a in self.alpha_pattern.items() if matches_pattern(key, module_name)), self.lora_alpha)

    def adapter_of(self, module_name: str) -> dict[str, Any]:
        """What the layer of that name is told of its adapter."""
        return {
            "r": self.rank_of(module_name),
            "lora_alpha": self.alpha_of(module_name),
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "init_lora_weights": self.initialisation,
            "use_dora": self.use_dora,
            "lora_bias": self.lora_bias,
        }


def matches_pattern(key: str, module_name: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` speaks of the layer of that name."""
    return re.match(_PATTERN.format(key), module_name) is not None


def matches_targets(targets: Targets, module_name: str) -> bool:
    """Whether `target_modules` or `exclude_modules` (other than "all-linear") names the module."""
    if targets is None:
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, module_name) is not None
    return any(module_name == t or module_name.endswith(f".{t}") for t in targets)


def in_layers(config: LoraConfig, module_name: str) -> bool:
    """Whether a module that a list of `target_modules` names is in one of `layers_to_transform`.

    The index is the first number in the name that stands after a name of two parts, or after a `layers_pattern`.
    """
    wanted = config.layers_to_transform
    if wanted is None or wanted == [] or module_name in (config.target_modules or ()):
        return True
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    regexes = [_IN_LAYERS.format(p) for p in patterns or ()] or [r".*?\.[^.]*\.(?P<index>\d+)\."]
    match = next((m for m in (re.match(regex, module_name) for regex in regexes) if m), None)
    return match is not None and int(match["index"]) in ([wanted] if isinstance(wanted, int) else wanted)


def is_saved_whole(config: LoraConfig, module_name: str) -> bool:
    """Whether `modules_to_save` keeps adapters from the module."""
    return any(re.match(_SAVED.format(m), module_name) for m in config.modules_to_save or ())


def is_all_linear(targets: Targets) -> bool:
    return isinstance(targets, str) and targets.lower() == "all-linear"


def _check_targets(name: str, targets: Targets) -> None:
    if isinstance(targets, str):
        _check_regex(name, targets)
    elif targets is not None:
        listed = isinstance(targets, list | tuple | set | frozenset)
        if not listed or not all(isinstance(t, str) and t for t in targets):
            raise TypeError(f"{name} must be a list of module names, a regular expression or None, got {targets!r}")
        if name == "target_modules" and not targets:
            raise ValueError("target_modules is empty: no layer would get an adapter")


def _check_loftq(config: dict[str, int], init_lora_weights: bool | str) -> None:
    if not isinstance(config, Mapping):
        raise TypeError(f"loftq_config must be a dict, got {config!r}")
    if config and init_lora_weights != "loftq":
        raise ValueError(f'loftq_config must be empty without init_lora_weights="loftq", got {config!r}')
    for key, value in config.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (key == "loftq_iter" and whole and 1 <= value <= MOST_ITERATIONS) and not (key == "loftq_bits" and value == 4):
            fit = f'"loftq_iter" from 1 to {MOST_ITERATIONS} and "loftq_bits" = 4 alone'
            raise ValueError(f"loftq_config must have {fit}, got {key!r}: {value!r}")


def _check_modules_to_save(names: list[str] | None) -> None:
    if names is None:
        return
    if not isinstance(names, list | tuple | set | frozenset) or not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"modules_to_save must be a list of module names or None, got {names!r}")
    for name in names:
        _check_regex("modules_to_save", name, _SAVED)


def _check_layers(layers: list[int] | int | None, pattern: list[str] | str | None, targets: Targets) -> None:
    listed = list(layers) if isinstance(layers, list | tuple | set | frozenset) else [] if layers is None else [layers]
    if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in listed):
        raise TypeError(f"layers_to_transform must be an index, a list of indices or None, got {layers!r}")
    patterns = [pattern] if isinstance(pattern, str) else pattern or []
    for regex in patterns:
        _check_regex("layers_pattern", regex, _IN_LAYERS)
    for name, value in (("layers_to_transform", layers), ("layers_pattern", pattern)):
        if isinstance(targets, str) and value is not None:
            raise ValueError(f"{name} must be None where target_modules is a string, got {value!r} beside {targets!r}")
    if patterns and layers is None:
        raise ValueError(f"layers_pattern needs layers_to_transform, which is None; got {pattern!r}")


def _check_regex(name: str, regex: str, used_in: str = "{}") -> None:
    if not isinstance(regex, str):
        raise TypeError(f"{name} must be a regular expression, got {regex!r}")
    try:
        for expression in (regex, used_in.format(regex)):
            re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{name} must be a regular expression, got {regex!r}: {error}") from None
