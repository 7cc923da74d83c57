"""Small launches of each kernel of csrc/cuda, by source and template arguments: what the mutation run of tools/ looks at.

Together they take every branch of a kernel that the host can reach: rings of buffers go round, in the first block of a grid
and in others, every copy of an unrolled loop meets an end of the matrix, dropout meets the number that equals its threshold,
and the lower parts of fp32 operands are all that is left.

A kernel of a new source takes a function in _OPS, from the kernel to its cases.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import compare
import four_bit
import skinny
import test_cuda_lora_backward_dx as dx
import test_cuda_lora_backward_up as up
import test_cuda_lora_forward as forward
import test_cuda_lora_general as general
import test_cuda_lora_group as group
import test_cuda_lora_segments as segments
import test_cuda_qlora_backward_dx as qdx
import test_cuda_qlora_forward as qforward
import test_cuda_quantize_4bit as q4
import torch
import torch.nn.functional as F
from compare import BF16, F16, F32, Dtypes, make_case
from cuda_structs import TILES, LoraBackwardDx, LoraForward, call, empty, laid_out, matrix, strides
from ptx.device import Counters, Device, Run
from skinny import Dropout, device_dropout, normal, products, strided
from torch import Tensor

from lora_ops import quantize_nf4, reference
from lora_ops.quant import layout

F64 = torch.float64
Results = dict[str, Tensor]


class Counts(NamedTuple):
    """Of a launch of whole tiles, of rows that are aligned."""

    mma: int
    copied: int  # bytes, by cp.async

    def check(self, counters: Counters) -> None:
        copies, stores = counters.matching("cp.async"), counters.matching("st.global")
        assert counters.bank_conflicts == [], "bank conflicts"
        assert counters.mma_count == self.mma, f"{counters.mma_count} mma of {self.mma}"
        assert copies.total("global_bytes") == self.copied, f"{copies.total('global_bytes')} bytes copied of {self.copied}"
        for some in (copies, stores):
            assert some.total("sectors") == some.total("ideal_sectors"), "sectors"


class Case(NamedTuple):
    launch: Callable[[Run], Results]
    eager: Results
    exact: Results  # eager's very tensors where every bit is wanted
    counts: Counts | None = None

    def check(self, results: Results, counters: Counters) -> None:
        for name, actual in results.items():
            eager, exact = self.eager[name], self.exact[name]
            if eager is exact:
                assert torch.equal(actual, exact), f"{name} has other bits"
            else:
                compare.assert_within_bound({name: compare.error(actual, eager, exact)})
        if self.counts is not None:
            self.counts.check(counters)


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
    def flags(self) -> list[bool]:
        return [a == "true" for a in self.arguments if a in ("true", "false")]

    @property
    def sizes(self) -> list[int]:
        return [int(a) for a in self.arguments if a.isdigit()]


# --- skinny products --------------------------------------------------------------------------------------------------


def _skinny_dtypes(kernel: Kernel) -> Dtypes:
    return Dtypes(kernel.type, F32 if kernel.arguments[1] == "float" else kernel.type)


def _layout(kernel: Kernel, t: Tensor) -> Tensor:
    """Rows that begin at multiples of 16 bytes, or that do not."""
    return strided(t, 0, -t.shape[1] % 8) if kernel.flags[0] else strided(t, 1, 1 + t.shape[1] % 2)


def in_order(a: Tensor, b: Tensor) -> Tensor:
    """a b; in fp32 summed one by one, where torch's own error of a few small sums is a matter of luck."""
    if a.dtype != F32:
        return a @ b
    total = torch.zeros(a.shape[0], b.shape[1])
    for k in range(a.shape[1]):
        total += a[:, k, None] * b[k]
    return total


class Skinny(NamedTuple):
    rows: int
    columns: int
    r: int
    sm_count: int
    dropout: Dropout | None
    whole: bool = False


