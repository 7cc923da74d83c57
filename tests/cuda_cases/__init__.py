"""Small launches of each kernel of csrc/cuda, by source and template arguments: what the mutation run of tools/ looks at.

Together they take every branch of a kernel that the host can reach: rings of buffers go round, in the first block of a grid
and in others, every copy of an unrolled loop meets an end of the matrix, dropout meets the number that equals its threshold,
and the lower parts of fp32 operands are all that is left. Most numbers are whole and small, so that results are exact and not
one wrong product among hundreds can hide.

A kernel of a new source takes a function in OPS, from the kernel to its cases.
"""

from collections.abc import Callable, Iterator

import torch
from ptx.device import Device

from . import dense_products, skinny_products, weights_4bit
from .case import Case, Kernel

OPS: dict[str, Callable[[Kernel, Device], Iterator[Case]]] = {
    "dequantize_4bit.cu": weights_4bit.dequantize,
    "lora_backward_down.cu": skinny_products.backward_down,
    "lora_backward_dx.cu": dense_products.one,
    "lora_backward_dx_group.cu": dense_products.group,
    "lora_backward_dx_segments.cu": dense_products.segments,
    "lora_backward_up.cu": skinny_products.backward_up,
    "lora_down.cu": skinny_products.down,
    "lora_down_segments.cu": skinny_products.down_segments,
    "lora_forward.cu": dense_products.one,
    "lora_forward_group.cu": dense_products.group,
    "lora_forward_segments.cu": dense_products.segments,
    "qlora_backward_dx.cu": weights_4bit.gemm,
    "qlora_forward.cu": weights_4bit.gemm,
    "qlora_gemv.cu": weights_4bit.gemv,
    "quantize_4bit.cu": weights_4bit.quantize,
    "reduce.cu": skinny_products.reduce,
}


def cases(kernel: Kernel, device: Device) -> list[Case]:
    torch.manual_seed(0)
    return list(OPS[kernel.source](kernel, device))
