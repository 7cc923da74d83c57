"""Small launches of each kernel of csrc/cuda, by source and template arguments: what the mutation run looks at.

They are the op tests' own launches and errors (tests/test_cuda_*.py, tests/skinny.py, tests/compare.py), of few shapes: together
they take every branch of a kernel that the host can reach, its ring of buffers goes round, and the last tile is not whole.

A kernel of a new source takes a function in _OPS, from the kernel to its cases.
"""

import itertools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "tests")]

import compare
import four_bit
import skinny
import test_cuda_lora_backward_dx as dx
import test_cuda_lora_backward_up as up
import test_cuda_lora_forward as forward
import test_cuda_ops
import test_cuda_qlora_backward_dx as qdx
import test_cuda_qlora_forward as qforward
from compare import BF16, F16, F32, Dtypes
from ptx.device import Device, Run
from skinny import Dropout, normal, strided

from lora_ops import quantize_nf4
from lora_ops.cuda import ops
from lora_ops.qlora_ops import weight_of


class Case(NamedTuple):
    launch: Callable[[Run], dict[str, Tensor]]
    eager: dict[str, Tensor]
    exact: dict[str, Tensor]  # eager's very tensors where the op tests want them bit for bit
    counted: bool = False  # the op tests assert the counters of such a shape

    def wrong(self, results: dict[str, Tensor]) -> bool:
        return any(self._wrong(t, self.eager[name], self.exact[name]) for name, t in results.items())

    @staticmethod
    def _wrong(actual: Tensor, eager: Tensor, exact: Tensor) -> bool:
        if eager is exact:
            return not torch.equal(actual, exact)
        try:
            return not compare.error(actual, eager, exact).within_bound
        except AssertionError:  # NaN or infinity where there is none
            return True


class Kernel(NamedTuple):
    source: str
    name: str  # lora_down_kernel<Bf16, float, 16, true>

    @property
    def arguments(self) -> list[str]:
        return re.findall(r"[^<>,\s]+", self.name.partition("<")[2])

    @property
    def type(self) -> torch.dtype:
        return {"Bf16": BF16, "Half": F16, "float": F32}[self.arguments[0]]

    @property
    def dtypes(self) -> Dtypes:
        return Dtypes(self.type, F32 if self.arguments[1] == "float" else self.type)


def _laid_out(t: Tensor, vector: bool) -> Tensor:
    """Rows that begin at multiples of 16 bytes, or that do not."""
    return strided(t, 0, -t.shape[1] % 8) if vector else strided(t, 1, 1 + t.shape[1] % 2)


# --- skinny products --------------------------------------------------------------------------------------------------


def _skinny(kernel: Kernel, rows: int, columns: int) -> Iterator[tuple[int, int, int, int, Dropout | None]]:
    """(rows, columns, rank, SMs, dropout): whole tiles and every residue of a chunk, a fragment and a pair of ranks.

    The widest kernel has ranks beyond one block's 64, too."""
    most, vector = int(kernel.arguments[2]), kernel.arguments[3] == "true"
    yield 2 * rows, columns, most, 1, Dropout(0.25)
    yield 5 * rows + 3, 24, most - 4, 1, Dropout(0.3)
    yield 18, 5 * columns + 8, most - 4, 1, Dropout(0.3)
    yield rows + 2, 4 * columns + 40, 100 if most == 64 else most - 4, 8, None
    yield 3 * rows + 5, 2 * columns, most - 8, 2, None
    for i in range(1, 17):
        rank = most - 4 * (i % 4) if vector else most - i % 16
        yield (9 * i + rows * (i % 3)) % 131 or 1, i if i % 2 else columns + 8 * i + i % 8, rank, i % 5 + 1, None if i % 2 else Dropout(0.6)


