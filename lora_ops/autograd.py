"""What all operators share: registration with torch, autograd, and when a call may do without the dispatcher."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import log

library = torch.library.Library("lora_ops", "DEF")


def check_frozen(weight: Tensor) -> None:
    if weight.requires_grad:
        raise ValueError(
            "weight requires grad, but W0 is frozen by definition: no gradient of it is ever computed. "
            "Call weight.requires_grad_(False), or train W0 with torch.nn.functional.linear"
        )


@dataclass(eq=False)  # no NamedTuple: torch.compile of torch 2.8 cannot call one
class Operator:
    """An operator whose arguments begin with x, the `weight_args` of its weight, lora_A, lora_B, bias."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    weight_args: int
    # What the dispatcher ends up with, forward and backward, by whether x is on a GPU (which has both once cuda/ is imported).
    direct: dict[bool, tuple[Callable[..., Any], Callable[..., Any]]]
    # The two in PyTorch's own operations, which transforms see through.
    in_torch: tuple[Callable[..., Any], Callable[..., Any]]

    def __call__(self, *args: Any) -> Any:
        """`forward`, without the dispatcher where only its price would be noticed: it is paid for every layer of a step, by
        code that the layer before has swept from the caches."""
        if not dispatcher_has_no_say(args, gpu=True):
            return (self.in_torch[0] if transformed() else self.forward)(*args)
        if not needs_grad(args):
            return self.direct[args[0].is_cuda][0](*args)
        self.check_frozen(args)
        return _Lora.apply(self, None, *args)

    def check_frozen(self, args: tuple[Any, ...]) -> None:
        for t in args[1 : 1 + self.weight_args]:
            if isinstance(t, Tensor):
                check_frozen(t)


def needs_grad(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*args)


class _Lora(torch.autograd.Function):
    """Below the dispatcher's autograd key: `keyset` says where the call goes on to. None: to what `direct` has for x."""

    @staticmethod
    def forward(ctx, op, keyset, *args):  # type: ignore[no-untyped-def]
        n = 1 + op.weight_args
        x, weight, (lora_A, lora_B, bias), (*_, seed, scaling, dropout_p) = args[0], args[1:n], args[n : n + 3], args[n + 3 :]
        need_x, *_, need_A, need_B, need_bias = ctx.needs_input_grad[2 : n + 5]
        if keyset is None:
            with torch._C._AutoDispatchBelowAutograd():
                y, S = op.direct[x.is_cuda][0](*args)
        else:
            y, S = _below_autograd(op.forward, keyset, *args)
        # dA alone needs x, dB alone needs S: a frozen A saves no activation at all.
        tensors = [t if isinstance(t, Tensor) else None for t in weight]
        ctx.save_for_backward(x if need_A else None, lora_A, lora_B, S if need_B else None, seed, *tensors)
        ctx.mark_non_differentiable(S)
        ctx.set_materialize_grads(False)
        ctx.plain = [None if isinstance(t, Tensor) else t for t in weight]
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.op, ctx.scaling, ctx.dropout_p, ctx.need = op, scaling, dropout_p, (need_x, need_A, need_B, need_bias)
        return y, S

    @staticmethod
    def backward(ctx, dy, _dS):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            raise differentiable_once("lora_linear")
        by_argument = [None] * len(ctx.needs_input_grad)
        if dy is None:
            return tuple(by_argument)
        x, lora_A, lora_B, S, seed, *tensors = ctx.saved_tensors
        weight = [plain if t is None else t for t, plain in zip(tensors, ctx.plain, strict=True)]
        args = (dy, x, *weight, lora_A, lora_B, S, seed, ctx.scaling, ctx.dropout_p, *ctx.need)
        op = ctx.op
        gradients = backward_for(args, op.backward, op.direct[dy.is_cuda][1], op.in_torch[1], gpu=True)(*args)
        if ctx.need[3]:
            gradients = (*gradients[:3], gradients[3].to(ctx.bias_dtype))
        n = 3 + ctx.op.weight_args
        for place, gradient, need in zip((2, n, n + 1, n + 2), gradients, ctx.need, strict=True):
            by_argument[place] = gradient if need else None
        return tuple(by_argument)


def differentiable_once(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} is differentiable once: its backward has no derivative (create_graph=True). torch.func.grad of "
        "torch.func.grad has one, and so has lora_ops.reference, which is plain PyTorch"
    )


def _below_autograd(op, keyset, *args):  # type: ignore[no-untyped-def]
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def register(name: str, cpu: Callable[..., Any], fallback: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """An operator that `library` defines, without its autograd."""
    library.impl(name, log.watched(name, cpu, log.DISPATCHED), "CPU")
    library.impl(name, log.watched(name, fallback, log.DISPATCHED), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora_ops::{name}", fake, lib=library)
    return getattr(torch.ops.lora_ops, name).default


def register_autograd(name: str, op: Operator) -> None:
    def autograd(keyset, *args):  # type: ignore[no-untyped-def]
        check_untransformed(name)
        if needs_grad(args):
            op.check_frozen(args)
            return _Lora.apply(op, keyset, *args)
        return _below_autograd(op.forward, keyset, *args)

    library.impl(name, autograd, "Autograd", with_keyset=True)


def transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, ...) or forward-mode differentiation is at work. What is called under
    it is composed of PyTorch's own operations, which have a rule for each transform."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def backward_for(args, dispatched, direct, in_torch, gpu=False):  # type: ignore[no-untyped-def]
    """Which of an operator's backwards takes these arguments, dy first; dy may be a batch of many (is_grads_batched)."""
    if torch._C._functorch.is_legacy_batchedtensor(args[0]) or transformed():
        return in_torch
    return direct if dispatcher_has_no_say(args, gpu) else dispatched


def check_untransformed(name: str) -> None:
    """Of an operator that is called by itself, not by the public function: its derivative would silently be lost."""
    if transformed():
        raise RuntimeError(
            f"torch.ops.lora_ops.{name} has no rule for torch.func's transforms and forward-mode differentiation; call the "
            "function of lora_ops that it belongs to (lora_linear, qlora_linear, multi_lora_linear, dora_linear)"
        )


_PLAIN = (Tensor, torch.nn.Parameter)


def dispatcher_has_no_say(args: tuple[Any, ...], gpu: bool = False) -> bool:
    """Whether the dispatcher would do nothing but autograd and the kernel of the CPU, or with `gpu` of either: no subclass, no
    mode, no tracer."""
    if torch.compiler.is_compiling():
        return False
    for t in args:
        if type(t) not in _PLAIN and isinstance(t, Tensor):
            return False
    return (
        (args[0].is_cpu or (gpu and args[0].is_cuda))
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._ops._len_torch_dispatch_stack_pre_dispatch() == 0
        and not transformed()
        and not torch._C._get_tracing_state()
        and not torch.autograd._profiler_enabled()
    )


def plain_call(args: tuple[Any, ...]) -> bool:
    """Whether it would do nothing at all but call the CPU's kernel."""
    return dispatcher_has_no_say(args) and not needs_grad(args)
