"""torch.ops.lora_ops.lora_general_*: what ops.py has, with factors between A and B, and behind the product.

    lora_general_forward   y, S from x, the frozen weight (dense, or in 4 bits), one adapter and its factors; z if `keep_z`
    lora_general_backward  dx, dA, dB and in fp32 dbias, dgate, dcore, dout_scale, of which only those asked for are computed

z (reference.lora_general_forward) only out_scale's gradient needs. What is not asked for comes back empty. `weight`,
blocksize and quant_type are those of `qlora_ops.operand_of`.
"""

import math

import torch
from torch import Tensor

from . import checks, log, ops, qlora_ops, reference
from .autograd import (
    _below_autograd,
    backward_for,
    check_frozen,
    check_untransformed,
    differentiable_once,
    dispatcher_has_no_say,
    library,
    needs_grad,
    register,
    transformed,
)
from .multi_ops import _codes, _dense, _for_kernel

_WEIGHT = "Tensor[] weight, int blocksize, str quant_type, Tensor lora_A, Tensor lora_B"
_FACTORS = "Tensor? gate, Tensor? core, Tensor? out_scale"
_NEED = ", ".join(f"bool need_{name}" for name in ("dx", "dA", "dB", "dbias", "dgate", "dcore", "dout_scale"))
library.define(
    f"lora_general_forward(Tensor x, {_WEIGHT}, Tensor? bias, {_FACTORS}, Tensor? panels, Tensor? seed, float scaling, "
    "float dropout_p, bool keep_z) -> (Tensor, Tensor, Tensor)"
)
library.define(
    f"lora_general_backward(Tensor dy, Tensor? x, {_WEIGHT}, {_FACTORS}, Tensor? S, Tensor? z, Tensor? seed, float scaling, "
    f"float dropout_p, {_NEED}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def check(x, weight, blocksize, quant_type, lora_A, lora_B, bias, gate, core, out_scale, scaling, dropout_p) -> None:  # type: ignore[no-untyped-def]
    """Raises ValueError or TypeError naming the argument that does not fit, what it is and what it may be."""
    beside = lora_A, lora_B, bias, scaling, dropout_p
    if quant_type:
        qlora_ops.check(x, _codes(weight, blocksize, quant_type), *beside)
    else:
        checks.check(x, weight[0], *beside)
    N, r = lora_B.shape
    _check_factors(x, N, r, gate, core, out_scale)
    checks.check_kinds(x, gate=gate, core=core, out_scale=out_scale)


def _check_factors(x, N, r, gate, core, out_scale) -> None:  # type: ignore[no-untyped-def]
    of_token = (*x.shape[:-1], r)
    for name, t, may_be, shapes in (
        ("gate", gate, f"(r,) = {(r,)} or (..., r) = {of_token}", ((r,), of_token)),
        ("core", core, f"(r, r) = {(r, r)}", ((r, r),)),
        ("out_scale", out_scale, f"(N,) = {(N,)}", ((N,),)),
    ):
        if t is not None and t.shape not in shapes:
            raise ValueError(f"{name} must be {may_be}, got shape {tuple(t.shape)}")


def _wide(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _rows(gate: Tensor | None, M: int) -> Tensor | None:
    return gate if gate is None or gate.dim() == 1 else gate.reshape(M, gate.shape[-1])


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _is_finite(t: Tensor) -> bool:
    """False, too, where it is finite and its sum is not."""
    return math.isfinite(t.sum(dtype=torch.float32))


def _for_general(gate: Tensor | None, core: Tensor | None, out_scale: Tensor | None, z: Tensor | None) -> ops.General:
    """Of tensors in fp32, which the caller holds."""
    gate_row_stride = 0 if gate is None or gate.dim() == 1 else gate.shape[-1]
    return _address(gate), gate_row_stride, ops.matrix(core), _address(out_scale), ops.matrix(z)


def _forward_cpu(  # type: ignore[no-untyped-def]
    x, weight, blocksize, quant_type, lora_A, lora_B, bias, gate, core, out_scale, panels, seed, scaling, dropout_p, keep_z
):
    if x.dtype not in ops._DTYPES or weight[0].numel() == 0:
        return forward_reference(
            x, weight, blocksize, quant_type, lora_A, lora_B, bias, gate, core, out_scale, panels, seed, scaling, dropout_p,
            keep_z,
        )  # fmt: skip
    check(x, weight, blocksize, quant_type, lora_A, lora_B, bias, gate, core, out_scale, scaling, dropout_p)
    if panels is not None:
        ops._check_panels(panels, weight[0], x.dtype)
    rows, N = ops.rows_of(x), lora_B.shape[0]
    (M, K), external = rows.shape, panels is None and ops.on_torch(x.dtype)
    if external:
        y = rows @ _dense(x, weight, K, blocksize, quant_type).to(x.dtype).T
    else:
        weight = weight if quant_type else [ops._strided(weight[0])]
        y = torch.empty((M, N), dtype=x.dtype)
    z = torch.empty((M, N) if keep_z else 0, dtype=x.dtype)
    factors = _wide(_rows(gate, M)), _wide(core), _wide(out_scale)
    S = ops.forward_kernel(
        rows, None if external else _for_kernel(weight, blocksize, quant_type), panels, lora_A, lora_B, bias, seed, scaling,
        dropout_p, y, _for_general(*factors, z if keep_z else None),
    )  # fmt: skip
    return y.view(*x.shape[:-1], N), S, z


def _backward_cpu(  # type: ignore[no-untyped-def]
    dy, x, weight, blocksize, quant_type, lora_A, lora_B, gate, core, out_scale, S, z, seed, scaling, dropout_p, need_dx, *need
):
    # Kernels sum before they scale, and do not meet infinity minus infinity where it would be met.
    infinite = out_scale is not None and not _is_finite(out_scale)
    if dy.dtype not in ops._DTYPES or weight[0].numel() == 0 or infinite:
        return backward_reference(
            dy, x, weight, blocksize, quant_type, lora_A, lora_B, gate, core, out_scale, S, z, seed, scaling, dropout_p,
            need_dx, *need,
        )  # fmt: skip
    (r, K), (M, N), g = lora_A.shape, (math.prod(dy.shape[:-1]), dy.shape[-1]), ops.rows_of(dy)
    _check_factors(dy, N, r, gate, core, out_scale)
    need_dA, need_dB, _, *of_factors = need
    need_dout_scale = of_factors[2]
    checks.check_kept(x=(x, M * K, need_dA), S=(S, M * r, need_dB or any(of_factors)), z=(z, M * N, need_dout_scale))
    external = need_dx and ops.base_on_torch(dy.dtype)
    dx, operand = torch.empty((M, K) if need_dx and not external else 0, dtype=dy.dtype), None
    if external:
        dz = g if out_scale is None else (g * out_scale).to(g.dtype)
        dx = dz @ _dense(dy, weight, K, blocksize, quant_type).to(g.dtype)
    elif need_dx:
        weight = weight if quant_type else [ops._strided(weight[0])]
        operand = _for_kernel(weight, blocksize, quant_type)
    factors = _wide(_rows(gate, M)), _wide(core), _wide(out_scale)
    grads = [
        torch.empty(t.shape if n else 0, dtype=torch.float32) for t, n in zip((gate, core, out_scale), of_factors, strict=True)
    ]
    general = (*_for_general(*factors, z), *(t.data_ptr() if t.numel() else 0 for t in grads))
    rest = ops.backward_kernel(
        g, x, operand, lora_A, lora_B, S, seed, scaling, dropout_p, dx if need_dx else None, *need[:3], general=general
    )
    if need_dout_scale and not _is_finite(grads[2]):  # nor do they meet it in z, which they do not put together
        grads[2] = backward_reference(
            dy, None, weight, blocksize, quant_type, lora_A, lora_B, gate, core, out_scale, S, z, None, scaling, 0.0,
            *[False] * 6, True,
        )[6]  # fmt: skip
    return dx.view(*dy.shape[:-1], K) if need_dx else dx, *rest, *grads


def forward_reference(  # type: ignore[no-untyped-def]
    x, weight, blocksize, quant_type, lora_A, lora_B, bias, gate, core, out_scale, panels, seed, scaling, dropout_p, keep_z
):
    if log.ON:
        log.note(log.reference(x, transformed()))
    check(x, weight, blocksize, quant_type, lora_A, lora_B, bias, gate, core, out_scale, scaling, dropout_p)
    M, K = math.prod(x.shape[:-1]), x.shape[-1]
    W = _dense(x, weight, K, blocksize, quant_type)
    y, S, z = reference.lora_general_forward(
        x.reshape(M, K), W, lora_A, lora_B, bias, _rows(gate, M), core, out_scale, scaling, dropout_p, seed
    )
    return y.reshape(*x.shape[:-1], W.shape[0]), S, z.clone() if keep_z else z.new_empty(0)


def backward_reference(  # type: ignore[no-untyped-def]
    dy, x, weight, blocksize, quant_type, lora_A, lora_B, gate, core, out_scale, S, z, seed, scaling, dropout_p, *need
):
    M, K = math.prod(dy.shape[:-1]), lora_A.shape[1]
    W = _dense(dy, weight, K, blocksize, quant_type)
    grads = reference.lora_general_backward(
        dy.reshape(M, W.shape[0]), None if x is None else x.reshape(M, K), W, lora_A, lora_B, _rows(gate, M), core, out_scale,
        S, z, scaling, dropout_p, seed, need=need,
    )  # fmt: skip
    like = _backward_fake(
        dy, x, weight, blocksize, quant_type, lora_A, lora_B, gate, core, out_scale, S, z, seed, scaling, dropout_p, *need
    )
    return tuple(empty if grad is None else grad.reshape(empty.shape) for grad, empty in zip(grads, like, strict=True))


def _forward_fake(  # type: ignore[no-untyped-def]
    x, weight, blocksize, quant_type, lora_A, lora_B, bias, gate, core, out_scale, panels, seed, scaling, dropout_p, keep_z
):
    check(x, weight, blocksize, quant_type, lora_A, lora_B, bias, gate, core, out_scale, scaling, dropout_p)
    M, N = math.prod(x.shape[:-1]), lora_B.shape[0]
    return *ops.fake_outputs(x, lora_A, lora_B), x.new_empty((M, N) if keep_z else 0)


def _backward_fake(  # type: ignore[no-untyped-def]
    dy, x, weight, blocksize, quant_type, lora_A, lora_B, gate, core, out_scale, S, z, seed, scaling, dropout_p, *need
):
    wide = torch.promote_types(dy.dtype, torch.float32)
    of_factors = [
        dy.new_empty(t.shape if t is not None and n else 0, dtype=wide)
        for t, n in zip((gate, core, out_scale), need[4:], strict=True)
    ]
    return *ops.fake_gradients(dy, lora_A, lora_B, *need[:4]), *of_factors


class _General(torch.autograd.Function):
    """Below the dispatcher's autograd key: `keyset` says where the call goes on to. None: to the CPU's kernel."""

    @staticmethod
    def forward(ctx, keyset, weight, read_by, settings, keep_z, x, lora_A, lora_B, bias, gate, core, out_scale, panels, seed):  # type: ignore[no-untyped-def]
        need = ctx.needs_input_grad[5:12]
        _, need_A, need_B, _, need_gate, need_core, need_out_scale = need
        keep_z = keep_z or need_out_scale
        args = (x, weight, *read_by, lora_A, lora_B, bias, gate, core, out_scale, panels, seed, *settings, keep_z)
        if keyset is None:
            with torch._C._AutoDispatchBelowAutograd():
                y, S, z = _forward_direct(*args)
        else:
            y, S, z = _below_autograd(_FORWARD, keyset, *args)
        saved_S = S if need_B or need_gate or need_core or need_out_scale else None
        saved = x if need_A else None, lora_A, lora_B, gate, core, out_scale, saved_S, z if need_out_scale else None, seed
        ctx.save_for_backward(*saved, *weight)
        ctx.mark_non_differentiable(S, z)
        ctx.set_materialize_grads(False)
        ctx.read_by, ctx.settings, ctx.need = read_by, settings, need
        ctx.dtypes = [None if t is None else t.dtype for t in (x, lora_A, lora_B, bias, gate, core, out_scale)]
        return y, S, z

    @staticmethod
    def backward(ctx, dy, _dS, _dz):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            raise differentiable_once("lora_linear")
        if dy is None:
            return (None,) * 14
        x, lora_A, lora_B, gate, core, out_scale, S, z, seed, *weight = ctx.saved_tensors
        factors = gate, core, out_scale, S, z, seed
        tensors = dy, x, *weight, lora_A, lora_B, *factors
        backward = backward_for(tensors, _BACKWARD, _backward_cpu, backward_reference)
        grads = backward(dy, x, weight, *ctx.read_by, lora_A, lora_B, *factors, *ctx.settings, *ctx.need)
        wanted = zip(grads, ctx.dtypes, ctx.need, strict=True)
        return *(None,) * 5, *(grad.to(dtype) if need else None for grad, dtype, need in wanted), None, None


def _autograd(  # type: ignore[no-untyped-def]
    keyset, x, weight, blocksize, quant_type, lora_A, lora_B, bias, gate, core, out_scale, panels, seed, scaling, dropout_p,
    keep_z,
):  # fmt: skip
    check_untransformed("lora_general_forward")
    tensors = x, lora_A, lora_B, bias, gate, core, out_scale
    if needs_grad((*tensors, *weight)):
        for t in weight:
            check_frozen(t)
        settings = scaling, dropout_p
        return _General.apply(keyset, weight, (blocksize, quant_type), settings, keep_z, *tensors, panels, seed)
    args = x, weight, blocksize, quant_type, *tensors[1:], panels, seed, scaling, dropout_p, keep_z
    return _forward_direct(*args) if keyset is None else _below_autograd(_FORWARD, keyset, *args)


_forward_direct = log.watched("lora_general_forward", _forward_cpu, log.DIRECT)
_reference_direct = log.watched("lora_general_forward", forward_reference, log.DIRECT)
_FORWARD = register("lora_general_forward", _forward_cpu, forward_reference, _forward_fake)
_BACKWARD = register("lora_general_backward", _backward_cpu, backward_reference, _backward_fake)
library.impl("lora_general_forward", _autograd, "Autograd", with_keyset=True)


def lora_general_forward(x, weight, *args):  # type: ignore[no-untyped-def]
    """torch.ops.lora_ops.lora_general_forward; without the dispatcher where it has no say."""
    if dispatcher_has_no_say((x, *weight, *args)):
        return _autograd(None, x, weight, *args)
    return (_reference_direct if transformed() else _FORWARD)(x, weight, *args)
