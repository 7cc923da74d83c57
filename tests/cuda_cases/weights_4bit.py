"""Cases of the kernels that have to do with weights in 4 bits."""

from collections.abc import Iterator
from dataclasses import replace

import compare
import four_bit
import test_cuda_lora_backward_dx as dx
import test_cuda_lora_forward as forward
import test_cuda_qlora_backward_dx as qdx
import test_cuda_qlora_forward as qforward
import test_cuda_quantize_4bit as q4
import torch
from compare import F32, Dtypes
from ptx.device import Device, Run
from skinny import normal
from torch import Tensor

from lora_ops import quantize_nf4, reference
from lora_ops.quant import layout

from .case import Case, Counts, Kernel, Results, one_of_each_row, whole
from .dense_numbers import at_thresholds, of_whole_numbers, shapes, tile_of


def gemm(kernel: Kernel, device: Device) -> Iterator[Case]:
    """Bit for bit the dense kernel on the decoded weight."""
    is_dx = kernel.source == "qlora_backward_dx.cu"
    op, dense = (qdx, dx) if is_dx else (qforward, forward)
    rows, columns, _, _, _ = kernel.sizes
    how = {} if is_dx else {"tile": tile_of(kernel)}

    def made(case: four_bit.QuantisedCase, mma: int = 0, **layouts) -> Case:
        low_rank = dense.down(case)

        def exact() -> Results:
            with device.run() as run:
                return {"out": dense.launch(run, case, low_rank)}

        (M, K), N = case.x.shape, case.weight.shape[0]
        of_in = K // columns * M * N * 2 if is_dx else N // columns * M * K * 2
        counts = Counts(mma, M // rows * N * K // 2 + of_in) if mma else None
        return Case(lambda run: {"out": op.launch(run, case, low_rank, **layouts, **how)}, exact, counts=counts)

    aligned = (2 * rows, 256, 128, 16) if is_dx else (2 * rows, 256, columns, 16)
    M, K, N, _ = aligned
    yield made(
        four_bit.make_quantised_case(aligned, Dtypes(kernel.type, kernel.type)),
        M // 16 * (N * K // 128 + (K if is_dx else N) // 8),
        layout="plain",
        layout_out="plain",
    )
    for i, (M, wide, deep, r, adapter) in enumerate(shapes(kernel)):
        K, N = (128 * (i % 3 + 1), deep) if is_dx else (128 * (7 * i % 5 + 1), wide)
        settings = four_bit.SETTINGS[i % len(four_bit.SETTINGS)]
        options = {"bias": not is_dx and i % 4 != 3, "dropout_p": i % 3 / 4 if is_dx else 0.0}
        yield made(four_bit.make_quantised_case((M, K, N, r), Dtypes(kernel.type, adapter), settings, **options))
    if is_dx:

        def case_of(p: float) -> four_bit.QuantisedCase:
            return four_bit.make_quantised_case((rows, columns, 8, 4), Dtypes(kernel.type, F32), dropout_p=p)

        yield from map(made, at_thresholds(kernel, case_of))


def gemv(kernel: Kernel, _: Device) -> Iterator[Case]:
    """Every number of rows, one chunk and several per warp, every residue of the rows of W0 that a block has.

    A third of the cases in whole numbers, where scales are exact; a third with one weight per element of y; a third by the
    policy.
    """
    (tiles,), (nested, blocks_of_32) = kernel.sizes, kernel.flags
    sizes = [32] if blocks_of_32 else [64, 128, 4096]
    for i in range(24):
        N = (4096 if tiles == 2 else 0) + 5 * i % 32 + 1
        M, K = i % 8 + 1, 128 * (1, 2, 9, 17, 33)[i % (2 if tiles == 2 else 5)]
        blocksize, quant_type = sizes[i % len(sizes)], ("nf4", "fp4")[i % 2]
        dtypes = Dtypes(kernel.type, (F32, kernel.type)[i // 2 % 2])
        case = four_bit.make_quantised_case((M, K, N, 7 * i % 20 + 1), dtypes, (blocksize, nested, quant_type), bias=i % 3 > 0)
        exact_numbers = False
        if i % 3 == 1:
            single = one_of_each_row(M, K).to(dtypes.x)
            case = replace(case, x=single, lora_B=torch.zeros_like(case.lora_B), bias=None)
        elif i % 3 == 2 and not nested:
            exact_numbers = True
            weight = 4 * whole(case.qweight.dequantize(F32)).sign() / (1 if quant_type == "nf4" else 1 << i // 3 % 3)
            weight.view(-1)[::blocksize] = 4
            qweight = quantize_nf4(weight, blocksize, nested, quant_type)
            case = replace(of_whole_numbers(case, is_dx=False), weight=weight.to(dtypes.x), qweight=qweight)
        S = forward.down(case)
        yield Case(
            lambda run, case=case, S=S, i=i: {"y": qforward.launch(run, case, S, adapter_transposed=i % 4 == 3)},
            lambda case=case: four_bit.exact_results(case, backward=False),
            None if exact_numbers else lambda case=case: compare.run(compare.eager_lora, case, backward=False),
        )


def dequantize(kernel: Kernel, _: Device) -> Iterator[Case]:
    """Bit for bit the CPU's: every kind of row's end, nested scales and not, blocks within rows and across them."""
    by_chunks = kernel.name.startswith("dequantize_chunks")
    for i, K in enumerate(
        (128, 384, 256, 1024, 640, 2176) if by_chunks else (1, 30, 33, 64, 65, 98, 127, 300, 1023, 1100, 2049)
    ):
        qweight = quantize_nf4(normal(7 + 5 * i, K, dtype=F32), *four_bit.SETTINGS[i % len(four_bit.SETTINGS)])
        yield Case(
            lambda run, qweight=qweight: {"weight": q4.dequantize(run, qweight, kernel.type)},
            lambda qweight=qweight: {"weight": qweight.dequantize(kernel.type)},
        )


def _between_codes(dtype: torch.dtype, quant_type: str) -> Iterator[tuple[Tensor, Tensor]]:
    """A block's absmax and weights of it. Over it they are the borders between two codes; or, with the absmax for which there
    are most, multiplied by its inverse they are on one side of a border, and divided by it on the other."""
    code = reference.code_4bit(quant_type, torch.device("cpu")).sort().values
    borders = (code[:-1] + code[1:]) / 2
    yield torch.ones(()), borders.to(dtype).float()
    bits = {torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}[dtype]
    absmax = (1 + torch.arange(0, 2**bits, max(1, 2**bits >> 14)) / 2**bits)[:, None]
    nearest = (borders * absmax).to(dtype).view(torch.int32 if dtype == F32 else torch.int16)
    near = torch.stack([(nearest + i).view(dtype).float() for i in (-1, 0, 1)])
    differ = (near * (1 / absmax) > borders) != (near / absmax > borders)
    best = int(differ.sum((0, 2)).argmax())
    if differ.any():
        yield absmax[best, 0], near[:, best][differ[:, best]]


def quantize(kernel: Kernel, _: Device) -> Iterator[Case]:
    """Bit for bit the CPU's, with blocks of zeros and of the smallest numbers, and weights between two codes."""
    types = ["nf4", "fp4"] if kernel.name.startswith("absmax") else [("nf4", "fp4")[int(kernel.arguments[1][-1])]]

    def made(weight: Tensor, blocksize: int, quant_type: str) -> Case:
        of = (weight.to(kernel.type), blocksize, quant_type)

        def launch(run: Run) -> Results:
            return dict(zip(("codes", "absmax"), q4.quantize(run, *of), strict=True))

        return Case(launch, lambda: dict(zip(("codes", "absmax"), layout.quantize(*of), strict=True)))

    for i, K in enumerate((1, 31, 64, 65, 97, 127, 128, 300, 384, 1023, 1100)):
        (blocksize, _, _), quant_type = four_bit.SETTINGS[i % len(four_bit.SETTINGS)], types[i % len(types)]
        weight = normal(3 + i, K, dtype=F32)
        weight.view(-1)[blocksize : 2 * blocksize] = (0, torch.finfo(kernel.type).tiny / 4)[i % 2]
        yield made(weight, blocksize, quant_type)
    for quant_type in types:
        for absmax, between in _between_codes(kernel.type, quant_type):
            for N, K, blocksize in ((4, 1024, 64), (9, 1020, 4096)):  # in whole blocks, and in most of one
                i = torch.arange(N * K)
                weight = between[(i + i // 128 * 7) % len(between)]
                weight[::blocksize] = absmax
                yield made(weight.view(N, K), blocksize, quant_type)
