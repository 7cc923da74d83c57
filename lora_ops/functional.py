"""The public functions."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from . import checks, general_ops, ops, qlora_ops
from .autograd import check_frozen
from .quant import NF4Weight
from .registry import method


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    panels: Tensor | None = None,
    gate: Tensor | None = None,
    core: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """A frozen linear layer with a low-rank update, in one pass: y = x W0ᵀ + scaling · (drop(x) Aᵀ) Bᵀ + bias.

    LoRA: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022 (https://arxiv.org/abs/2106.09685).
    ΔW = B A is never formed. The backward computes, of

        dS = scaling · dy B            dx = dy W0 + drop'(dS A)
        dA = dSᵀ drop(x)               dB = scaling · dyᵀ S          dbias = Σ_rows dy

    only what `requires_grad` asks for, and keeps only x (if A trains) and S = drop(x) Aᵀ, (rows, r) in fp32 (if B trains).

    Args:
        x: (..., K), float32, bfloat16 or float16 (float64 runs the reference), any strides.
        weight: W0, (N, K), x's dtype, frozen. Any strides of which one is 1: a transposed view costs no copy. May be
            float32 under a half-precision x.
        lora_A: A, (r, K), r >= 1, x's dtype, or float32 under a half-precision x. Used as it is: x is never cast.
        lora_B: B, (N, r), A's dtype. Gradients come in A's and B's dtype.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA. Finite.
        bias: (N,) or None.
        dropout_p: probability, in [0, 1), that an element of x is hidden from A; the others are scaled by 1 / (1 - p).
            Resolution 2^-16. The mask is never stored: it comes from Philox4x32-10, keyed by a seed that is drawn from
            torch's generator of x's device, so `torch.manual_seed` governs it and activation checkpointing repeats it.
        training: dropout acts only if True.
        panels: the weight packed beforehand (`lora_ops.pack_weight`), faster for small batches. It must come from this
            very weight: it is used instead of it.
        gate: (r,), or (..., r) with the leading dimensions of x: multiplies S, elementwise.
        core: (r, r): multiplies S from the right, after the gate.
        out_scale: (N,): multiplies the output before the bias. The general form, each factor of it optional and trainable:
            y = out_scale ∘ (x W0ᵀ + scaling · (((drop(x) Aᵀ) ∘ gate) core) Bᵀ) + bias. Of x's dtype, or float32 under a
            half-precision x. S is kept if B, gate, core or out_scale trains; if out_scale does, what it multiplies, too: (rows,
            N) in x's dtype.

    Returns:
        (..., N) in x's dtype; under `torch.autocast`, in the dtype that `F.linear` would return. Products are accumulated
        in fp32 and rounded once.

    Raises:
        ValueError: a shape, device, scaling or dropout_p that does not fit, or a weight that requires grad.
        TypeError: a dtype that does not fit.
    """
    if gate is not None or core is not None or out_scale is not None:
        return _general(x, weight, lora_A, lora_B, bias, panels, (gate, core, out_scale), scaling, dropout_p, training)
    if torch.is_grad_enabled():
        check_frozen(weight)
    dtype = autocast_dtype(x)
    if dtype is not None and weight.dtype not in (dtype, torch.float32):
        weight, panels = weight.to(dtype), None
    x, lora_A, lora_B, bias = autocast(dtype, x, lora_A, lora_B, bias)
    seed = None
    if training and dropout_p != 0.0:
        checks.check(x, weight, lora_A, lora_B, bias, scaling, dropout_p)  # before the generator moves
        seed = _draw_seed(x)
    y, _ = ops.lora_forward(x, weight, lora_A, lora_B, bias, panels, seed, float(scaling), float(dropout_p))
    return y


@method(
    "QLoRA",
    equation="y = x Wᵀ + s (drop(x) Aᵀ) Bᵀ + bias, W = NF4 code · absmax of 64, absmax in 8 bits",
    use='add_lora(model, LoraConfig(r=64, target_modules="all-linear"), quant="nf4")',
    changes="Q",
    source="Dettmers et al. 2023, https://arxiv.org/abs/2305.14314",
    test="test_nf4_format.py::test_bitsandbytes_to_the_last_bit",
)
def qlora_linear(
    x: Tensor,
    qweight: NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    gate: Tensor | None = None,
    core: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """`lora_linear` over a frozen weight in 4 bits: y = x Wᵀ + scaling · (drop(x) Aᵀ) Bᵀ + bias, W = code · absmax.

    QLoRA: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023 (https://arxiv.org/abs/2305.14314).
    The weight is decoded where it is multiplied, in fp32, forward and backward, and never exists as a whole: bitsandbytes
    writes all of it in x's dtype first, rounded to it. Gradients and what is kept for the backward are `lora_linear`'s; of
    the weight, the 4-bit tensors themselves.

    Args:
        x: (..., K), float32, bfloat16 or float16 (float64 runs the reference), any strides.
        qweight: (N, K), see `quantize_nf4`. Its own `dtype` does not matter here.
        lora_A, lora_B, scaling, bias, dropout_p, training, gate, core, out_scale: as in `lora_linear`.

    Returns:
        (..., N) in x's dtype; under `torch.autocast`, in the dtype that `F.linear` would return.

    Raises:
        ValueError: a shape, device, scaling or dropout_p that does not fit.
        TypeError: a dtype that does not fit, or a qweight that is no NF4Weight.
    """
    if not isinstance(qweight, NF4Weight):
        raise TypeError(f"qweight must be an NF4Weight (see quantize_nf4), got {type(qweight).__name__}")
    N, K = qweight.shape
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"x must be (..., K) with K = {K} as in qweight {(N, K)}, got shape {tuple(x.shape)}")
    if gate is not None or core is not None or out_scale is not None:
        return _general(x, qweight, lora_A, lora_B, bias, None, (gate, core, out_scale), scaling, dropout_p, training)
    x, lora_A, lora_B, bias = autocast(autocast_dtype(x), x, lora_A, lora_B, bias)
    seed = None
    if training and dropout_p != 0.0:
        qlora_ops.check(x, qlora_ops.weight_of(qweight), lora_A, lora_B, bias, scaling, dropout_p)  # before the generator moves
        seed = _draw_seed(x)
    y, _ = qlora_ops.qlora_forward(x, qweight, lora_A, lora_B, bias, seed, float(scaling), float(dropout_p))
    return y


def _general(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    panels: Tensor | None,
    factors: tuple[Tensor | None, Tensor | None, Tensor | None],
    scaling: float,
    dropout_p: float,
    training: bool,
) -> Tensor:
    dtype = autocast_dtype(x)
    if isinstance(weight, Tensor) and dtype is not None and weight.dtype not in (dtype, torch.float32):
        weight, panels = weight.to(dtype), None
    x, lora_A, lora_B, bias = autocast(dtype, x, lora_A, lora_B, bias)
    gate, core, out_scale = (f if f is None or dtype is None or f.dtype == torch.float32 else f.to(dtype) for f in factors)
    tensors, blocksize, quant_type = qlora_ops.operand_of(weight)
    operands = x, tensors, blocksize, quant_type, lora_A, lora_B, bias, gate, core, out_scale
    seed = None
    if training and dropout_p != 0.0:
        general_ops.check(*operands, scaling, dropout_p)  # before the generator moves
        seed = _draw_seed(x)
    y, _, _ = general_ops.lora_general_forward(*operands, panels, seed, float(scaling), float(dropout_p), False)
    return y


# Asked once: not every torch's compiler knows the question.
_AUTOCAST = frozenset(d for d in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla") if torch.amp.is_autocast_available(d))


def autocast_is_on(device: torch.device) -> bool:
    """Of any device, meta among them, which torch.is_autocast_enabled does not take."""
    return device.type in _AUTOCAST and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, enabled=False) if autocast_is_on(device) else nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of x, or None where it does not act."""
    if autocast_is_on(x.device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return None


def autocast(
    dtype: torch.dtype | None, x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x in that dtype, and what could not lie beside it. fp32 parameters can, and are not rounded."""
    if dtype is None:
        return x, lora_A, lora_B, bias
    if bias is not None and bias.dtype not in (dtype, torch.float32):
        bias = bias.to(dtype)
    if lora_A.dtype not in (dtype, torch.float32):
        lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    return x.to(dtype), lora_A, lora_B, bias


def _draw_seed(x: Tensor) -> Tensor:
    return torch.randint(0, 2**62, (), dtype=torch.int64, device=x.device)
