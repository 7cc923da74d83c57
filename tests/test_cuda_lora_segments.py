"""Batches that mix adapters of different ranks, on a device, by compare.py's policy: a segment of rows as if it were alone."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from compare import BF16, F16, F32, Dtypes, assert_within_bound, error
from cuda_structs import TILES, LoraBackwardDx, LoraForward, call, empty, laid_out, matrix
from ptx.build import REPOSITORY
from ptx.device import Device, Run
from skinny import CODES, Dropout, LoraDown, device_dropout, lora_down, normal
from torch import Tensor

pytestmark = pytest.mark.cuda

DTYPES = [Dtypes(t, a) for t in (BF16, F16) for a in (t, F32)]
# Rows and rank of every segment: one adapter; around tiles of 64 rows; a tile that meets many; empty segments at both ends and
# between, rows without an adapter, ranks beyond a block's 64.
BATCHES = {
    "one": [(70, 16)],
    "around tiles": [(63, 4), (65, 16), (1, 3), (64, 8), (2, 1)],
    "row by row": [(1, 1 + 5 * i % 17) for i in range(33)],
    "gaps": [(0, 7), (5, 0), (17, 100), (0, 3), (0, 0), (130, 20), (9, 0), (1, 33), (0, 5)],
}
batches = pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)


class SegmentAdapter(ctypes.Structure):
    _fields_ = [
        ("lora_A", ctypes.c_void_p),
        ("lora_B", ctypes.c_void_p),
        ("rank", ctypes.c_int32),
        ("scaling", ctypes.c_float),
    ]


class Segments(ctypes.Structure):
    _fields_ = [
        ("count", ctypes.c_int),
        ("first_row", ctypes.c_void_p),
        ("adapters", ctypes.c_void_p),
        ("aligned", ctypes.c_bool),
    ]


@pytest.fixture(scope="module")
def segmented(nvcc: str) -> Device:
    names = ("lora_down", "lora_down_segments", "lora_forward", "lora_forward_segments", "lora_backward_dx_segments", "reduce")
    return Device([REPOSITORY / "csrc" / "cuda" / f"{name}.cu" for name in names])


@dataclass
class Adapter:
    rows: slice
    A: Tensor  # (r, K)
    B: Tensor  # (N, r)
    scaling: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]


def make_adapters(batch: Sequence[tuple[int, int]], K: int, N: int, dtype: torch.dtype) -> list[Adapter]:
    adapters, row = [], 0
    for i, (rows, r) in enumerate(batch):
        A, B = normal(r, K, dtype=dtype, std=K**-0.5, draw=i), normal(N, r, dtype=dtype, std=max(r, 1) ** -0.5, draw=i)
        adapters.append(Adapter(slice(row, row + rows), A, B, 0.75 + i % 3 / 4))
        row += rows
    return adapters


def on_device(run: Run, adapters: list[Adapter]) -> tuple[Segments, list[Tensor]]:
    """And the tensors that are to be kept until the launch."""
    first_row = torch.tensor([0] + [a.rows.stop for a in adapters], dtype=torch.int32)
    matrices = [(a.A.clone(), a.B.clone()) for a in adapters]
    structs = (SegmentAdapter * len(adapters))(
        *(
            SegmentAdapter(A.data_ptr() or None, B.data_ptr() or None, a.rank, a.scaling)
            for a, (A, B) in zip(adapters, matrices, strict=True)
        )
    )
    listed = torch.frombuffer(bytearray(bytes(structs)), dtype=torch.uint8).clone()
    kept = [first_row, listed, *(t for pair in matrices for t in pair)]
    for t in kept:
        run.register(t, readonly=True)
    return Segments(
        len(adapters), first_row.data_ptr(), listed.data_ptr(), all(A.data_ptr() % 16 == 0 for A, _ in matrices)
    ), kept


def columns(adapters: list[Adapter]) -> int:
    return max(1, max(a.rank for a in adapters))


def in_every_segment(
    adapters: list[Adapter], M: int, width: int, of: Callable[[Adapter], Tensor], dtype: torch.dtype
) -> Tensor:
    """(M, width), the segments' rows from `of`, zero where it gives fewer columns."""
    whole = torch.zeros(M, width, dtype=dtype)
    for a in adapters:
        part = of(a)
        whole[a.rows, : part.shape[1]] = part
    return whole


