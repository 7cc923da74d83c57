"""Modules that are trained as a whole beside adapters (`modules_to_save`): a copy for each adapter that wants one."""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from .config import LoraConfig
from .kinds import LoraLayer, replace_modules


class ModulesToSaveWrapper(nn.Module):
    """Stands in for a module: calls the active adapter's copy of it, or the module itself. Names are PEFT's.

    `original_module`, frozen; `modules_to_save[adapter]`, of which the active one trains. Attributes that the wrapper does not
    have are those of the module that it calls.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self.active_adapters: list[str] = []
        self.adapters_disabled = False
        self.train(module.training)

    @property
    def current(self) -> nn.Module:
        """What is called."""
        names = [] if self.adapters_disabled else self._with_copies(self.active_adapters)
        return self.modules_to_save[names[0]] if names else self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.current(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save"):  # not there yet, as while it is being copied
                raise
            return getattr(self.current, name)

    def add_adapter(self, adapter_name: str, module: nn.Module) -> None:
        """Gives an adapter its copy. Not active, and not trained, before `set_adapter`."""
        self.modules_to_save[adapter_name] = module.requires_grad_(False)

    def check_adapters(self, adapter_names: Sequence[str]) -> None:
        """Raises ValueError if more than one of these adapters has a copy."""
        names = self._with_copies(adapter_names)
        if len(names) > 1:
            raise ValueError(f"adapter_name must hold one adapter at most that trains the same whole module, got {names}")

    def set_adapter(self, adapter_names: Sequence[str]) -> None:
        self.active_adapters = list(adapter_names)
        for name, module in self.modules_to_save.items():
            for p in module.parameters():
                p.requires_grad_(name in adapter_names and (p.is_floating_point() or p.is_complex()))

    def delete_adapter(self, adapter_name: str) -> None:
        self.active_adapters = [name for name in self.active_adapters if name != adapter_name]
        if adapter_name in self.modules_to_save:
            del self.modules_to_save[adapter_name]

    def _with_copies(self, adapter_names: Sequence[str]) -> list[str]:
        return [name for name in adapter_names if name in self.modules_to_save]


def whole_modules(model: nn.Module) -> Iterator[tuple[str, ModulesToSaveWrapper]]:
    """(name, wrapper) for every module that some adapter trains as a whole, each once."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper))


def modules_to_save(model: nn.Module, config: LoraConfig, targets: Mapping[nn.Module, str]) -> dict[nn.Module, str]:
    """The modules that `modules_to_save` names, or their wrappers, each with the first of its names.

    As in PEFT, a name counts where a module's name ends in it.

    Raises:
        TypeError: one of them is a mere container.
        ValueError: one of them is in another one, or holds or is a layer that gets an adapter.
    """
    ends = tuple(config.modules_to_save or ())
    if not ends:
        return {}
    inside = {part for _, wrapper in whole_modules(model) for part in wrapper.modules() if part is not wrapper}
    inside |= {part for m in model.modules() if isinstance(m, LoraLayer) for part in m.modules() if part is not m}
    modules = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if name and m not in inside]
    found: dict[nn.Module, str] = {}
    for name, module in modules:
        if name.endswith(ends):
            found.setdefault(module, name)
    if not found:
        warnings.warn(f"modules_to_save={config.modules_to_save!r} matches nothing in the model", stacklevel=4)
    for module, name in found.items():
        if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
            raise TypeError(f"modules_to_save takes in {name}, a {type(module).__name__}, which has no forward")
        for part in module.modules():
            other = targets.get(part) or (part is not module and found.get(part))
            if other:
                raise ValueError(
                    f"modules_to_save takes in {name}, and {other}, a part of it, is named too, there or by target_modules; "
                    "the model was left untouched"
                )
    return found


def copies_of(modules: Mapping[nn.Module, str]) -> dict[nn.Module, nn.Module]:
    """A copy of each module, or of what its wrapper wraps."""
    originals = {m: m.original_module if isinstance(m, ModulesToSaveWrapper) else m for m in modules}
    return {module: copy.deepcopy(original) for module, original in originals.items()}


def wrap(model: nn.Module, copies: Mapping[nn.Module, nn.Module], adapter_name: str) -> None:
    """Puts a wrapper in the place of every module that is none yet, and gives the adapter its copy of each."""
    new = {m: ModulesToSaveWrapper(m.requires_grad_(False)) for m in copies if not isinstance(m, ModulesToSaveWrapper)}
    replace_modules(model, new)
    for module, copied in copies.items():
        wrapper: Any = new.get(module, module)
        wrapper.add_adapter(adapter_name, copied)