def _down(kernel: Kernel) -> Iterator[Case]:
    dtypes, vector = kernel.dtypes, kernel.arguments[3] == "true"
    for i, (M, columns, r, sm_count, dropout) in enumerate(_skinny(kernel, 64, 128)):
        K = -(-columns // 8) * 8 if vector else columns  # A is contiguous
        r = r - M % 4 if vector and r <= 64 else r  # nor does anything else depend on its rows
        x, A = normal(M, K, dtype=dtypes.x), normal(r, K, dtype=dtypes.adapter, std=K**-0.5)

        def launch(run: Run, x=x, A=A, sm_count=sm_count, dropout=dropout) -> dict[str, Tensor]:
            return {"S": skinny.lora_down(run.library, _laid_out(x, vector), A.clone(), dropout=dropout, sm_count=sm_count)}

        h, wide = (x.float(), x.double()) if dropout is None else (dropout.of(x.float()), dropout.of(x.double()))
        yield Case(launch, {"S": h @ A.float().T}, {"S": wide @ A.double().T}, counted=i == 0)


def _backward_down(kernel: Kernel) -> Iterator[Case]:
    dtypes, vector = kernel.dtypes, kernel.arguments[3] == "true"
    for i, (M, K, r, sm_count, dropout) in enumerate(_skinny(kernel, 64, 128)):
        x, dS = normal(M, K, dtype=dtypes.x), normal(M, r, dtype=F32)

        def launch(run: Run, x=x, dS=dS, sm_count=sm_count, dropout=dropout) -> dict[str, Tensor]:
            inputs = dS.clone(), _laid_out(x, vector), dtypes.adapter
            return {"dA": skinny.lora_backward_down(run.library, *inputs, dropout=dropout, sm_count=sm_count)}

        h, wide = (x, x.double()) if dropout is None else (dropout.of(x.to(dtypes.adapter)), dropout.of(x.double()))
        eager, exact = dS.to(dtypes.adapter).T @ h.to(dtypes.adapter), dS.double().T @ wide
        yield Case(launch, {"dA": eager}, {"dA": exact}, counted=i == 0)


def _backward_up(kernel: Kernel) -> Iterator[Case]:
    dtypes, vector = kernel.dtypes, kernel.arguments[3] == "true"
    names = ("dS", "dB", "dbias")
    some = [names, names, names, ("dB",), ("dS", "dbias"), ("dbias",), ("dS",)]
    columns = 256 if int(kernel.arguments[2]) <= 32 else 128
    for i, (M, N, r, sm_count, _) in enumerate(_skinny(kernel, 64, columns)):
        wanted = some[i % len(some)]
        r = r - 1 if vector and "dB" not in wanted else r  # S, which is not read, need not be aligned
        dy, B = normal(M, N, dtype=dtypes.x), normal(N, r, dtype=dtypes.adapter, std=r**-0.5)
        S = normal(M, r, dtype=F32, draw=1)

        def launch(run: Run, dy=dy, B=B, S=S, sm_count=sm_count, wanted=wanted) -> dict[str, Tensor]:
            inputs = _laid_out(dy, vector), B.clone(), S.clone()
            return skinny.lora_backward_up(run.library, *inputs, up.SCALING, wanted=wanted, sm_count=sm_count)

        g, wide = dy.to(dtypes.adapter) * up.SCALING, dy.double()
        eager = {"dS": up.SCALING * (dy.float() @ B.float()), "dB": g.T @ S.to(dtypes.adapter), "dbias": dy.sum(0)}
        exact = {"dS": up.SCALING * (wide @ B.double()), "dB": up.SCALING * (wide.T @ S.double()), "dbias": wide.sum(0)}
        yield Case(launch, eager, exact, counted=i == 0)


def _reduce(_: Kernel) -> Iterator[Case]:
    """Of every output type, and three reductions at once, of up to ten splits."""
    for i in range(1, 11, 3):
        x, A = normal(3, 128 * i - 8, dtype=BF16), normal(40 * i + 16, 128 * i - 8, dtype=F32)

        def launch(run: Run, x=x, A=A) -> dict[str, Tensor]:
            return {"S": skinny.lora_down(run.library, x.clone(), A.clone(), sm_count=100)}

        yield Case(launch, {"S": x.float() @ A.T}, {"S": x.double() @ A.double().T})
    for t in ("Bf16", "Half"):
        kernel = Kernel("lora_backward_up.cu", f"lora_backward_up_kernel<{t}, {t}, 16, true>")
        yield from itertools.islice(_backward_up(kernel), 8)


# --- dense and 4-bit products -----------------------------------------------------------------------------------------


def _gemm(kernel: Kernel) -> Iterator[Case]:
    *_, weight_rows, vector, is_dx = (a == "true" for a in kernel.arguments)
    rows, columns, depth, _, stages = map(int, kernel.arguments[2:7])
    x, op, name = kernel.type, dx if is_dx else forward, "dx" if is_dx else "y"
    deep = (stages + 1) * depth  # the ring goes round
    shapes = [  # M, columns of out, depth of the product, rank, adapter, base, dropout
        (rows, columns, 2 * depth, 24, F32, False, 0.25),
        (rows, columns, depth, 16, x, False, 0.0),
        (rows + 2, columns + 9, 24, 20, F32, False, 0.25),
        (rows // 2, columns, deep, 16, x, False, 0.0),
        (rows, columns // 2, deep + 25, 5, F32, False, 0.0),
        (9 * rows + 1, 8, 8, 4, x, False, 0.0),
        (3, 300, 8, 8, F32, False, 0.3),
    ]
    for i in range(1, 17):
        wide, base = (columns // 2 * (i % 3) + 7 * i) % 150 + 1, vector and weight_rows != is_dx and i % 3 == 0
        M, K = rows // 4 * (i % 4) + i, depth // 2 * (i % 4) + 11 * i % 16 + 1
        shapes.append((M, wide, K, i, (F32, x)[i // 4 % 2], base, i % 2 / 4))
    for i, (M, wide, deep, r, adapter, base, p) in enumerate(shapes):
        K, N = (wide, deep) if is_dx else (deep, wide)
        case = compare.make_case((M, K, N, r), Dtypes(x, adapter), bias=i % 4 != 3, dropout_p=p if is_dx else 0.0)
        product = case.dy.double() @ case.weight.double() if is_dx else case.x.double() @ case.weight.double().T
        counted = i < 2
        how = {
            "tile": {128: "large", 64: "medium", 32: "small"}[rows],
            "transposed": weight_rows == is_dx,
            "layout": ("plain" if counted else "padded") if vector else "odd",
            "layout_out": "plain" if counted else "padded" if i % 4 < 2 else "odd",
            "adapter_transposed": i % 3 == 2,
            "base": product.to(x) if base else None,
        }

        def launch(run: Run, case=case, low_rank=op.down(case), how=how) -> dict[str, Tensor]:
            return {name: op.launch(run, case, low_rank, **how)}

        eager = compare.run(compare.eager_lora, case, backward=is_dx)[name]
        yield Case(launch, {name: eager}, {name: compare.oracle(case, backward=is_dx)[name]}, counted)


def _gemm_4bit(kernel: Kernel, device: Device) -> Iterator[Case]:
    """Bit for bit the dense kernel on the decoded weight."""
    is_dx = kernel.source == "qlora_backward_dx.cu"
    rows, columns, depth, _, stages = map(int, kernel.arguments[3:8])
    x, op, dense = kernel.type, qdx if is_dx else qforward, dx if is_dx else forward
    deep = (stages + 1) * depth
    shapes = [(rows, 128, depth, 16, x), (rows + 2, columns + 9, deep, 20, F32), (3, columns // 2, 2 * depth, 8, F32)]
    shapes += [((rows // 4 * (i % 4) + i), (37 * i) % 150 + 1, depth * (i % 4 + 1), i, (F32, x)[i % 2]) for i in range(1, 13)]
    for i, (M, wide, deep, r, adapter) in enumerate(shapes):
        K, N = (128 * (i % 2 + 1), deep - (i * 11 % 64 if i else 0)) if is_dx else (deep, wide)
        settings = four_bit.SETTINGS[i % len(four_bit.SETTINGS)]
        p = i % 3 / 4 if is_dx else 0.0
        case = four_bit.make_quantised_case((M, K, N, r), Dtypes(x, adapter), settings, bias=i % 4 != 3, dropout_p=p)
        low_rank = dense.down(case)
        how = {} if is_dx else {"tile": {32: "small", 64: "medium"}[rows]}

        def launch(run: Run, case=case, low_rank=low_rank, how=how, counted=i == 0) -> dict[str, Tensor]:
            return {"out": op.launch(run, case, low_rank, layout="plain" if counted else "padded", **how)}

        with device.run() as run:
            expected = {"out": dense.launch(run, case, low_rank)}
        yield Case(launch, expected, expected, counted=i == 0)


def _dequantize(kernel: Kernel, device: Device) -> Iterator[Case]:
    """Bit for bit the CPU's: every kind of row's end, nested scales and not, blocks within rows and across them."""
    module = test_cuda_ops.extension(device)
    quant_type = ("nf4", "fp4")[int(kernel.arguments[1][-1])]
    for i, K in enumerate((1, 31, 64, 65, 127, 128, 300, 1100, 2049)):
        blocksize, double_quant, _ = four_bit.SETTINGS[i % len(four_bit.SETTINGS)]
        qweight = quantize_nf4(normal(7 + i, K, dtype=F32), blocksize, double_quant, quant_type)

        def launch(run: Run, qweight=qweight, K=K) -> dict[str, Tensor]:
            for t in vars(qweight).values():
                if isinstance(t, Tensor):
                    run.register(t, readonly=True)
            return {"weight": ops.dequantize(ops.Target(module, 4, 0), weight_of(qweight), K, kernel.type)}

        expected = {"weight": qweight.dequantize(kernel.type)}
        yield Case(launch, expected, expected)


_OPS: dict[str, Callable[[Kernel, Device], Iterator[Case]]] = {
    "dequantize_4bit.cu": _dequantize,
    "lora_backward_down.cu": lambda kernel, _: _backward_down(kernel),
    "lora_backward_dx.cu": lambda kernel, _: _gemm(kernel),
    "lora_backward_up.cu": lambda kernel, _: _backward_up(kernel),
    "lora_down.cu": lambda kernel, _: _down(kernel),
    "lora_forward.cu": lambda kernel, _: _gemm(kernel),
    "qlora_backward_dx.cu": _gemm_4bit,
    "qlora_forward.cu": _gemm_4bit,
    "reduce.cu": lambda kernel, _: _reduce(kernel),
}


def cases(kernel: Kernel, device: Device) -> list[Case]:
    torch.manual_seed(0)
    return list(_OPS[kernel.source](kernel, device))
