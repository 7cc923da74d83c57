"""lora_forward, lora_backward and their 4-bit siblings for CUDA tensors: by the kernels, or by reference.py."""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import qlora_ops
from ..autograd import library
from ..ops import backward_reference, check, forward_reference
from ..qlora_ops import Weight
from . import ops
from .path import Choices, choices, choose


@functools.cache
def extension() -> Any:
    """lora_ops._C_cuda, or None: it was not built, does not load (a warning says why), or torch has no CUDA."""
    if torch.version.cuda is None or importlib.util.find_spec("lora_ops._C_cuda") is None:
        return None
    try:
        return importlib.import_module("lora_ops._C_cuda")
    except ImportError as e:
        warnings.warn(f"lora_ops: the CUDA kernels do not load, CUDA tensors run reference.py: {e}", stacklevel=2)
        return None


@functools.cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def has_kernel(x: Tensor, weight: Tensor) -> bool:
    return ops.has_kernel(x, weight) and extension() is not None and _properties(x.device).major >= 8


def _check_seed(seed: Tensor | None, device: torch.device) -> None:
    """Kernels read it where it lies."""
    if seed is not None and (seed.device != device or seed.dtype != torch.int64):
        raise ValueError(f"seed must be int64 on x's device {device}, got {seed.dtype} on {seed.device}")


def target(device: torch.device) -> ops.Target:
    return ops.Target(extension(), _properties(device).multi_processor_count, torch.cuda.current_stream(device).cuda_stream)


def known_paths(device: torch.device) -> Choices:
    return choices(device, extension().driver_version())


def _forward(op: str, x: Tensor, weight: Tensor | Weight, *beside):  # type: ignore[no-untyped-def]
    lora_A, lora_B, _, seed, *_ = beside
    _check_seed(seed, x.device)
    with torch.cuda.device(x.device):
        run: Callable[..., Any] = functools.partial(ops.forward, target(x.device), x, weight, *beside)
        shape = (lora_B.shape[0], x.shape[-1])
        return run(split=choose(known_paths(x.device), op, x, shape, lora_A, run))


def _backward(op: str, dy: Tensor, x: Tensor | None, weight: Tensor | Weight, *beside):  # type: ignore[no-untyped-def]
    lora_A, lora_B, _, seed, _, _, need_dx, *_ = beside
    _check_seed(seed, dy.device)
    with torch.cuda.device(dy.device):
        run: Callable[..., Any] = functools.partial(ops.backward, target(dy.device), dy, x, weight, *beside)
        shape = (lora_B.shape[0], lora_A.shape[1])
        return run(split=need_dx and choose(known_paths(dy.device), op, dy, shape, lora_A, run))


def lora_forward(x: Tensor, weight: Tensor, lora_A, lora_B, bias, panels, seed, scaling, dropout_p):  # type: ignore[no-untyped-def]
    check(x, weight, lora_A, lora_B, bias, scaling, dropout_p)
    if not has_kernel(x, weight):
        return forward_reference(x, weight, lora_A, lora_B, bias, panels, seed, scaling, dropout_p)
    return _forward("lora_forward", x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p)


def lora_backward(dy: Tensor, x: Tensor | None, weight: Tensor, *beside):  # type: ignore[no-untyped-def]
    if not has_kernel(dy, weight):
        return backward_reference(dy, x, weight, *beside)
    return _backward("lora_backward", dy, x, weight, *beside)


def qlora_forward(x: Tensor, *args):  # type: ignore[no-untyped-def]
    weight, beside = Weight(*args[:7]), args[7:]
    if not has_kernel(x, weight.codes):
        return qlora_ops.forward_reference(x, *args)
    lora_A, lora_B, bias, _, scaling, dropout_p = beside
    qlora_ops.check(x, weight, lora_A, lora_B, bias, scaling, dropout_p)
    return _forward("qlora_forward", x, weight, *beside)


def qlora_backward(dy: Tensor, x: Tensor | None, *args):  # type: ignore[no-untyped-def]
    weight, beside = Weight(*args[:7]), args[7:]
    if not has_kernel(dy, weight.codes):
        return qlora_ops.backward_reference(dy, x, *args)
    return _backward("qlora_backward", dy, x, weight, *beside)


library.impl("lora_forward", lora_forward, "CUDA")
library.impl("lora_backward", lora_backward, "CUDA")
library.impl("qlora_forward", qlora_forward, "CUDA")
library.impl("qlora_backward", qlora_backward, "CUDA")
