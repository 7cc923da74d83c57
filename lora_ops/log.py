"""LORA_OPS_LOG=info: every layer says once which path it took and why, through Python's logger "lora_ops".

    lora_ops: model.layers.0.self_attn.q_proj: lora_forward: fused kernels (amx), tensors as they come, without the dispatcher

What is off (the default) costs nothing: no function is wrapped, no hook is registered, and notes are asked for where a path
is slow anyway.
"""

import logging
import os
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

logger = logging.getLogger("lora_ops")
VARIABLE = "LORA_OPS_LOG"


def _is_on() -> bool:
    choice = os.environ.get(VARIABLE) or "off"
    if choice not in ("info", "off"):
        raise ValueError(f'{VARIABLE} is "{choice}"; it may be info or off')
    return choice == "info"


ON = _is_on()
DISPATCHED, DIRECT = "through the dispatcher", "without the dispatcher"

_names: "WeakKeyDictionary[nn.Module, str]" = WeakKeyDictionary()
_said: "WeakKeyDictionary[nn.Module, set[str]]" = WeakKeyDictionary()
_said_without_layer: dict[Any, set[str]] = {}


class _Thread(threading.local):
    def __init__(self) -> None:
        self.modules: list[nn.Module] = []  # whose forward is running, outermost first
        self.notes: list[str] = []  # of the operator that is running


_thread = _Thread()


def note(path: str) -> None:
    """What the operator that is running does, and why."""
    if ON:
        _thread.notes.append(path)


def say(path: str, without_layer: Any = None) -> None:
    """Once for each layer: the module whose forward is running, or else whatever `without_layer` is."""
    if torch.compiler.is_compiling():
        return
    module = _thread.modules[-1] if _thread.modules else None
    said = _said_without_layer.setdefault(without_layer, set()) if module is None else _said.setdefault(module, set())
    if path not in said:
        said.add(path)
        logger.info("%s", path if module is None else f"{_names.get(module) or type(module).__name__}: {path}")


def watched(name: str, call: Callable[..., Any], how: str) -> Callable[..., Any]:
    """The operator's kernel `call`, which says what it did; `call` itself where nobody asks."""
    if not ON or not name.endswith("forward"):
        return call

    def watch(x: Tensor, weight: Any, *args: Any) -> Any:
        outer, _thread.notes = _thread.notes, []
        try:
            result = call(x, weight, *args)
            path = "; ".join(_thread.notes) or f"{kernels()}, tensors as they come"
        finally:
            _thread.notes = outer
        first = weight[0] if isinstance(weight, list) else weight
        say(f"{name}: {path}, {how}", without_layer=(tuple(first.shape), id(first)))
        return result

    return watch


def kernels() -> str:
    from . import _C

    return f"fused kernels ({_C.isa()})"


def reference(x: Tensor, transformed: bool) -> str:
    """A note: reference.py, and why."""
    if transformed:
        why = "a transform of torch.func is at work"
    elif x.device.type not in ("cpu", "cuda"):
        why = f"there are no kernels for {x.device.type}"
    elif x.dtype == torch.float64:
        why = "x is torch.float64"
    elif x.device.type == "cuda":
        why = f"x is {x.dtype}, or is empty, or the CUDA kernels are not there or not for this GPU (lora_ops doctor says)"
    else:
        why = f"x is {x.dtype}, or a tensor is empty"
    return f"reference.py, since {why}"


def _enter(module: nn.Module, _args: Any) -> None:
    if torch.compiler.is_compiling() or isinstance(module, torch.fx.GraphModule):
        return
    if not _thread.modules:
        for name, part in module.named_modules():
            _names.setdefault(part, name)
    _thread.modules.append(module)


def _leave(module: nn.Module, _args: Any, _result: Any) -> None:
    if not torch.compiler.is_compiling() and module in _thread.modules:
        del _thread.modules[_thread.modules.index(module) :]


if ON:
    logger.setLevel(logging.INFO)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("lora_ops: %(message)s"))
    handler.addFilter(lambda _: not logging.getLogger().handlers)  # where logging is set up, it is what shows
    logger.addHandler(handler)
    nn.modules.module.register_module_forward_pre_hook(_enter)
    nn.modules.module.register_module_forward_hook(_leave, always_call=True)
