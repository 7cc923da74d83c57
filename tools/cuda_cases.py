"""Small launches of each kernel of csrc/cuda, by source and template arguments: what the mutation run looks at.

They are the op tests' own launches and errors (tests/test_cuda_*.py, tests/skinny.py, tests/compare.py), of few shapes: together
they take every branch of a kernel that the host can reach, its ring of buffers goes round, and the last tile is not whole.
"""

import ctypes
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "tests")]

import compare
import skinny
import test_cuda_lora_backward_dx as dx
import test_cuda_lora_backward_up as up
import test_cuda_lora_forward as forward
from compare import BF16, F16, F32, Dtypes
from cuda_structs import TILES, matrix
from cuda_structs import Dropout as Dropout_
from ptx.device import Run
from skinny import Dropout, normal, strided

from lora_ops import reference


class Case(NamedTuple):
    launch: Callable[[Run], dict[str, Tensor]]
    eager: dict[str, Tensor]
    exact: dict[str, Tensor]

    def wrong(self, results: dict[str, Tensor]) -> bool:
        """Whether values leave the tolerance policy."""
        try:
            errors = [compare.error(t, self.eager[name], self.exact[name]) for name, t in results.items()]
        except AssertionError:  # NaN or infinity where there is none
            return True
        return not all(e.within_bound for e in errors)


class Kernel(NamedTuple):
    source: str
    name: str  # lora_down_kernel<Bf16, float, 16, true>

    @property
    def arguments(self) -> list[str]:
        return re.findall(r"[^<>,\s]+", self.name.partition("<")[2])

    @property
    def dtypes(self) -> Dtypes:
        x = {"Bf16": BF16, "Half": F16}[self.arguments[0]]
        return Dtypes(x, F32 if self.arguments[1] == "float" else x)


