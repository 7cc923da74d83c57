"""Cases of lora_forward and lora_backward_dx: alone, of a group of layers, of segments of rows."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import compare
import test_cuda_lora_backward_dx as dx
import test_cuda_lora_forward as forward
import test_cuda_lora_general as general
import test_cuda_lora_group as group_op
import test_cuda_lora_segments as segments_op
import torch
import torch.nn.functional as F
from compare import F32, Dtypes
from cuda_structs import TILES, LoraBackwardDx, LoraForward, call, empty, laid_out, matrix, strides
from ptx.device import Device, Run
from skinny import Dropout, device_dropout
from torch import Tensor

from lora_ops import reference

from .case import F64, Case, Counts, Kernel, Results, odd, one_of_each_row, whole, whole_normal
from .dense_numbers import (
    Shape,
    at_thresholds,
    ends,
    make,
    of_last_bits,
    of_low_rank,
    of_parts,
    of_whole_numbers,
    shapes,
    tile_of,
    without_adapter,
)

# --- one layer --------------------------------------------------------------------------------------------------------


class Gemm(NamedTuple):
    """A launch of lora_forward or lora_backward_dx. Layouts are those of cuda_structs.py."""

    case: compare.Case
    is_dx: bool
    tile: str
    layout: str  # of in and weight
    transposed: bool  # the weight
    layout_out: str  # of out and the adapter
    adapter_transposed: bool
    gate: Tensor | None = None
    m: Tensor | None = None
    offset: int = 0  # of S or dS in a wider matrix
    base: bool = False  # out holds the base product, and the weight is absent

    def __call__(self, run: Run) -> Results:
        case, is_dx = self.case, self.is_dx
        (M, K), N, r = case.x.shape, case.weight.shape[0], case.lora_A.shape[0]
        wide, adapter = (case.dy, case.lora_A) if is_dx else (case.x, case.lora_B)
        base = case.dy.double() @ case.weight.double() if is_dx else case.x.double() @ case.weight.double().T
        out = laid_out(base.to(wide.dtype), self.layout_out) if self.base else empty(*base.shape, wide.dtype, self.layout_out)
        wide = None if self.base else laid_out(wide, self.layout)
        weight = None if self.base else laid_out(case.weight, self.layout, self.transposed, apart=8)
        adapter = laid_out(adapter, self.layout_out, self.adapter_transposed)
        low_rank = general.columns_of_wider((dx if is_dx else forward).down(case), self.offset)
        gate, m, bias = (None if t is None else t.clone() for t in (self.gate, self.m, case.bias))
        for t in (wide, weight, adapter, low_rank, gate, m, bias):
            general.put(run, t)
        at, stride = strides(low_rank)
        tile, sizes = TILES[self.tile], (M, K, N, r)
        if is_dx:
            drop, seed = device_dropout(None if case.seed is None else Dropout(case.dropout_p, int(case.seed)))
            matrices = map(matrix, (wide, weight, adapter, out))
            call(run, "lora_backward_dx", LoraBackwardDx(*sizes, *matrices, at, drop, tile, stride, *strides(gate)))
            del seed
        else:
            matrices = map(matrix, (wide, weight, adapter, bias, out))
            rest = (case.scaling, tile, stride, *strides(gate), matrix(m))
            call(run, "lora_forward", LoraForward(*sizes, *matrices, at, *rest))
        return {"out": out}

    def exact(self) -> Results:
        case = self.case
        x, weight, A, B, dy = (t.double() for t in (case.x, case.weight, case.lora_A, case.lora_B, case.dy))
        gate = 1 if self.gate is None else self.gate.double()
        if self.is_dx:
            low_rank = ((dy * case.scaling) @ B * gate) @ A
            if case.seed is not None:
                keep = reference.dropout_keep(case.seed, case.dropout_p, *x.shape)
                low_rank = low_rank * (keep / (1 - case.dropout_p))
            return {"out": dy @ weight + low_rank}
        y = F.linear(x, weight) + F.linear(F.linear(x, A) * gate, B) * case.scaling
        y = y if self.m is None else y * self.m.double()
        return {"out": y if case.bias is None else y + case.bias.double()}

    def of_case(self, counts: Counts | None = None) -> Case:
        return Case(self, self.exact, counts=counts)


def one(kernel: Kernel, _: Device) -> Iterator[Case]:
    weight_rows, vector, is_dx = kernel.flags
    rows, columns, depth, _, _ = kernel.sizes
    how = {"is_dx": is_dx, "tile": tile_of(kernel), "transposed": weight_rows == is_dx}
    plain = {"layout": "padded" if vector else "odd", "layout_out": "padded", "adapter_transposed": False}

    if vector:
        aligned = {"layout": "plain", "layout_out": "plain", "adapter_transposed": is_dx}
        for i, (adapter, r, parts) in enumerate(((F32, 24, 3), (kernel.type, 16, 1))):
            shape = Shape(2 * rows, columns * (i + 1), (2 - i) * depth, r, adapter)
            gemm = Gemm(of_whole_numbers(make(kernel, shape, is_dx, bias=not is_dx), is_dx), **how, **aligned)
            mma = shape.M // 16 * (shape.wide // 8) * (shape.deep // 16 + parts * -(-r // 16))
            copied = shape.M // rows * (shape.wide // columns) * (rows + columns) * shape.deep * 2
            yield gemm.of_case(Counts(mma, copied, vectors=True))
        if weight_rows:  # what out holds is copied, and nothing else
            counts = Counts(shape.M // 16 * (shape.wide // 8) * -(-r // 16), shape.M * shape.wide * 2, vectors=True)
            yield gemm._replace(base=True).of_case(counts)
    for i, shape in enumerate(shapes(kernel)):
        case = make(kernel, shape, is_dx, bias=not is_dx and i % 4 != 3, dropout_p=i % 2 / 2 if is_dx else 0.0)
        case = of_whole_numbers(case, is_dx)
        case = replace(case, bias=case.bias.float()) if case.bias is not None and i % 4 == 1 else case
        gate = (None, whole_normal(shape.r, dtype=F32), whole_normal(shape.M, shape.r, dtype=F32))[i % 3]
        m = whole_normal(shape.wide, dtype=(F32, kernel.type)[i % 3 - 1])
        yield Gemm(
            case,
            **how,
            layout="padded" if vector else "odd",
            layout_out=("padded", "odd")[i // 2 % 2],
            adapter_transposed=i % 3 == 2,
            gate=gate,
            m=None if is_dx or i % 3 == 0 else m,
            offset=(0, 4, 3)[i % 3],
            base=vector and weight_rows and i % 4 == 1,
        ).of_case()
    for i, shape in enumerate(ends(kernel)):
        case = of_whole_numbers(make(kernel, shape, is_dx, bias=False), is_dx)
        base = vector and weight_rows and i < 8
        if base or not vector:
            odd = {"layout": "odd", "layout_out": "odd", "adapter_transposed": i // 2 % 2 > 0}
            yield Gemm(case, **how, **odd, base=base).of_case()
    for adapter in (F32, kernel.type):
        case = of_whole_numbers(make(kernel, Shape(rows, columns, 8, 1, adapter), is_dx, bias=False), is_dx)
        yield Gemm(without_adapter(case), **how, **plain).of_case()
        parts = of_parts(make(kernel, Shape(3 * rows + 5, columns + 3, 40, 20, adapter), is_dx), is_dx)
        for transposed in (False, True):  # one of them has neighbouring ranks side by side
            yield Gemm(parts, **how, **plain | {"adapter_transposed": transposed}).of_case()
        if vector and weight_rows:
            yield Gemm(of_last_bits(case, is_dx), **how, **plain, base=True).of_case()
    if is_dx:
        shape = Shape(rows, columns, 8, 4, F32)
        for case in at_thresholds(kernel, lambda p: of_low_rank(make(kernel, shape, is_dx, bias=False, dropout_p=p))):
            yield Gemm(case, **how, **plain).of_case()


# --- a group of layers ------------------------------------------------------------------------------------------------


def group(kernel: Kernel, _: Device) -> Iterator[Case]:
    """Two to four layers of every width, side by side or one after the other. One is launched as it is alone."""
    weight_rows, vector = kernel.flags
    is_dx = kernel.source == "lora_backward_dx_group.cu"
    rows, columns, depth, *_ = kernel.sizes
    how = {"tile": tile_of(kernel), "layout": "padded" if vector else "odd", "transposed": weight_rows == is_dx}

    def gate_of(layer: compare.Case) -> Tensor | None:
        (M, _), (N, r) = layer.x.shape, layer.lora_B.shape
        return (None, whole_normal(r, dtype=F32), whole_normal(M, r, dtype=F32))[N % 3] if M % 2 else None

    def scale_of(layer: compare.Case) -> Tensor | None:
        N = layer.lora_B.shape[0]
        return None if N % 2 else whole_normal(N, dtype=(F32, kernel.type)[N // 2 % 2])

    def made(layers: list[compare.Case], gate: Tensor | None = None, counts: Counts | None = None, **how_) -> Case:
        how_ = how | how_
        if is_dx:

            def exact() -> Results:
                return {"dx": group_op.eager_dx(layers, gate, F64)}

            return Case(lambda run: {"dx": group_op.backward_dx(run, layers, **how_, gate=gate)}, exact, counts=counts)

        gates, scales = ([of(layer) for layer in layers] for of in (gate_of, scale_of))

        def launch(run: Run) -> Results:
            results = group_op.forwards(run, layers, **how_, grouped=True, gates=gates, scales=scales)
            return dict(zip("abcd", results, strict=False))

        def exact() -> Results:
            found = {}
            for name, layer, g, m in zip("abcd", layers, gates, scales, strict=False):
                found[name] = Gemm(layer, False, "", "", False, "", False, gate=g, m=m).exact()["out"]
            return found

        return Case(launch, exact, counts=counts)

    def layers_of(
        shape: Shape,
        of_group: list[tuple[int, int]],
        numbers: Callable[[compare.Case, bool], compare.Case] = of_whole_numbers,
        **options,
    ) -> list[compare.Case]:
        K = shape.wide if is_dx else shape.deep
        layers = group_op.make_layers(shape.M, K, of_group, Dtypes(kernel.type, shape.adapter), **options)
        layers = [numbers(layer, is_dx) for layer in layers]
        return [
            replace(layer, bias=layer.bias.float()) if layer.bias is not None and shape.M % 2 else layer for layer in layers
        ]

    if vector:
        shape = Shape(2 * rows, columns, depth, 16, kernel.type)
        N = depth if is_dx else columns
        mma, tiles = 2 * (rows // 16) * (columns // 8), 2 * (rows + columns) * depth * 2
        mma = mma * (2 * depth // 16 + 2) if is_dx else 2 * mma * (depth // 16 + 1)
        layers = layers_of(shape, [(N, 16), (N, 16)])
        yield made(layers, None, Counts(mma, 2 * tiles), layout="plain")
    for i, shape in enumerate(shapes(kernel)):
        layout_out = "odd" if i % 4 == 2 else how["layout"]
        of_group = [(N * (i % 2 + 1) + i, r + i // 3 % 4) for N, r in group_op.GROUPS[1 + i % 3]]
        of_group = [(shape.wide, shape.r), (8, 4)] if i >= 16 else of_group
        ranks = sum(r for _, r in of_group)
        gate = (None, None, whole_normal(ranks, dtype=F32), whole_normal(shape.M, ranks, dtype=F32))[i % 4] if is_dx else None
        yield made(layers_of(shape, of_group, dropout_p=i % 3 % 2 / 2 if is_dx else 0.0), gate, layout_out=layout_out)
    if not vector:
        for i, shape in enumerate(ends(kernel)):
            N = shape.deep if is_dx else shape.wide
            yield made(layers_of(shape, [(N, shape.r), (N // 2 + 1, i % 8 + 1)]))
    for adapter in (F32, kernel.type):
        parts = Shape(3 * rows + 5, columns + 3, 40, 20, adapter)
        yield made(layers_of(parts, [(40 if is_dx else columns + 3, 20)] * 2, of_parts))
        layers = layers_of(Shape(rows, columns, 8, 1, adapter), [(columns, 1), (columns, 1)])
        yield made([without_adapter(layer) for layer in layers])
        yield made([layers[0], without_adapter(layers[1])])
    if is_dx:

        def layer(p: float) -> compare.Case:
            return of_low_rank(group_op.make_layers(rows, columns, ((8, 4),), Dtypes(kernel.type, F32), dropout_p=p)[0])

        yield from (made([case, case]) for case in at_thresholds(kernel, layer))


# --- segments of rows -------------------------------------------------------------------------------------------------


def _adapters(batch: list[tuple[int, int]], K: int, N: int, dtype: torch.dtype, *, is_dx: bool) -> list[segments_op.Adapter]:
    """Of whole numbers, and S or dS as small as they are."""
    adapters = segments_op.make_adapters(batch, K, N, dtype)
    for i, a in enumerate(adapters):
        a.A, a.B, a.scaling = whole(a.A), whole(a.B), 1.0 + i % 2
        if a.rank > 0 and is_dx:
            a.B = one_of_each_row(a.rank, N).T * a.B.sign()
        elif a.rank > 0:
            a.A = one_of_each_row(a.rank, K) * a.A.sign()
    return adapters


def segments(kernel: Kernel, _: Device) -> Iterator[Case]:
    weight_rows, vector, is_dx = kernel.flags
    rows, columns, depth, *_ = kernel.sizes
    how = {"tile": tile_of(kernel), "layout": "padded" if vector else "odd", "transposed": weight_rows == is_dx}

    def made(
        of_in: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        adapters: list[segments_op.Adapter],
        dropout: Dropout | None = None,
        counts: Counts | None = None,
        base: bool = False,
        **how_,
    ) -> Case:
        S, options = None if is_dx else segments_op.poisoned_down(of_in, adapters), how | how_
        given = None if base else weight
        left = None if not base else (of_in.double() @ (weight if is_dx else weight.T).double()).to(kernel.type)

        def launch(run: Run) -> Results:
            if is_dx:
                return {"out": segments_op.backward_dx(run, of_in, given, adapters, dropout, **options, base=left)}
            return {"out": segments_op.forward(run, of_in, given, bias, S, adapters, **options, base=left)}

        def exact() -> Results:
            if is_dx:
                return {"out": segments_op.dx_value(of_in, weight, adapters, dropout, F64)}
            return {"out": segments_op.forward_value(of_in, weight, bias, adapters, F64)}

        return Case(launch, exact, counts=counts)

    def operands(M: int, wide: int, deep: int) -> tuple[Tensor, Tensor, int, int]:
        K, N = (wide, deep) if is_dx else (deep, wide)
        return whole_normal(M, deep, dtype=kernel.type), whole_normal(N, K, dtype=kernel.type), K, N

    if vector:
        of_in, weight, K, N = operands(2 * rows, columns, depth)
        mma = 2 * (rows // 16) * (columns // 8) * (depth // 16 + 1)
        adapters = _adapters([(rows, 16), (rows, 16)], K, N, kernel.type, is_dx=is_dx)
        counts = Counts(mma, 2 * (rows + columns) * depth * 2)
        yield made(of_in, weight, None, adapters, counts=counts, layout="plain")
    for i, (_, wide, deep, _, adapter) in enumerate(shapes(kernel)):
        batch = [(rows_ + i // 4, r) for rows_, r in list(segments_op.BATCHES.values())[i % 4]]
        of_in, weight, K, N = operands(sum(rows_ for rows_, _ in batch), wide, deep)
        adapters = _adapters(batch, K, N, adapter, is_dx=is_dx)
        bias = whole_normal(N, dtype=(F32, kernel.type)[i % 2]) if not is_dx and i % 3 else None
        base, layout_out = vector and weight_rows and i % 5 == 4, ("odd", how["layout"], how["layout"])[i % 3]
        yield made(of_in, weight, bias, adapters, Dropout(0.5) if is_dx and i % 2 else None, base=base, layout_out=layout_out)
    of_in, weight, K, N = operands(9 * rows + 3, columns + 1, 9)  # more than a group of rows of tiles
    adapters = _adapters([(4 * rows, 3), (5 * rows + 3, 4)], K, N, kernel.type, is_dx=is_dx)
    yield made(of_in, weight, None, adapters)
    for i, (M, wide, deep, r, adapter) in enumerate(ends(kernel)):
        of_in, weight, K, N = operands(M, wide, deep)
        adapters = _adapters([(i, r), (M - i, i % 8 + 1)], K, N, adapter, is_dx=is_dx)
        base = vector and weight_rows and i < 8
        if base or not vector:
            yield made(of_in, weight, None, adapters, base=base, layout_out="odd")
    for adapter in (F32, kernel.type):
        if vector and weight_rows:
            of_in, weight, K, N = operands(rows, columns, 8)
            only, none = one_of_each_row(rows, 8).to(kernel.type), segments_op.make_adapters([(rows, 0)], K, N, adapter)
            yield made(only, odd(weight), None, none, base=True)
        case = of_parts(make(kernel, Shape(3 * rows + 5, columns + 3, 40, 20, adapter), is_dx), is_dx)
        ranges = (slice(0, 9), slice(9, 3 * rows + 5))
        adapters = [segments_op.Adapter(s, case.lora_A, case.lora_B, 1.0) for s in ranges]
        yield made(case.dy if is_dx else case.x, case.weight, None, adapters)
    if is_dx:
        shape = Shape(rows, columns, 8, 4, F32)
        for case in at_thresholds(kernel, lambda p: of_low_rank(make(kernel, shape, is_dx, bias=False, dropout_p=p))):
            adapters = [segments_op.Adapter(slice(0, rows), case.lora_A, case.lora_B, 1.0)]
            yield made(case.dy, case.weight, None, adapters, Dropout(case.dropout_p, int(case.seed)))
