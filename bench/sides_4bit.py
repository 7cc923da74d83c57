"""A 4-bit layer as a user would have it, and the dense layers that it stands in for."""

import copy
from collections.abc import Callable

import bitsandbytes
import torch
import torch.nn.functional as F
from sides import SCALING, Case, peft_layer, tensors, timed
from torch import Tensor, nn

import lora_ops

LINEAR, DENSE, PREPACK, NF4 = "F.linear", "lora_ops dense", "lora_ops prepack", "lora_ops NF4"
THEIRS, THEIRS_EVAL, PEFT, INT4 = "bitsandbytes", "bitsandbytes eval", "PEFT + bitsandbytes", "torch int4"
BLOCK = 64


def sides_4bit(case: Case, backward: bool) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """What is timed, and the bits per weight of what is in 4 bits. NF4 in blocks of 64 with double quantisation.

    Without an adapter: F.linear on the dense weight, bitsandbytes, torch int4. With one: lora_ops and PEFT. bitsandbytes is
    its Linear4bit, which dequantises the weight and calls F.linear; in eval mode, on a CPU with AVX-512-BF16 and without
    gradients, it repacks the weight for a kernel of its own, in bfloat16.
    """
    x, dy, base, A, B = tensors(case, backward)
    qweight = lora_ops.quantize_nf4(base.weight)
    theirs = linear4bit(base)
    with_adapter = peft_layer(theirs, case, A, B)
    forwards: dict[str, Callable[[], Tensor]] = {
        LINEAR: lambda: F.linear(x, base.weight),
        DENSE: lambda: lora_ops.lora_linear(x, base.weight, A, B, scaling=SCALING),
        NF4: lambda: lora_ops.qlora_linear(x, qweight, A, B, scaling=SCALING),
        THEIRS: lambda: theirs(x),
        PEFT: lambda: with_adapter(x),
    }
    state = theirs.weight.quant_state
    kept = (theirs.weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    nbytes = {NF4: qweight.nbytes, THEIRS: sum(t.nbytes for t in kept)}
    if not backward:
        panels = lora_ops.pack_weight(base.weight, case.dtype)
        forwards[PREPACK] = lambda: lora_ops.lora_linear(x, base.weight, A, B, scaling=SCALING, panels=panels)
        if case.dtype == torch.bfloat16:
            repacked, (packed, scales) = copy.deepcopy(theirs).eval(), int4(base.weight)
            forwards[THEIRS_EVAL] = lambda: repacked(x)
            forwards[INT4] = lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, BLOCK, scales)
            nbytes[INT4] = packed.nbytes + scales.nbytes
    _assert_alike(forwards)
    leaves = [t for t in (x, A, B, *with_adapter.parameters()) if t.requires_grad]
    bits = {name: 8 * n / (case.K * case.N) for name, n in nbytes.items()}
    return timed(forwards, backward, dy, leaves), bits


def linear4bit(base: nn.Linear) -> nn.Module:
    """bitsandbytes' layer with base's weight, in training mode."""
    dtype = base.weight.dtype
    layer = bitsandbytes.nn.Linear4bit(
        base.in_features, base.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    layer.weight = bitsandbytes.nn.Params4bit(base.weight.detach().clone(), requires_grad=False, quant_type="nf4")
    return layer.to("cpu")  # quantises


def int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weight in torch's format: 16 equidistant values from each block's least to its largest, scale and middle beside."""
    blocks = weight.float().unflatten(1, (-1, BLOCK))
    low, high = blocks.amin(-1), blocks.amax(-1)
    scale = (high - low) / 15
    codes = ((blocks - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.int32).flatten(1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed, torch.stack([scale, low + 8 * scale], -1).transpose(0, 1).contiguous().to(weight.dtype)


@torch.no_grad()
def _assert_alike(forwards: dict[str, Callable[[], Tensor]]) -> None:
    """What is timed must compute the same: up to rounding over the same weight, up to quantisation over another's."""
    for name, other, bound in ((DENSE, PREPACK, 0.02), (NF4, PEFT, 0.02), (THEIRS, THEIRS_EVAL, 0.02), (LINEAR, INT4, 0.2)):
        if name in forwards and other in forwards:
            expected, actual = forwards[name]().float(), forwards[other]().float()
            error = ((actual - expected).norm() / expected.norm()).item()
            if not error < bound:
                raise AssertionError(f"{other} differs from {name} by {error:.1%}")