# --- S = drop(x) Aᵀ ---------------------------------------------------------------------------------------------------


def down(
    run: Run, x: Tensor, adapters: list[Adapter], dropout: Dropout | None = None, sm_count: int = 1, padding: int = 0
) -> Tensor:
    """`padding` elements between x's rows, which also moves adapters off 16 bytes."""
    (M, K), r = x.shape, columns(adapters)
    x = torch.nn.functional.pad(x, (0, padding))[:, :K]
    segments, kept = on_device(run, adapters)
    segments.aligned = segments.aligned and padding == 0
    S = torch.empty(M, r)
    drop, seed = device_dropout(dropout)
    dtypes = CODES[x.dtype], CODES[adapters[0].A.dtype]
    op = LoraDown(M, K, r, x.data_ptr(), x.stride(0), dtypes[0], None, dtypes[1], drop, S.data_ptr(), None, sm_count)
    run.library.lora_ops_lora_down_segments_workspace_bytes.restype = ctypes.c_int64
    size = run.library.lora_ops_lora_down_segments_workspace_bytes(ctypes.byref(op), ctypes.byref(segments))
    workspace = torch.empty(size // 4)
    op.workspace = workspace.data_ptr()
    call(run, "lora_down_segments", op, segments)
    del kept, seed
    return S


@batches
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_down(segmented: Device, dtypes: Dtypes, batch: list[tuple[int, int]]) -> None:
    M = sum(rows for rows, _ in batch)
    for i, (K, sm_count, padding, p) in enumerate([(136, 1, 0, 0.0), (264, 8, 0, 0.3), (139, 1, 3, 0.3)]):
        adapters, x = make_adapters(batch, K, 8, dtypes.adapter), normal(M, K, dtype=dtypes.x)
        dropout = Dropout(p) if p else None
        with segmented.run(arch=(80, 90)[i % 2], reverse=i == 1) as run:
            S = down(run, x, adapters, dropout, sm_count, padding)
        h, exact = (x.float(), x.double()) if dropout is None else (dropout.of(x.float()), dropout.of(x.double()))
        r = columns(adapters)
        eager = in_every_segment(adapters, M, r, lambda a: h[a.rows] @ a.A.float().T, F32)  # noqa: B023
        oracle = in_every_segment(adapters, M, r, lambda a: exact[a.rows] @ a.A.double().T, torch.float64)  # noqa: B023
        assert_within_bound({"S": error(S, eager, oracle)})
        for a in adapters:
            assert S[a.rows, a.rank :].eq(0).all()


def test_down_is_the_plain_op_s(segmented: Device) -> None:
    """Bit for bit where K is not split, in every segment; and a row's infinities stay in it."""
    batch, K = [(3, 5), (70, 16), (20, 9)], 128
    adapters, x = make_adapters(batch, K, 8, F32), normal(93, K, dtype=BF16)
    x[80] = torch.inf
    with segmented.run() as run:
        S = down(run, x, adapters)
        for a in adapters:
            plain = lora_down(run.library, x[a.rows].clone(), a.A.clone())
            assert torch.equal(S[a.rows, : a.rank].nan_to_num(7), plain.nan_to_num(7))
    assert S.isfinite().all(1).tolist() == [i != 80 for i in range(93)]


def test_down_s_traffic(segmented: Device) -> None:
    """x is read once, and a segment's adapter once per 64 of its rows."""
    batch, K = [(1, 16), (100, 16), (0, 16), (27, 8)], 256
    adapters, x = make_adapters(batch, K, 8, BF16), normal(128, K, dtype=BF16)
    with segmented.run() as run:
        down(run, x, adapters)
    tiles = [-(-rows // 64) for rows, _ in batch]
    copied = run.counters.matching("cp.async", entry="lora_down_segments_kernel").total("global_bytes")
    assert copied == x.nbytes + sum(n * a.A.nbytes for n, a in zip(tiles, adapters, strict=True))


# --- y = x W0ᵀ + scaling_i · S B_iᵀ + bias ----------------------------------------------------------------------------


def forward(
    run: Run,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    S: Tensor,
    adapters: list[Adapter],
    *,
    tile: str = "automatic",
    layout: str = "plain",
    layout_out: str | None = None,
    transposed: bool = False,
    base: Tensor | None = None,
) -> Tensor:
    (M, K), N = x.shape, adapters[0].B.shape[0]
    segments, kept = on_device(run, adapters)
    x, S = laid_out(x, layout), S.clone()
    weight = None if weight is None else laid_out(weight, layout, transposed, apart=8)
    bias = None if bias is None else bias.clone()
    out = layout_out or layout
    y = empty(M, N, x.dtype, out) if base is None else laid_out(base, out)
    for t in (x, weight, bias, S):
        if t is not None:
            run.register(t, readonly=True)
    lora_B = matrix(adapters[0].B)
    lora_B.data = None
    op = LoraForward(
        M, K, N, S.shape[1], matrix(x), matrix(weight), lora_B, matrix(bias), matrix(y), S.data_ptr(), 1.0, TILES[tile]
    )
    call(run, "lora_forward_segments", op, segments)
    del kept
    return y


def forward_value(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: list[Adapter], dtype: torch.dtype | None = None
) -> Tensor:
    """As eager has it, or in dtype."""

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype or t.dtype)

    y = torch.nn.functional.linear(cast(x), cast(weight), None if bias is None else cast(bias))

    def low_rank(a: Adapter) -> Tensor:
        return cast(x)[a.rows].to(cast(a.A).dtype) @ cast(a.A).T @ cast(a.B).T * a.scaling

    return (y + in_every_segment(adapters, *y.shape, low_rank, cast(adapters[0].A).dtype)).to(y.dtype)


def assert_right_forward(y: Tensor, *of: Tensor | list[Adapter] | None) -> None:
    assert_within_bound({"y": error(y, forward_value(*of), forward_value(*of, torch.float64))})


def poisoned_down(x: Tensor, adapters: list[Adapter]) -> Tensor:
    """S, and NaN beyond a segment's rank: nobody reads that."""
    S = torch.full((x.shape[0], columns(adapters)), torch.nan)
    for a in adapters:
        S[a.rows, : a.rank] = (x[a.rows].double() @ a.A.double().T).float()
    return S


@batches
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_forward(segmented: Device, dtypes: Dtypes, batch: list[tuple[int, int]]) -> None:
    M, K = sum(rows for rows, _ in batch), 40
    for i, (tile, N) in enumerate([("small", 72), ("medium", 136), ("large", 136)]):
        adapters, x, weight = (
            make_adapters(batch, K, N, dtypes.adapter),
            normal(M, K, dtype=dtypes.x),
            normal(N, K, dtype=dtypes.x),
        )
        weight, bias = weight * K**-0.5, normal(N, dtype=dtypes.x) if i else None
        with segmented.run(arch=(80, 90)[i % 2], reverse=i == 1) as run:
            y = forward(run, x, weight, bias, poisoned_down(x, adapters), adapters, tile=tile, transposed=i == 2)
        assert_right_forward(y, x, weight, bias, adapters)
        assert run.counters.bank_conflicts == []


@batches
def test_forward_of_odd_layouts_and_of_base_product_in_y(segmented: Device, batch: list[tuple[int, int]]) -> None:
    M, K, N = sum(rows for rows, _ in batch), 41, 71
    adapters, x, weight = make_adapters(batch, K, N, F32), normal(M, K, dtype=BF16), normal(N, K, dtype=BF16) * K**-0.5
    for base in (None, (x.double() @ weight.double().T).to(BF16)):
        with segmented.run() as run:
            given = None if base is not None else weight
            y = forward(run, x, given, None, poisoned_down(x, adapters), adapters, layout="odd", base=base)
        assert_right_forward(y, x, weight, None, adapters)


def test_forward_reads_the_weight_once(segmented: Device) -> None:
    """Whatever the segments: copies and products of the main product are those of a batch without adapters."""
    M, K, N = 64, 64, 64
    x, weight = normal(M, K, dtype=BF16), normal(N, K, dtype=BF16)
    for batch in ([(64, 0)], [(64, 16)], [(2, 16)] * 32):
        adapters = make_adapters(batch, K, N, BF16)
        with segmented.run() as run:
            forward(run, x, weight, None, poisoned_down(x, adapters), adapters, tile="medium")
        assert run.counters.matching("cp.async").total("global_bytes") == x.nbytes + weight.nbytes
        main, low_rank = M // 16 * (N // 8) * (K // 16), M // 16 * (N // 8)
        warps_meet = {0: 0, 1: 1, 32: 16}[0 if batch[0][1] == 0 else len(batch)]
        assert run.counters.mma_count == main + low_rank * warps_meet


# --- dx = dy W0 + drop'(dS A_i) ---------------------------------------------------------------------------------------


def backward_dx(
    run: Run,
    dy: Tensor,
    weight: Tensor | None,
    adapters: list[Adapter],
    dropout: Dropout | None,
    *,
    tile: str = "automatic",
    layout: str = "plain",
    layout_out: str | None = None,
    transposed: bool = False,
    base: Tensor | None = None,
) -> Tensor:
    """With dS of exact products, and NaN beyond a segment's rank."""
    (M, N), K = dy.shape, adapters[0].A.shape[1]
    dS = torch.full((M, columns(adapters)), torch.nan)
    for a in adapters:
        dS[a.rows, : a.rank] = (a.scaling * (dy[a.rows].double() @ a.B.double())).float()
    segments, kept = on_device(run, adapters)
    drop, seed = device_dropout(dropout)
    out = layout_out or layout
    dx = empty(M, K, dy.dtype, out) if base is None else laid_out(base, out)
    lora_A, dy = matrix(adapters[0].A), laid_out(dy, layout)
    weight = None if weight is None else laid_out(weight, layout, transposed, apart=8)
    for t in (dy, weight, dS):
        if t is not None:
            run.register(t, readonly=True)
    lora_A.data = None
    op = LoraBackwardDx(M, K, N, dS.shape[1], matrix(dy), matrix(weight), lora_A, matrix(dx), dS.data_ptr(), drop, TILES[tile])
    call(run, "lora_backward_dx_segments", op, segments)
    del kept, seed
    return dx


def dx_value(
    dy: Tensor, weight: Tensor, adapters: list[Adapter], dropout: Dropout | None, dtype: torch.dtype | None = None
) -> Tensor:
    """As eager has it, or in dtype."""
    (M, _), K = dy.shape, weight.shape[1]
    keep = torch.ones(M, K) if dropout is None else dropout.keep(M, K).double() / (1 - dropout.p)

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype or t.dtype)

    def low_rank(a: Adapter) -> Tensor:
        wide = cast(dy)[a.rows].to(cast(a.B).dtype)
        return (wide * a.scaling) @ cast(a.B) @ cast(a.A) * keep[a.rows].to(wide.dtype)

    low_ranks = in_every_segment(adapters, M, K, low_rank, cast(adapters[0].A).dtype)
    return cast(dy) @ cast(weight) + low_ranks.to(cast(dy).dtype)


@batches
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_backward_dx(segmented: Device, dtypes: Dtypes, batch: list[tuple[int, int]]) -> None:
    M, N = sum(rows for rows, _ in batch), 40
    for i, (tile, K) in enumerate([("small", 72), ("medium", 136), ("large", 136)]):
        adapters, dy, weight = (
            make_adapters(batch, K, N, dtypes.adapter),
            normal(M, N, dtype=dtypes.x),
            normal(N, K, dtype=dtypes.x),
        )
        weight, dropout = weight * N**-0.5, Dropout(0.25) if i % 2 == 0 else None
        with segmented.run(arch=(80, 90)[i % 2], reverse=i == 1) as run:
            dx = backward_dx(run, dy, weight, adapters, dropout, tile=tile)
        of = (dy, weight, adapters, dropout)
        assert_within_bound({"dx": error(dx, dx_value(*of), dx_value(*of, torch.float64))})


def test_refuses_gate_and_output_scale(segmented: Device) -> None:
    adapters, x, weight = make_adapters([(8, 4)], 16, 8, BF16), normal(8, 16, dtype=BF16), normal(8, 16, dtype=BF16)
    for name, value in (("gate", torch.ones(4).data_ptr()), ("m", matrix(torch.ones(8)))):
        with segmented.run() as run:
            segments, kept = on_device(run, adapters)
            lora_B, y = matrix(adapters[0].B), torch.zeros(8, 8, dtype=BF16)
            op = LoraForward(8, 16, 8, 4, matrix(x), matrix(weight), lora_B, matrix(None), matrix(y), x.data_ptr(), 1.0, 0)
            setattr(op, name, value)
            with pytest.raises(RuntimeError, match="neither a gate nor an output scale"):
                call(run, "lora_forward_segments", op, segments)
            del kept
        assert y.eq(0).all()
