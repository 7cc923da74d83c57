"""DoRA: a layer whose rows keep their direction from W0 + ΔW and have lengths of their own."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import checks, functional, ops
from .autograd import check_frozen, differentiable_once, library, plain_call, register, transformed
from .qlora_ops import weight_of
from .quant import NF4Weight
from .registry import method

_ROWS = 512  # of the weight, widened at a time


def row_norms(weight: Tensor | NF4Weight) -> Tensor:
    """‖W0‖² of every row, (N,), in fp32 (fp64 for fp64). W0 is frozen: whoever calls `dora_linear` often may keep it."""
    if isinstance(weight, NF4Weight):
        return torch.ops.lora_ops.qlora_row_norms(*weight_of(weight), weight.shape[1])
    return torch.cat([rows.square().sum(1) for rows in _wide_rows(weight)])


@torch.no_grad()
def weight_norm(
    weight: Tensor | NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    base: Tensor | None = None,
) -> Tensor:
    """‖W0 + scaling · B A‖ of every row, (N,), without W0 + B A:

        n² = ‖W0‖² + 2 Σ_r ((A W0ᵀ + ½ (A Aᵀ) B̃ᵀ) ∘ B̃ᵀ),  B̃ = scaling · B

    where the sum in brackets is what a layer with half the adapter makes of A. The terms are summed in fp32 (fp64 for fp64),
    under autocast, too. Where they cancel, which takes a ΔW about as large as W0 and against it, n loses as many digits as
    the sum does.

    Args:
        weight: W0, (N, K), dense or in 4 bits.
        lora_A, lora_B, scaling: (r, K), (N, r), a number.
        base: `row_norms(weight)`, where it is known.
    """
    base = row_norms(weight) if base is None else base
    A, B = lora_A.to(base.dtype), scaling * lora_B.to(base.dtype)
    # A constant of forward-mode derivatives, too, as torch.no_grad has it for the backward.
    with functional.without_autocast(A.device), forward_ad._set_fwd_grad_enabled(False):
        if transformed():
            products = _with_half(A @ _dense(weight, base.dtype).T, A, B)
        elif isinstance(weight, NF4Weight):
            products = torch.ops.lora_ops.qlora_forward_wide(A, *weight_of(weight), A, B, 0.5)[0]
        else:
            of = _products_cpu if plain_call((weight, A, B)) else torch.ops.lora_ops.weight_products
            products = of(weight, A, B)
        return torch.add(base, (products * B.T).sum(0), alpha=2).clamp_min(0).sqrt()


@method(
    "DoRA",
    equation="y = m / ‖W0 + s B A‖ ∘ (x W0ᵀ + s (x Aᵀ) Bᵀ) + bias, the norm of each row a constant of the backward",
    use="add_lora(model, LoraConfig(use_dora=True))",
    changes="P",
    source="Liu et al. 2024, https://arxiv.org/abs/2402.09353",
    test="test_dora_layer.py::test_output_and_gradients",
    note="Weight-decomposed; another DoRA adapts ranks. The signs of the correlation of ΔM and ΔD were not reproduced.",
)
def dora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    base: Tensor | None = None,
    norm: Tensor | None = None,
) -> Tensor:
    """y = c ∘ (x W0ᵀ + scaling · (x Aᵀ) Bᵀ) + bias with c = magnitude / ‖W0 + scaling · B A‖, a length for every row.

    DoRA: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024 (https://arxiv.org/abs/2402.09353). As in its
    section 4.3 the norm is a constant of the backward. Neither ΔW nor W0 + ΔW is formed: `weight_norm`. c is the out_scale of
    `lora_linear`.

    With dropout, x̃ = drop(x) takes x's place in everything that training changes, as in PEFT:

        y = x W0ᵀ + (c - 1) ∘ x̃ W0ᵀ + c ∘ scaling · (x̃ Aᵀ) Bᵀ + bias

    as (x - x̃) W0ᵀ and the rest, two products with W0.

    Args:
        x, weight, lora_A, lora_B, scaling, bias, dropout_p, training: as in `lora_linear`, or with a weight in 4 bits as in
            `qlora_linear`. The mask is drawn by `torch.Tensor.bernoulli_`.
        magnitude: (N,), trainable. ‖W0 + scaling · B A‖ at the start of training, so that the layer starts as W0. Of any
            floating dtype: c is computed in fp32 at least.
        base: `row_norms(weight)`, where it is known.
        norm: `weight_norm(weight, lora_A, lora_B, scaling)`, where it is known.

    Returns:
        (..., N), in the dtype that `lora_linear` gives.

    Raises:
        ValueError, TypeError: as `lora_linear`; a magnitude of another shape.
    """
    if torch.is_grad_enabled() and isinstance(weight, Tensor):
        check_frozen(weight)
    N = lora_B.shape[0]
    if magnitude.shape != (N,):
        raise ValueError(f"magnitude must be (N,) = ({N},) as in lora_B {tuple(lora_B.shape)}, got {tuple(magnitude.shape)}")
    c = magnitude / (weight_norm(weight, lora_A, lora_B, scaling, base) if norm is None else norm)
    hides = training and dropout_p != 0.0
    if x.is_cpu and not hides:
        linear: Callable[..., Tensor] = functional.qlora_linear if isinstance(weight, NF4Weight) else functional.lora_linear
        wide = torch.promote_types(x.dtype, torch.float32)
        c, bias = c.to(wide), bias if bias is None or bias.dtype == x.dtype else bias.to(wide)
        return linear(x, weight, lora_A, lora_B, scaling=scaling, bias=bias, dropout_p=dropout_p, out_scale=c)
    dtype = functional.autocast_dtype(x)
    if dtype is not None and isinstance(weight, Tensor) and weight.dtype not in (dtype, torch.float32):
        weight = weight.to(dtype)
    x, lora_A, lora_B, bias = functional.autocast(dtype, x, lora_A, lora_B, bias)
    mask = None
    if hides:
        mask = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - dropout_p)
    if transformed():
        return _composed(x, weight, lora_A, lora_B, c, bias, mask, dropout_p, scaling)
    arguments = (weight,) if isinstance(weight, Tensor) else weight_of(weight)
    return _Scaled.apply(x, lora_A, lora_B, c, bias, mask, float(dropout_p), float(scaling), *arguments)


def _composed(x, weight, lora_A, lora_B, c, bias, mask, p, scaling):  # type: ignore[no-untyped-def]
    """`_Scaled`, of operations that transforms see through."""
    linear: Callable[..., Tensor] = functional.qlora_linear if isinstance(weight, NF4Weight) else functional.lora_linear
    kept = x if mask is None else x * mask / (1 - p)
    y = linear(kept, weight, lora_A, lora_B, scaling=scaling, out_scale=c.to(torch.promote_types(x.dtype, torch.float32)))
    if mask is not None:
        y = y + linear(x - kept, weight, *_nothing(lora_A, lora_B), scaling=1.0)
    return y if bias is None else (y + bias).to(y.dtype)


class _Scaled(torch.autograd.Function):
    """c ∘ (x W0ᵀ + scaling · (x Aᵀ) Bᵀ) + bias, with a mask the form above. In the backward c goes into B for the adapter's
    gradients, which are fp32's often: dy ∘ c has x's dtype, as the gradient of a frozen layer's output does.

    x̃ = mask ∘ x / (1 - p) is multiplied as mask ∘ x, which no dtype rounds, and c takes the factor.
    """

    @staticmethod
    def forward(ctx, x, lora_A, lora_B, c, bias, mask, p, scaling, *weight):  # type: ignore[no-untyped-def]
        ops = torch.ops.lora_ops
        forward = ops.lora_forward_wide if len(weight) == 1 else ops.qlora_forward_wide
        kept = x if mask is None else x * mask
        y, S = forward(kept, *weight, lora_A, lora_B, scaling)
        ctx.save_for_backward(kept, lora_A, lora_B, c, y, S, mask, *(t if isinstance(t, Tensor) else None for t in weight))
        ctx.plain = [None if isinstance(t, Tensor) else t for t in weight]
        ctx.p, ctx.scaling, ctx.bias_dtype = p, scaling, None if bias is None else bias.dtype
        if mask is None:
            scaled = y * c
        else:
            hidden, _ = forward(x - kept / (1 - p), *weight, *_nothing(lora_A, lora_B), 1.0)
            scaled = y * (c / (1 - p)) + hidden
        return (scaled if bias is None else scaled + bias).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            raise differentiable_once("dora_linear")
        kept, lora_A, lora_B, c, y, S, mask, *tensors = ctx.saved_tensors
        weight = [plain if t is None else t for t, plain in zip(tensors, ctx.plain, strict=True)]
        need_x, need_A, need_B, need_c, need_bias, *_ = ctx.needs_input_grad
        backward = torch.ops.lora_ops.lora_backward if len(weight) == 1 else torch.ops.lora_ops.qlora_backward
        factor = 1.0 if mask is None else 1 / (1 - ctx.p)
        dx = dA = dB = dc = dbias = None
        if need_x:
            only_dx = (None, None, ctx.scaling, 0.0, True, False, False, False)
            dx = backward((dy * (factor * c)).to(dy.dtype), None, *weight, lora_A, lora_B, *only_dx)[0]
            if mask is not None:
                of_hidden = backward(dy, None, *weight, *_nothing(lora_A, lora_B), *only_dx)[0]
                dx = (of_hidden + mask * (dx.to(c.dtype) - factor * of_hidden.to(c.dtype))).to(dx.dtype)
        if need_A or need_B:
            with_c = (lora_B * (factor * c)[:, None]).to(lora_B.dtype)
            _, dA, dB, _ = backward(dy, kept, *weight, lora_A, with_c, S, None, ctx.scaling, 0.0, False, need_A, need_B, False)
            dA, dB = dA if need_A else None, (dB * (factor * c)[:, None]).to(lora_B.dtype) if need_B else None
        over = tuple(range(dy.dim() - 1))
        if need_c:
            dc = (dy * y).sum(over) * factor
        if need_bias:
            dbias = dy.sum(over, dtype=c.dtype).to(ctx.bias_dtype)
        return (dx, dA, dB, dc, dbias, *[None] * (3 + len(weight)))


def _nothing(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """An adapter that adds nothing."""
    return torch.zeros_like(lora_A[:1]), torch.zeros_like(lora_B[:, :1])


def _wide_rows(weight: Tensor) -> Iterator[Tensor]:
    """W0's rows in fp32 (fp64 for fp64), some at a time."""
    for rows in weight.detach().split(_ROWS):
        yield rows.to(torch.promote_types(weight.dtype, torch.float32))


def _dense(weight: Tensor | NF4Weight, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if isinstance(weight, Tensor) else weight_of(weight).dequantize(weight.shape[1], dtype)


library.define("weight_products(Tensor weight, Tensor lora_A, Tensor lora_B) -> Tensor")


def _check_products(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight must be (N, K), got shape {tuple(weight.shape)}")
    x = weight.new_empty(0, weight.shape[1], dtype=torch.promote_types(weight.dtype, torch.float32))
    checks.check_beside(x, (weight.shape[0], weight.shape[1]), None, lora_A, lora_B, None, 0.5, 0.0)


def _with_half(products: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return products + (A @ A.T) @ B.T / 2


def _products(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """A W0ᵀ + ½ (A Aᵀ) Bᵀ, (r, N), of A and B in fp32 (fp64 beside fp64)."""
    _check_products(weight, lora_A, lora_B)
    return _with_half(torch.cat([lora_A @ rows.T for rows in _wide_rows(weight)], dim=1), lora_A, lora_B)


def _products_cpu(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    if weight.dtype not in ops._DTYPES or weight.numel() == 0 or ops.base_on_torch(torch.float32):
        return _products(weight, lora_A, lora_B)
    _check_products(weight, lora_A, lora_B)
    rows, weight = ops.rows_of(lora_A), ops._strided(weight)
    y = torch.empty((len(rows), len(weight)), dtype=torch.float32)
    ops.forward_kernel(rows, ops.matrix(weight), None, rows, lora_B, None, None, 0.5, 0.0, y)
    return y


def _products_fake(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    _check_products(weight, lora_A, lora_B)
    return lora_A.new_empty((lora_A.shape[0], weight.shape[0]))


register("weight_products", _products_cpu, _products, _products_fake)
