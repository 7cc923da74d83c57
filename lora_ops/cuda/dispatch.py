"""lora_forward, lora_backward and their 4-bit siblings for CUDA tensors: by the kernels, or by reference.py."""

import contextlib
import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import log, qlora_ops
from ..autograd import library
from ..ops import backward_reference, check, fake_gradients, forward_reference
from ..ops import lora_forward as lora_operator
from ..qlora_ops import Weight
from ..quant.layout import DTYPES
from . import ops
from .path import VARIABLE, Choices, choices, choose, forced


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
def _runs_kernels(index: int) -> bool:
    return extension() is not None and torch.cuda.get_device_properties(index).major >= 8


def has_kernel(x: Tensor, weight: Tensor) -> bool:
    return ops.has_kernel(x, weight) and _runs_kernels(x.get_device())


def _check_seed(seed: Tensor | None, device: torch.device) -> None:
    """Kernels read it where it lies."""
    if seed is not None and (seed.device != device or seed.dtype != torch.int64):
        raise ValueError(f"seed must be int64 on x's device {device}, got {seed.dtype} on {seed.device}")


@functools.cache
def _sm_count(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def target(index: int) -> ops.Target:
    """The current stream of a GPU."""
    return ops.Target(extension(), _sm_count(index), torch._C._cuda_getCurrentRawStream(index))


@functools.cache
def known_paths(index: int) -> Choices:
    return choices(torch.device("cuda", index), extension().driver_version())


def _current(index: int) -> contextlib.AbstractContextManager[None]:
    """The GPU that kernels are launched on."""
    return contextlib.nullcontext() if torch.cuda.current_device() == index else torch.cuda.device(index)


def _forward(op: str, x: Tensor, weight: Tensor | Weight, *beside):  # type: ignore[no-untyped-def]
    lora_A, lora_B, _, seed, *_ = beside
    _check_seed(seed, x.device)
    index = x.get_device()
    with _current(index):
        run: Callable[..., Any] = functools.partial(ops.forward, target(index), x, weight, *beside)
        shape = (lora_B.shape[0], x.shape[-1])
        split = choose(known_paths(index), op, x, shape, lora_A, run)
        if log.ON:
            path = "split: cuBLAS multiplies by W0, the kernels do the rest" if split else "fused"
            why = f"{VARIABLE} says so" if forced() else "it was timed on this GPU, or goes by the rows where it cannot be"
            log.note(f"CUDA kernels, {path}, since {why}")
        return run(split=split)


def _backward(op: str, dy: Tensor, x: Tensor | None, weight: Tensor | Weight, *beside):  # type: ignore[no-untyped-def]
    lora_A, lora_B, _, seed, _, _, need_dx, *_ = beside
    _check_seed(seed, dy.device)
    index = dy.get_device()
    with _current(index):
        run: Callable[..., Any] = functools.partial(ops.backward, target(index), dy, x, weight, *beside)
        shape = (lora_B.shape[0], lora_A.shape[1])
        return run(split=need_dx and choose(known_paths(index), op, dy, shape, lora_A, run))


def lora_forward(x: Tensor, weight: Tensor, lora_A, lora_B, bias, panels, seed, scaling, dropout_p):  # type: ignore[no-untyped-def]
    check(x, weight, lora_A, lora_B, bias, scaling, dropout_p)
    if not has_kernel(x, weight):
        return forward_reference(x, weight, lora_A, lora_B, bias, panels, seed, scaling, dropout_p)
    return _forward("lora_forward", x, weight, lora_A, lora_B, bias, seed, scaling, dropout_p)


def lora_backward(dy: Tensor, x: Tensor | None, weight: Tensor, *beside):  # type: ignore[no-untyped-def]
    if not has_kernel(dy, weight):
        return backward_reference(dy, x, weight, *beside)
    return _backward("lora_backward", dy, x, weight, *beside)


def qlora_forward(x: Tensor, *args, check=qlora_ops.check):  # type: ignore[no-untyped-def]
    weight, beside = Weight(*args[:7]), args[7:]
    if not has_kernel(x, weight.codes):
        return qlora_ops.forward_reference(x, *args)
    lora_A, lora_B, bias, _, scaling, dropout_p = beside
    check(x, weight, lora_A, lora_B, bias, scaling, dropout_p)
    return _forward("qlora_forward", x, weight, *beside)


def _check_beside(x: Tensor, weight: Weight, *beside) -> None:  # type: ignore[no-untyped-def]
    qlora_ops.check_beside(x, weight.codes, *beside)


# Without checking what an NF4Weight has checked.
_qlora_forward_of_checked = functools.partial(qlora_forward, check=_check_beside)


def qlora_backward(dy: Tensor, x: Tensor | None, *args):  # type: ignore[no-untyped-def]
    weight, beside = Weight(*args[:7]), args[7:]
    if not has_kernel(dy, weight.codes):
        return qlora_ops.backward_reference(dy, x, *args)
    return _backward("qlora_backward", dy, x, weight, *beside)


def has_4bit_kernel(t: Tensor, dtype: torch.dtype) -> bool:
    """Whether t's device quantises from, and dequantises to, dtype."""
    return dtype in DTYPES and t.numel() > 0 and _runs_kernels(t.get_device())


def quantize(weight: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    index = weight.get_device()
    with _current(index):
        return ops.quantize(target(index), weight, blocksize, quant_type)


def dequantize(codes: Tensor, absmax: Tensor, K: int, blocksize: int, quant_type: str, dtype: torch.dtype) -> Tensor:
    """From absmax in fp32."""
    weight = Weight(codes, absmax, None, None, None, blocksize, quant_type)
    index = codes.get_device()
    with _current(index):
        return ops.dequantize(target(index), weight, K, dtype)


lora_operator.direct[True] = log.watched("lora_forward", lora_forward, log.DIRECT), lora_backward
qlora_ops.OPERATOR.direct[True] = log.watched("qlora_forward", _qlora_forward_of_checked, log.DIRECT), qlora_backward


def _with_empty(backward: Callable[..., Any], weight_args: int) -> Callable[..., Any]:
    """As an operator returns it: what is not needed is an empty tensor."""

    def complete(dy: Tensor, *args):  # type: ignore[no-untyped-def]
        lora_A, lora_B = args[1 + weight_args : 3 + weight_args]
        gradients = backward(dy, *args)
        empty = fake_gradients(dy, lora_A, lora_B, False, False, False, False)
        return tuple(e if g is None else g for g, e in zip(gradients, empty, strict=True))

    return complete


library.impl("lora_forward", log.watched("lora_forward", lora_forward, log.DISPATCHED), "CUDA")
library.impl("lora_backward", _with_empty(lora_backward, 1), "CUDA")
library.impl("qlora_forward", log.watched("qlora_forward", qlora_forward, log.DISPATCHED), "CUDA")
library.impl("qlora_backward", _with_empty(qlora_backward, 7), "CUDA")