def _laid_out(t: Tensor, vector: bool) -> Tensor:
    """Rows that begin at multiples of 16 bytes, or that do not."""
    return strided(t, 0, -t.shape[1] % 8) if vector else strided(t, 1, 1 + t.shape[1] % 2)


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
    for M, columns, r, sm_count, dropout in _skinny(kernel, 64, 128):
        K = -(-columns // 8) * 8 if vector else columns  # A is contiguous
        r = r - M % 4 if vector and r <= 64 else r  # nor does anything else depend on its rows
        x, A = normal(M, K, dtype=dtypes.x), normal(r, K, dtype=dtypes.adapter, std=K**-0.5)

        def launch(run: Run, x=x, A=A, sm_count=sm_count, dropout=dropout) -> dict[str, Tensor]:
            return {"S": skinny.lora_down(run.library, _laid_out(x, vector), A.clone(), dropout=dropout, sm_count=sm_count)}

        h, wide = (x.float(), x.double()) if dropout is None else (dropout.of(x.float()), dropout.of(x.double()))
        yield Case(launch, {"S": h @ A.float().T}, {"S": wide @ A.double().T})


def _backward_down(kernel: Kernel) -> Iterator[Case]:
    dtypes, vector = kernel.dtypes, kernel.arguments[3] == "true"
    for M, K, r, sm_count, dropout in _skinny(kernel, 64, 128):
        x, dS = normal(M, K, dtype=dtypes.x), normal(M, r, dtype=F32)

        def launch(run: Run, x=x, dS=dS, sm_count=sm_count, dropout=dropout) -> dict[str, Tensor]:
            inputs = dS.clone(), _laid_out(x, vector), dtypes.adapter
            return {"dA": skinny.lora_backward_down(run.library, *inputs, dropout=dropout, sm_count=sm_count)}

        h, wide = (x, x.double()) if dropout is None else (dropout.of(x.to(dtypes.adapter)), dropout.of(x.double()))
        yield Case(launch, {"dA": dS.to(dtypes.adapter).T @ h.to(dtypes.adapter)}, {"dA": dS.double().T @ wide})


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
        yield Case(launch, eager, exact)


class Gemm(NamedTuple):
    """A launch of lora_forward or lora_backward_dx. `vector`: whether rows begin at multiples of 16 bytes."""

    case: compare.Case
    is_dx: bool
    tile: str
    weight_transposed: bool
    adapter_transposed: bool
    inputs_vector: bool
    out_vector: bool
    base: Tensor | None  # what out holds where the weight is absent

    def __call__(self, run: Run) -> dict[str, Tensor]:
        case, module = self.case, dx if self.is_dx else forward
        (M, K), N, r = case.x.shape, case.weight.shape[0], case.lora_A.shape[0]

        def laid_out(t: Tensor, vector: bool, transposed: bool = False) -> Tensor:
            return laid_out(t.T, vector).T if transposed else _laid_out(t, vector)

        wide, adapter = (case.dy, case.lora_A) if self.is_dx else (case.x, case.lora_B)
        out = laid_out(torch.empty(M, K if self.is_dx else N, dtype=wide.dtype) if self.base is None else self.base, self.out_vector)
        weight = laid_out(case.weight, self.inputs_vector, self.weight_transposed)
        wide, adapter = laid_out(wide, self.inputs_vector), laid_out(adapter, self.out_vector, self.adapter_transposed)
        low_rank, bias = module.down(case), None if case.bias is None else case.bias.to(adapter.dtype, copy=True)
        for t in (wide, weight, adapter, bias, low_rank):
            if t is not None:
                run.register(t, readonly=True)
        there = [matrix(t) if self.base is None else matrix(None) for t in (wide, weight)]
        if self.base is not None and self.weight_transposed:
            there[1].row_stride, there[1].col_stride = 1, 0
        end = low_rank.data_ptr(), TILES[self.tile]
        if self.is_dx:
            seed, p = case.seed, case.dropout_p
            drop = Dropout_(None, 0, 1.0)
            if seed is not None:
                run.register(seed, readonly=True)
                drop = Dropout_(seed.data_ptr(), reference.dropout_threshold(p), 1 / (1 - p))
            params = dx.LoraBackwardDx(M, K, N, r, *there, matrix(adapter), matrix(out), end[0], drop, end[1])
            failed = run.library.lora_ops_lora_backward_dx(ctypes.byref(params), None)
        else:
            matrices = *there, matrix(adapter), matrix(bias), matrix(out)
            params = forward.LoraForward(M, K, N, r, *matrices, end[0], case.scaling, end[1])
            failed = run.library.lora_ops_lora_forward(ctypes.byref(params), None)
        if failed:
            raise RuntimeError("the launch failed")
        return {"out": out}


def _gemm(kernel: Kernel) -> Iterator[Case]:
    T, _, *sizes, weight_rows, vector, is_dx = kernel.arguments
    rows, columns, depth, _, stages = map(int, sizes)
    is_dx, vector, x = is_dx == "true", vector == "true", {"Bf16": BF16, "Half": F16}[T]
    deep = (stages + 1) * depth  # the ring goes round
    shapes = [  # M, columns of out, depth of the product, rank, parts of the adapter, base, dropout
        (rows + 2, columns + 9, 24, 20, F32, False, 0.25),
        (rows // 2, columns, deep, 16, x, False, 0.0),
        (rows, columns // 2, deep + 25, 5, F32, False, 0.0),
        (9 * rows + 1, 8, 8, 4, x, False, 0.0),
        (3, 300, 8, 8, F32, False, 0.3),
    ]
    for i in range(1, 17):
        wide, base = (columns // 2 * (i % 3) + 7 * i) % 150 + 1, vector and i % 3 == 0
        shapes.append(((rows // 4 * (i % 4) + i), wide, depth // 2 * (i % 4) + 11 * i % 16 + 1, i, (F32, x)[i // 4 % 2], base, i % 2 / 4))
    for i, (M, wide, deep, r, adapter, base, p) in enumerate(shapes):
        K, N = (wide, deep) if is_dx else (deep, wide)
        case = compare.make_case((M, K, N, r), Dtypes(x, adapter), bias=i % 4 != 3, dropout_p=p if is_dx else 0.0)
        product = case.dy.double() @ case.weight.double() if is_dx else case.x.double() @ case.weight.double().T
        launch = Gemm(
            case,
            is_dx,
            {128: "large", 64: "medium", 32: "small"}[rows],
            weight_transposed=(weight_rows == "true") == is_dx,
            adapter_transposed=i % 3 == 2,
            inputs_vector=vector,
            out_vector=i % 4 < 2,
            base=product.to(x) if base else None,
        )
        name = "dx" if is_dx else "y"
        eager = compare.run(compare.eager_lora, case, backward=is_dx)[name]
        yield Case(launch, {"out": eager}, {"out": compare.oracle(case, backward=is_dx)[name]})


def _reduce(_: Kernel) -> Iterator[Case]:
    """Of every output type, and three reductions at once, of up to ten splits."""
    for i in range(1, 11):
        x, A = normal(3, 128 * i - 8, dtype=BF16), normal(40 * i + 16, 128 * i - 8, dtype=F32)

        def launch(run: Run, x=x, A=A) -> dict[str, Tensor]:
            return {"S": skinny.lora_down(run.library, x.clone(), A.clone(), sm_count=100)}

        yield Case(launch, {"S": x.float() @ A.T}, {"S": x.double() @ A.double().T})
    for t in ("Bf16", "Half"):
        yield from _backward_up(Kernel("lora_backward_up.cu", f"lora_backward_up_kernel<{t}, {t}, 16, true>"))


_OPS = {
    "lora_down.cu": _down,
    "lora_backward_down.cu": _backward_down,
    "lora_backward_up.cu": _backward_up,
    "lora_forward.cu": _gemm,
    "lora_backward_dx.cu": _gemm,
    "reduce.cu": _reduce,
}


def cases(kernel: Kernel) -> list[Case]:
    torch.manual_seed(0)
    return list(_OPS[kernel.source](kernel))