def _skinny(kernel: Kernel, columns: int) -> Iterator[Skinny]:
    """For tiles of 64 rows and `columns`."""
    (most,), (vector,) = kernel.sizes, kernel.flags
    least = most // 2 if most > 16 else 0  # below it, another kernel has fewer ranks per block
    yield Skinny(2 * 64, 2 * columns, most, 1, Dropout(0.25), whole=vector)
    yield Skinny(64 + 2, 4 * columns + 40, 100 if most == 64 else most - 4, 8, None)
    yield Skinny(4 * 64 + 37, 24, most - 8 if most > 16 else 8, 2, None)
    for i in range(16):  # up to four tiles one way and three the other; an end in each eighth of a tile, and of its ranks
        rows = 64 * (i % 4) + 8 * (i % 8) + 3 * i % 8 + 2
        wide = columns * ((i + i // 4) % 3) + columns // 24 * i + 8 * (i % 2)
        rank = least + (4 * (i % ((most - least) // 4) + 1) if vector else (5 * i + 1) % (most - least) + 1)
        beyond = 64 * (i % 2) if most == 64 else 0
        dropout = Dropout(0.6) if i // 2 % 2 else None
        yield Skinny(rows, (wide or 8) + (0 if vector else 7 * i % 16), rank + beyond, 1 + i % 3, dropout)
    seed = 0x123456789ABCDEF
    bits = reference.dropout_bits(torch.tensor(seed), 16, 128)
    for rows_ in (slice(0, 8, 2), slice(9, 16, 2)):  # even turns of a loop that drops rows or columns, and odd ones
        for col in (c for c in range(128) if c % 32 < 2):
            yield Skinny(16, 128, most, 1, Dropout(int(bits[rows_, col].min()) / 65536, seed))


def _down(kernel: Kernel, _: Device) -> Iterator[Case]:
    dtypes = _skinny_dtypes(kernel)
    for M, columns, r, sm_count, dropout, whole in _skinny(kernel, 128):
        K = -(-columns // 8) * 8 if kernel.flags[0] else columns  # A is contiguous
        r = r - M % 4 if kernel.flags[0] and r <= 64 else r  # nor does anything else depend on its rows
        x, A = normal(M, K, dtype=dtypes.x), normal(r, K, dtype=dtypes.adapter, std=K**-0.5)

        def launch(run: Run, x=x, A=A, sm_count=sm_count, dropout=dropout) -> Results:
            return {"S": skinny.lora_down(run.library, _layout(kernel, x), A.clone(), dropout=dropout, sm_count=sm_count)}

        h, wide = (t if dropout is None else dropout.of(t) for t in (x.float(), x.double()))
        mma = products(dtypes) * (M // 16) * (K // 16) * (r // 8)
        counts = Counts(mma, x.nbytes + M // 64 * A.nbytes) if whole else None
        yield Case(launch, {"S": in_order(h, A.float().T)}, {"S": wide @ A.double().T}, counts)


def _backward_down(kernel: Kernel, _: Device) -> Iterator[Case]:
    dtypes = _skinny_dtypes(kernel)
    for M, K, r, sm_count, dropout, whole in _skinny(kernel, 128):
        x, dS = normal(M, K, dtype=dtypes.x), normal(M, r, dtype=F32)

        def launch(run: Run, x=x, dS=dS, sm_count=sm_count, dropout=dropout) -> Results:
            inputs = dS.clone(), _layout(kernel, x), dtypes.adapter
            return {"dA": skinny.lora_backward_down(run.library, *inputs, dropout=dropout, sm_count=sm_count)}

        h, wide = (t if dropout is None else dropout.of(t) for t in (x.to(dtypes.adapter), x.double()))
        mma = products(dtypes) * (M // 16) * (K // 16) * (r // 8)
        counts = Counts(mma, x.nbytes + K // 128 * dS.nbytes) if whole else None
        yield Case(launch, {"dA": in_order(dS.to(dtypes.adapter).T, h)}, {"dA": dS.double().T @ wide}, counts)


def _backward_up(kernel: Kernel, _: Device) -> Iterator[Case]:
    dtypes, names = _skinny_dtypes(kernel), ("dS", "dB", "dbias")
    some = [names, names, names, ("dB",), ("dS", "dbias"), names, ("dbias",), ("dS",), names]
    columns = 256 if kernel.sizes[0] <= 32 else 128
    for i, (M, N, r, sm_count, _, whole) in enumerate(_skinny(kernel, columns)):
        if M == 16:
            return  # thresholds
        wanted = some[i % len(some)]
        r = r - 1 if kernel.flags[0] and "dB" not in wanted else r  # S, which is not read, need not be aligned
        dy, B = normal(M, N, dtype=dtypes.x), normal(N, r, dtype=dtypes.adapter, std=r**-0.5)
        S = normal(M, r, dtype=F32, draw=1)

        def launch(run: Run, dy=dy, B=B, S=S, sm_count=sm_count, wanted=wanted) -> Results:
            inputs = _layout(kernel, dy), B.clone(), S.clone()
            return skinny.lora_backward_up(run.library, *inputs, up.SCALING, wanted=wanted, sm_count=sm_count)

        g, wide = dy.to(dtypes.adapter) * up.SCALING, dy.double()
        dS, dB = in_order(dy.float(), B.float()), in_order(g.T, S.to(dtypes.adapter))
        eager = {"dS": up.SCALING * dS, "dB": dB, "dbias": dy.sum(0)}
        exact = {"dS": up.SCALING * (wide @ B.double()), "dB": up.SCALING * (wide.T @ S.double()), "dbias": wide.sum(0)}
        mma = (M // 16) * (N // 16) * (2 * products(dtypes) * (r // 8) + 1)
        yield Case(launch, eager, exact, Counts(mma, dy.nbytes + N // columns * S.nbytes) if whole else None)


def _reduce(_: Kernel, device: Device) -> Iterator[Case]:
    """Of every output type, and three reductions at once, of up to ten splits."""
    for i in range(2, 11, 3):
        x, A = normal(3, 128 * i - 8, dtype=BF16), normal(40 * i + 16, 128 * i - 8, dtype=F32)

        def launch(run: Run, x=x, A=A) -> Results:
            return {"S": skinny.lora_down(run.library, x.clone(), A.clone(), sm_count=100)}

        yield Case(launch, {"S": in_order(x.float(), A.T)}, {"S": x.double() @ A.double().T})
    for t in ("Bf16", "Half"):
        kernel = Kernel("lora_backward_up.cu", f"lora_backward_up_kernel<{t}, {t}, 16, true>")
        yield from (case._replace(counts=None) for case in list(_backward_up(kernel, device))[1:8])


# --- dense products ---------------------------------------------------------------------------------------------------


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
    base: Tensor | None = None  # what out holds where the weight is absent
    left: Tensor | None = None  # instead of the case's S or dS

    def __call__(self, run: Run) -> Results:
        case, is_dx = self.case, self.is_dx
        (M, K), N, r = case.x.shape, case.weight.shape[0], case.lora_A.shape[0]
        wide, adapter = (case.dy, case.lora_A) if is_dx else (case.x, case.lora_B)
        given = self.base is None
        out = empty(M, K if is_dx else N, wide.dtype, self.layout_out) if given else laid_out(self.base, self.layout_out)
        wide = laid_out(wide, self.layout) if given else None
        weight = laid_out(case.weight, self.layout, self.transposed) if given else None
        adapter = laid_out(adapter, self.layout_out, self.adapter_transposed)
        left = self.left if self.left is not None else dx.down(case) if is_dx else forward.down(case)
        low_rank = general.columns_of_wider(left, self.offset)
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

    def value(self, dtype: torch.dtype | None = None) -> Tensor:
        """As eager has it, or in dtype."""
        case = self.case

        def cast(t: Tensor) -> Tensor:
            return t.to(dtype or t.dtype)

        x, weight, A, B, dy = map(cast, (case.x, case.weight, case.lora_A, case.lora_B, case.dy))
        gate = 1 if self.gate is None else self.gate.to(A.dtype)
        if self.is_dx:
            low_rank = ((dy.to(B.dtype) * case.scaling) @ B * gate) @ A
            if case.seed is not None:
                keep = reference.dropout_keep(case.seed, case.dropout_p, *x.shape)
                low_rank = low_rank * (keep.to(low_rank.dtype) / (1 - case.dropout_p))
            return dy @ weight + low_rank.to(dy.dtype)
        y = F.linear(x, weight)
        y = (y + F.linear(F.linear(x.to(A.dtype), A) * gate, B) * case.scaling).to(y.dtype)
        y = y if self.m is None else y * self.m.to(y.dtype)
        return y if case.bias is None else y + cast(case.bias)


class GemmShape(NamedTuple):
    M: int
    wide: int  # columns of out
    deep: int
    r: int
    adapter: torch.dtype


def _gemm_shapes(kernel: Kernel) -> Iterator[GemmShape]:
    """Beyond whole tiles: up to three tiles each way, an end in each eighth of a tile, and rings that go round."""
    rows, columns, depth, _, stages = kernel.sizes
    for i in range(16):
        M = rows * (i % 3) + rows // 8 * (i % 8) + i % 5 + 1
        wide = columns * (i // 3 % 3) + columns // 8 * (5 * i % 8) + 3 * i % 8 + 1
        deep = depth * (7 * i % (stages + 2)) + 11 * i % depth + 1
        yield GemmShape(M, wide, deep, (5 * i + 3) % 24 + 1, (F32, kernel.type)[i // 2 % 2])


def _tile(kernel: Kernel) -> str:
    return {128: "large", 64: "medium", 32: "small"}[kernel.sizes[0]]


def _make(kernel: Kernel, shape: GemmShape, is_dx: bool, **options) -> compare.Case:
    M, wide, deep, r, adapter = shape
    K, N = (wide, deep) if is_dx else (deep, wide)
    return make_case((M, K, N, r), Dtypes(kernel.type, adapter), **options)


def _at_thresholds(kernel: Kernel, of: Callable[[float], compare.Case]) -> Iterator[compare.Case]:
    """of(p) for every element of one thread's fragments, with p the very number that this element has."""
    rows, columns, _, warps_m, _ = kernel.sizes
    case = of(0.5)
    bits = reference.dropout_bits(case.seed, *case.x.shape)
    for row in range(0, rows // warps_m, 8):
        for col in (c for c in range(columns) if c % 32 < 8 * warps_m and c % 8 < 2):
            yield replace(case, dropout_p=int(bits[row, col]) / 65536)


def _parts(kernel: Kernel, shape: GemmShape, how: dict) -> Case:
    """What is left of the low-rank product are the products of a higher and a lower part, exactly."""
    case = _make(kernel, shape, how["is_dx"], bias=False)
    M, columns, deep, r, _ = shape
    row, column, rank = torch.arange(M)[:, None], torch.arange(columns)[:, None], torch.arange(r)
    left = (row % r == rank) * (1 + (row % 2 + 1) * 2.0**-12)
    right = 1 + ((column + rank) % 2 + 1) * 2.0**-12
    wide, weight = torch.zeros(M, deep, dtype=kernel.type), torch.zeros(columns, deep, dtype=kernel.type)
    wide[:, 0], weight[:, 0] = 1, -1
    if how["is_dx"]:
        case = replace(case, dy=wide, weight=weight.T.contiguous(), lora_A=right.T.contiguous(), scaling=1.0)
    else:
        case = replace(case, x=wide, weight=weight, lora_B=right, scaling=1.0)
    exact = {"out": (left.double() @ right.double().T - 1).to(kernel.type)}
    return Case(Gemm(case, **how, left=left), exact, exact)


def _gemm(kernel: Kernel, _: Device) -> Iterator[Case]:
    weight_rows, vector, is_dx = kernel.flags
    rows, columns, depth, _, _ = kernel.sizes
    how = {"is_dx": is_dx, "tile": _tile(kernel), "transposed": weight_rows == is_dx}

    def counted(case: compare.Case, mma: int) -> Case:
        gemm = Gemm(case, **how, layout="plain", layout_out="plain", adapter_transposed=False)
        steps, bytes_ = (1, 2 * (rows + columns) * depth) if vector else (1, 0)
        (M, K), N = case.x.shape, case.weight.shape[0]
        tiles = M * (K if is_dx else N) // (rows * columns)
        copied = tiles * steps * (N if is_dx else K) // depth * bytes_
        main = M // 16 * ((K if is_dx else N) // 8)
        return Case(gemm, {"out": gemm.value()}, {"out": gemm.value(F64)}, Counts(main * mma, copied))

    if vector:
        for i, (adapter, r, parts) in enumerate(((F32, 24, 3), (kernel.type, 16, 1))):
            shape = GemmShape(2 * rows, columns * (i + 1), (2 - i) * depth, r, adapter)
            yield counted(_make(kernel, shape, is_dx, bias=True), shape.deep // 16 + parts * -(-r // 16))
    for i, shape in enumerate(_gemm_shapes(kernel)):
        case = _make(kernel, shape, is_dx, bias=not is_dx and i % 4 != 3, dropout_p=i % 2 / 4 if is_dx else 0.0)
        base = None
        if vector and weight_rows != is_dx and i % 4 == 1:
            base = (case.dy.double() @ case.weight.double() if is_dx else case.x.double() @ case.weight.double().T).to(
                kernel.type
            )
        gemm = Gemm(
            case,
            **how,
            layout="padded" if vector else "odd",
            layout_out=("padded", "odd")[i // 2 % 2],
            adapter_transposed=i % 3 == 2,
            gate=general.gate_of(case, general.GATES[i % 3]),
            m=None if is_dx or i % 3 == 0 else general.scale_of(case, (F32, kernel.type)[i % 3 - 1]),
            offset=(0, 4, 3)[i % 3],
            base=base,
        )
        yield Case(gemm, {"out": gemm.value()}, {"out": gemm.value(F64)})
    plain = {"layout": "padded" if vector else "odd", "layout_out": "padded", "adapter_transposed": False}
    yield _parts(kernel, GemmShape(rows + 5, columns + 3, 8, 20, F32), how | plain)
    if is_dx:
        shape = GemmShape(rows, columns, 8, 4, F32)
        for case in _at_thresholds(kernel, lambda p: _make(kernel, shape, is_dx, bias=False, dropout_p=p)):
            one = Gemm(case, **how, **plain)
            yield Case(one, {"out": one.value()}, {"out": one.value(F64)})


def _group(kernel: Kernel, _: Device) -> Iterator[Case]:
    """Two to four layers of every width, side by side or one after the other. One is launched as it is alone."""
    weight_rows, vector = kernel.flags
    is_dx = kernel.source == "lora_backward_dx_group.cu"
    rows, columns, *_ = kernel.sizes
    how = {"tile": _tile(kernel), "layout": "padded" if vector else "odd", "transposed": weight_rows == is_dx}
    for i, shape in enumerate(_gemm_shapes(kernel)):
        of_group = [(N * (i % 2 + 1) + i, r) for N, r in group.GROUPS[1 + i % 3]]
        K = shape.wide if is_dx else shape.deep
        layers = group.make_layers(
            shape.M, K, of_group, Dtypes(kernel.type, shape.adapter), dropout_p=i % 3 / 4 if is_dx else 0.0
        )
        if is_dx:
            gate = torch.linspace(-1, 1, sum(r for _, r in of_group)) if i % 4 > 1 else None
            eager, exact = (group.eager_dx(layers, gate, dtype) for dtype in (None, F64))
            yield Case(
                lambda run, layers=layers, gate=gate: {"dx": group.backward_dx(run, layers, **how, gate=gate)},
                {"dx": eager},
                {"dx": exact},
            )
        else:

            def launch(run: Run, layers=layers) -> Results:
                return dict(zip("abcd", group.forwards(run, layers, **how, grouped=True), strict=False))

            eager, exact = ({n: group.eager_forward(a, t) for n, a in zip("abcd", layers, strict=False)} for t in (None, F64))
            yield Case(launch, eager, exact)
    if is_dx:

        def layer(p: float) -> compare.Case:
            return group.make_layers(rows, columns, ((8, 4),), Dtypes(kernel.type, F32), dropout_p=p)[0]

        for case in _at_thresholds(kernel, layer):
            eager, exact = ({"dx": group.eager_dx([case, case], None, t)} for t in (None, F64))
            yield Case(lambda run, case=case: {"dx": group.backward_dx(run, [case, case], **how)}, eager, exact)


# --- 4-bit weights ----------------------------------------------------------------------------------------------------


def _gemm_4bit(kernel: Kernel, device: Device) -> Iterator[Case]:
    """Bit for bit the dense kernel on the decoded weight."""
    is_dx = kernel.source == "qlora_backward_dx.cu"
    op, dense = (qdx, dx) if is_dx else (qforward, forward)
    rows, columns, _, _, _ = kernel.sizes
    how = {} if is_dx else {"tile": _tile(kernel)}

    def made(case: four_bit.QuantisedCase, mma: int = 0, **layouts) -> Case:
        low_rank = dense.down(case)
        with device.run() as run:
            expected = {"out": dense.launch(run, case, low_rank)}
        (M, K), N = case.x.shape, case.weight.shape[0]
        of_in = K // columns * M * N * 2 if is_dx else N // columns * M * K * 2
        counts = Counts(mma, M // rows * N * K // 2 + of_in) if mma else None
        return Case(lambda run: {"out": op.launch(run, case, low_rank, **layouts, **how)}, expected, expected, counts)

    whole = (2 * rows, 256, 128, 16) if is_dx else (2 * rows, 256, columns, 16)
    M, K, N, _ = whole
    yield made(
        four_bit.make_quantised_case(whole, Dtypes(kernel.type, kernel.type)),
        M // 16 * (N * K // 128 + (K if is_dx else N) // 8),
        layout="plain",
        layout_out="plain",
    )
    for i, (M, wide, deep, r, adapter) in enumerate(_gemm_shapes(kernel)):
        K, N = (128 * (i % 3 + 1), deep) if is_dx else (128 * (7 * i % 5 + 1), wide)
        settings = four_bit.SETTINGS[i % len(four_bit.SETTINGS)]
        options = {"bias": not is_dx and i % 4 != 3, "dropout_p": i % 3 / 4 if is_dx else 0.0}
        yield made(four_bit.make_quantised_case((M, K, N, r), Dtypes(kernel.type, adapter), settings, **options))
    if is_dx:

        def case_of(p: float) -> four_bit.QuantisedCase:
            return four_bit.make_quantised_case((rows, columns, 8, 4), Dtypes(kernel.type, F32), dropout_p=p)

        yield from map(made, _at_thresholds(kernel, case_of))


def _gemv(kernel: Kernel, _: Device) -> Iterator[Case]:
    """Every number of rows, one chunk and several per warp, every residue of the rows of W0 that a block has."""
    (tiles,), (nested, blocks_of_32) = kernel.sizes, kernel.flags
    sizes = [32] if blocks_of_32 else [64, 128, 4096]
    for i in range(16):
        N = (4096 if tiles == 2 else 0) + 5 * i % 32 + 1
        shape = (i % 8 + 1, 128 * (1, 2, 9, 17, 33)[i % (2 if tiles == 2 else 5)], N, 7 * i % 20 + 1)
        settings = (sizes[i % len(sizes)], nested, ("nf4", "fp4")[i % 2])
        case = four_bit.make_quantised_case(
            shape, Dtypes(kernel.type, (F32, kernel.type)[i // 2 % 2]), settings, bias=i % 3 > 0
        )
        eager, exact = compare.run(compare.eager_lora, case, backward=False), four_bit.exact_results(case, backward=False)
        S = forward.down(case)
        yield Case(lambda run, case=case, S=S: {"y": qforward.launch(run, case, S)}, eager, exact)


def _dequantize(kernel: Kernel, _: Device) -> Iterator[Case]:
    """Bit for bit the CPU's: every kind of row's end, nested scales and not, blocks within rows and across them."""
    by_chunks = kernel.name.startswith("dequantize_chunks")
    for i, K in enumerate((128, 384, 256, 1024, 640, 2176) if by_chunks else (1, 31, 64, 65, 97, 127, 300, 1023, 1100, 2049)):
        qweight = quantize_nf4(normal(7 + 5 * i, K, dtype=F32), *four_bit.SETTINGS[i % len(four_bit.SETTINGS)])
        expected = {"weight": qweight.dequantize(kernel.type)}
        yield Case(
            lambda run, qweight=qweight: {"weight": q4.dequantize(run, qweight, kernel.type)},
            expected,
            expected,
        )


def _quantize(kernel: Kernel, _: Device) -> Iterator[Case]:
    """Bit for bit the CPU's, with blocks of zeros and of the smallest numbers, and weights on the borders of two codes."""
    types = ["nf4", "fp4"] if kernel.name.startswith("absmax") else [("nf4", "fp4")[int(kernel.arguments[1][-1])]]
    for i, K in enumerate((1, 31, 64, 65, 97, 127, 128, 300, 384, 1023, 1100)):
        (blocksize, _, _), quant_type = four_bit.SETTINGS[i % len(four_bit.SETTINGS)], types[i % len(types)]
        weight = normal(3 + i, K, dtype=F32)
        flat = weight.view(-1)
        flat[blocksize : 2 * blocksize] = (0, torch.finfo(kernel.type).tiny / 4)[i % 2]
        code = reference.code_4bit(quant_type, weight.device).sort().values
        borders = (code[:-1] + code[1:]) / 2
        flat[-1:] = 1  # of the last block, what is divided by
        flat[-1 - len(borders) : -1] = borders[: max(0, len(flat) - 1)]
        weight = weight.to(kernel.type)
        expected = dict(zip(("codes", "absmax"), layout.quantize(weight, blocksize, quant_type), strict=True))

        def launch(run: Run, of=(weight, blocksize, quant_type)) -> Results:
            return dict(zip(("codes", "absmax"), q4.quantize(run, *of), strict=True))

        yield Case(launch, expected, expected)


# --- segments of rows -------------------------------------------------------------------------------------------------


def _down_segments(kernel: Kernel, _: Device) -> Iterator[Case]:
    dtypes, (most,), (vector,) = _skinny_dtypes(kernel), kernel.sizes, kernel.flags
    for i, batch in enumerate([*segments.BATCHES.values(), *segments.BATCHES.values()]):
        batch = [*((rows + 3 * i, r if most == 64 else r % (most + 1)) for rows, r in batch), (7, 100 if most == 64 else most)]
        M, K, dropout = sum(rows for rows, _ in batch), 128 * (i % 4) + 64 + 8 * i, Dropout(0.3) if i % 3 else None
        K, padding = (K, 0) if vector else (K + i % 8, 3)
        adapters, x = segments.make_adapters(batch, K, 8, dtypes.adapter), normal(M, K, dtype=dtypes.x)

        def launch(run: Run, of=(x, adapters, dropout, 1 + 3 * (i % 3), padding)) -> Results:
            return {"S": segments.down(run, *of)}

        def value(h: Tensor, adapters=adapters, M=M) -> Results:
            ranks = segments.columns(adapters)
            return {"S": segments.in_every_segment(adapters, M, ranks, lambda a: h[a.rows] @ a.A.to(h.dtype).T, h.dtype)}

        h, exact = (t if dropout is None else dropout.of(t) for t in (x.float(), x.double()))
        yield Case(launch, value(h), value(exact))


def _gemm_segments(kernel: Kernel, _: Device) -> Iterator[Case]:
    weight_rows, vector, is_dx = kernel.flags
    how = {"tile": _tile(kernel), "layout": "padded" if vector else "odd", "transposed": weight_rows == is_dx}
    batches = list(segments.BATCHES.values())
    for i, (_, wide, deep, _, adapter) in enumerate(_gemm_shapes(kernel)):
        batch = [(rows + i // 4, r) for rows, r in batches[i % 4]]
        M, (K, N) = sum(rows for rows, _ in batch), (wide, deep) if is_dx else (deep, wide)
        adapters, std = segments.make_adapters(batch, K, N, adapter), deep**-0.5
        weight = normal(N, K, dtype=F32, std=std).to(kernel.type)
        if is_dx:
            dropout = Dropout(0.25) if i % 2 else None
            of = (normal(M, N, dtype=kernel.type), weight, adapters, dropout)
            eager, exact = ({"dx": segments.dx_value(*of, t)} for t in (None, F64))
            yield Case(lambda run, of=of: {"dx": segments.backward_dx(run, *of, **how)}, eager, exact)
        else:
            x, bias = normal(M, K, dtype=kernel.type), normal(N, dtype=kernel.type) if i % 3 else None
            eager, exact = ({"y": segments.forward_value(x, weight, bias, adapters, t)} for t in (None, F64))
            base = None
            if vector and weight_rows and i % 5 == 4:
                base, bias = (x.double() @ weight.double().T).to(kernel.type), None
                eager, exact = ({"y": segments.forward_value(x, weight, bias, adapters, t)} for t in (None, F64))
            S = segments.poisoned_down(x, adapters)

            def launch(run: Run, of=(x, None if base is not None else weight, bias, S, adapters), base=base) -> Results:
                return {"y": segments.forward(run, *of, **how, base=base)}

            yield Case(launch, eager, exact)


_OPS: dict[str, Callable[[Kernel, Device], Iterator[Case]]] = {
    "dequantize_4bit.cu": _dequantize,
    "lora_backward_down.cu": _backward_down,
    "lora_backward_dx.cu": _gemm,
    "lora_backward_dx_group.cu": _group,
    "lora_backward_dx_segments.cu": _gemm_segments,
    "lora_backward_up.cu": _backward_up,
    "lora_down.cu": _down,
    "lora_down_segments.cu": _down_segments,
    "lora_forward.cu": _gemm,
    "lora_forward_group.cu": _group,
    "lora_forward_segments.cu": _gemm_segments,
    "qlora_backward_dx.cu": _gemm_4bit,
    "qlora_forward.cu": _gemm_4bit,
    "qlora_gemv.cu": _gemv,
    "quantize_4bit.cu": _quantize,
    "reduce.cu": _reduce,
}


def cases(kernel: Kernel, device: Device) -> list[Case]:
    torch.manual_seed(0)
    return list(_OPS[kernel.source](kernel, device))
