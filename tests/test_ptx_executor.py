"""The executor of PTX against definitions taken from the PTX ISA, one opcode family after the other.

No nvcc: the kernels are PTX written here.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from ptx.device import Device
from ptx_programs import COPY, elementwise, launch, warp

F32, U16 = np.float32, np.uint16


def edge_values(dtype: type) -> np.ndarray:
    if dtype is F32:
        return np.array([0.0, -0.0, 1.0, -2.5, 1e-40, 3e38, np.inf, -np.inf, np.nan, 0.49999997, 1e10, -1e10], F32)
    info = np.iinfo(dtype)
    return np.array([0, 1, 3, 31, 200, info.max, info.min, info.max // 3, info.max - 5], dtype)


def crossed(dtypes: Sequence[type]) -> list[np.ndarray]:
    """Every combination of the types' edge values, as many as a block has threads, and random ones."""
    rows = list(itertools.product(*(edge_values(d) for d in dtypes)))
    chosen = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:900]]
    return [np.array([row[i] for row in chosen], d) for i, d in enumerate(dtypes)]


def exact(f: Callable[..., object]) -> Callable[..., list]:
    """A function of Python's integers, lane by lane."""
    return lambda *sources: [f(*(int(v) for v in lane)) for lane in zip(*sources, strict=True)]


def wrapped(values: object, dtype: type) -> np.ndarray:
    if np.issubdtype(dtype, np.integer):
        bits = 8 * np.dtype(dtype).itemsize
        return np.array([int(v) & (1 << bits) - 1 for v in values], f"u{bits // 8}").view(dtype)  # type: ignore[attr-defined]
    return np.asarray(values, dtype)


def bfe(bits: int, signed: bool) -> Callable[[int, int, int], int]:
    def extract(a: int, position: int, length: int) -> int:
        position, length = position & 255, length & 255
        sign = a >> min(position + length - 1, bits - 1) & 1 if signed and length else 0
        return sum((a >> position + i & 1 if i < length and position + i < bits else sign) << i for i in range(bits))

    return extract


def bfi(a: int, b: int, position: int, length: int) -> int:
    for i in range(length & 255):
        if (position & 255) + i < 32:
            b = b & ~(1 << (position & 255) + i) | (a >> i & 1) << (position & 255) + i
    return b


def prmt(a: int, b: int, selector: int) -> int:
    source = (b << 32 | a).to_bytes(8, "little")
    nibbles = [selector >> 4 * i & 15 for i in range(4)]
    out = [source[n & 7] if n < 8 else 255 * (source[n & 7] >> 7) for n in nibbles]
    return int.from_bytes(bytes(out), "little")


def lop3(a: int, b: int, c: int) -> int:
    return sum((0x6A >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32))


def quotient(a: int, b: int) -> int:
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def remainder(a: int, b: int) -> int:
    return a if b == 0 else a - quotient(a, b) * b


def saturate(x: np.ndarray, dtype: type) -> np.ndarray:
    info = np.iinfo(dtype)
    return np.array([0 if np.isnan(v) else int(min(max(float(v), info.min), info.max)) for v in x.astype(np.float64)], dtype)


def bf16(x: np.ndarray) -> np.ndarray:
    bits = torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(U16)
    return np.where(np.isnan(x), U16(0x7FFF), bits)


S32, U32, S64, U64, S16, F16 = np.int32, np.uint32, np.int64, np.uint64, np.int16, np.float16

# instruction, sources, destination, definition
INTEGER = [
    ("add.s32 %d, %a, %b;", (S32, S32), S32, exact(lambda a, b: a + b)),
    ("add.s64 %d, %a, %b;", (S64, S64), S64, exact(lambda a, b: a + b)),
    ("sub.s16 %d, %a, %b;", (S16, S16), S16, exact(lambda a, b: a - b)),
    ("mul.lo.s32 %d, %a, %b;", (S32, S32), S32, exact(lambda a, b: a * b)),
    ("mul.lo.s64 %d, %a, %b;", (S64, S64), S64, exact(lambda a, b: a * b)),
    ("mul.hi.u32 %d, %a, %b;", (U32, U32), U32, exact(lambda a, b: a * b >> 32)),
    ("mul.hi.s64 %d, %a, %b;", (S64, S64), S64, exact(lambda a, b: a * b >> 64)),
    ("mul.wide.s32 %d, %a, %b;", (S32, S32), S64, exact(lambda a, b: a * b)),
    ("mul.wide.u16 %d, %a, %b;", (U16, U16), U32, exact(lambda a, b: a * b)),
    ("mad.lo.s32 %d, %a, %b, %c;", (S32, S32, S32), S32, exact(lambda a, b, c: a * b + c)),
    ("mad.wide.u32 %d, %a, %b, %c;", (U32, U32, U64), U64, exact(lambda a, b, c: a * b + c)),
    ("div.s32 %d, %a, %b;", (S32, S32), S32, exact(quotient)),
    ("div.u32 %d, %a, %b;", (U32, U32), U32, exact(quotient)),
    ("rem.s64 %d, %a, %b;", (S64, S64), S64, exact(remainder)),
    ("min.s32 %d, %a, %b;", (S32, S32), S32, exact(min)),
    ("max.u32 %d, %a, %b;", (U32, U32), U32, exact(max)),
    ("neg.s32 %d, %a;", (S32,), S32, exact(lambda a: -a)),
    ("abs.s32 %d, %a;", (S32,), S32, exact(abs)),
    ("and.b32 %d, %a, %b;", (U32, U32), U32, exact(lambda a, b: a & b)),
    ("or.b64 %d, %a, %b;", (U64, U64), U64, exact(lambda a, b: a | b)),
    ("xor.b16 %d, %a, %b;", (U16, U16), U16, exact(lambda a, b: a ^ b)),
    ("not.b32 %d, %a;", (U32,), U32, exact(lambda a: ~a)),
    ("shl.b32 %d, %a, %b;", (U32, U32), U32, exact(lambda a, b: a << b if b < 32 else 0)),
    ("shr.s32 %d, %a, %b;", (S32, U32), S32, exact(lambda a, b: a >> min(b, 31))),
    ("shr.u64 %d, %a, %b;", (U64, U32), U64, exact(lambda a, b: a >> b if b < 64 else 0)),
    ("shf.l.wrap.b32 %d, %a, %b, %c;", (U32, U32, U32), U32, exact(lambda a, b, c: (b << 32 | a) << (c & 31) >> 32)),
    ("shf.r.wrap.b32 %d, %a, %b, %c;", (U32, U32, U32), U32, exact(lambda a, b, c: (b << 32 | a) >> (c & 31))),
    ("bfi.b32 %d, %a, %b, %c, %e;", (U32, U32, U32, U32), U32, exact(bfi)),
    ("bfe.u32 %d, %a, %b, %c;", (U32, U32, U32), U32, exact(bfe(32, False))),
    ("bfe.s32 %d, %a, %b, %c;", (S32, U32, U32), S32, exact(bfe(32, True))),
    ("prmt.b32 %d, %a, %b, %c;", (U32, U32, U32), U32, exact(prmt)),
    ("lop3.b32 %d, %a, %b, %c, 0x6a;", (U32, U32, U32), U32, exact(lop3)),
    ("popc.b32 %d, %a;", (U32,), U32, exact(lambda a: bin(a).count("1"))),
    ("clz.b64 %d, %a;", (U64,), U32, exact(lambda a: 64 - a.bit_length())),
]
MOVES = [
    ("mov.b32 %d, %a;", (U32,), U32, exact(lambda a: a)),
    ("mov.b32 %d, {%a, %b};", (U16, U16), U32, exact(lambda a, b: b << 16 | a)),
    ("mov.b64 {%r1, %d}, %a;", (U64,), U32, exact(lambda a: a >> 32)),
    ("setp.lt.s32 %p1, %a, %b; selp.b32 %d, %a, %b, %p1;", (S32, S32), S32, exact(min)),
    ("setp.hi.u32 %p1, %a, %b; selp.b32 %d, 1, 0, %p1;", (U32, U32), U32, exact(lambda a, b: a > b)),
    (
        "setp.eq.s32 %p2, %a, 0; setp.lt.or.s32 %p1|%p3, %a, %b, !%p2; selp.b32 %r1, 1, 0, %p1; selp.b32 %r2, 2, 0, %p3;"
        "or.b32 %d, %r1, %r2;",
        (S32, S32),
        S32,
        exact(lambda a, b: (a < b or a != 0) + 2 * (a >= b or a != 0)),
    ),
    ("setp.ne.f32 %p1, %a, %b; selp.b32 %d, 1, 0, %p1;", (F32, F32), U32, lambda a, b: (a < b) | (a > b)),
    ("setp.neu.f32 %p1, %a, %b; selp.b32 %d, 1, 0, %p1;", (F32, F32), U32, lambda a, b: a != b),
    ("setp.ltu.f32 %p1, %a, %b; selp.b32 %d, 1, 0, %p1;", (F32, F32), U32, lambda a, b: ~(a >= b)),
    ("setp.nan.f32 %p1, %a, %b; not.pred %p2, %p1; selp.b32 %d, 1, 0, %p2;", (F32, F32), U32, lambda a, b: (a == a) & (b == b)),
    (
        "setp.gt.s32 %p1, %a, 5; setp.gt.s32 %p2, %b, 5; xor.pred %p3, %p1, %p2; mov.u32 %d, 7; @!%p3 mov.u32 %d, 9;",
        (S32, S32),
        S32,
        exact(lambda a, b: 7 if (a > 5) != (b > 5) else 9),
    ),
]
FLOAT = [
    ("add.f32 %d, %a, %b;", (F32, F32), F32, lambda a, b: a + b),
    ("sub.rn.f32 %d, %a, %b;", (F32, F32), F32, lambda a, b: a - b),
    ("mul.f32 %d, %a, %b;", (F32, F32), F32, lambda a, b: a * b),
    ("mul.ftz.f32 %d, %a, %b;", (F32, F32), F32, lambda a, b: flushed(flushed(a) * flushed(b))),
    ("fma.rn.f32 %d, %a, %b, %c;", (F32, F32, F32), F32, lambda a, b, c: fused(a, b, c)),
    ("div.rn.f32 %d, %a, %b;", (F32, F32), F32, lambda a, b: a / b),
    ("min.f32 %d, %a, %b;", (F32, F32), F32, lambda a, b: np.where(a == b, np.where(np.signbit(a), a, b), np.fmin(a, b))),
    ("max.f32 %d, %a, %b;", (F32, F32), F32, lambda a, b: np.where(a == b, np.where(np.signbit(a), b, a), np.fmax(a, b))),
    ("neg.f32 %d, %a;", (F32,), F32, lambda a: -a),
    ("abs.f32 %d, %a;", (F32,), F32, np.abs),
    ("copysign.f32 %d, %a, %b;", (F32, F32), F32, lambda a, b: np.copysign(b, a)),
    ("sqrt.rn.f32 %d, %a;", (F32,), F32, np.sqrt),
    ("rcp.rn.f32 %d, %a;", (F32,), F32, lambda a: F32(1) / a),
    ("rsqrt.approx.f32 %d, %a;", (F32,), F32, lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(F32)),
    ("ex2.approx.f32 %d, %a;", (F32,), F32, lambda a: np.exp2(a.astype(np.float64)).astype(F32)),
    ("lg2.approx.f32 %d, %a;", (F32,), F32, lambda a: np.log2(a.astype(np.float64)).astype(F32)),
]
CONVERSIONS = [
    ("cvt.u16.u32 %d, %a;", (U32,), U16, exact(lambda a: a)),
    ("cvt.u32.u64 %d, %a;", (U64,), U32, exact(lambda a: a)),
    ("cvt.s64.s32 %d, %a;", (S32,), S64, exact(lambda a: a)),
    ("cvt.u64.u32 %d, %a;", (U32,), U64, exact(lambda a: a)),
    ("cvt.s32.s8 %d, %a;", (U32,), S32, exact(lambda a: (a & 255) - 2 * (a & 128))),
    ("cvt.sat.u8.s32 %h1, %a; cvt.u32.u16 %d, %h1;", (S32,), U32, exact(lambda a: min(max(a, 0), 255))),
    ("cvt.rn.f32.s32 %d, %a;", (S32,), F32, lambda a: a.astype(F32)),
    ("cvt.rn.f32.u64 %d, %a;", (U64,), F32, lambda a: a.astype(F32)),
    ("cvt.rzi.s32.f32 %d, %a;", (F32,), S32, lambda a: saturate(np.trunc(a), S32)),
    ("cvt.rni.u32.f32 %d, %a;", (F32,), U32, lambda a: saturate(np.rint(a), U32)),
    ("cvt.rmi.f32.f32 %d, %a;", (F32,), F32, np.floor),
    ("cvt.rpi.f32.f32 %d, %a;", (F32,), F32, np.ceil),
    ("cvt.sat.f32.f32 %d, %a;", (F32,), F32, lambda a: np.where(np.isnan(a), F32(0), np.clip(a, F32(0), F32(1)))),
    ("cvt.f32.f16 %d, %a;", (F16,), F32, lambda a: a.astype(F32)),
    ("cvt.rn.f16.f32 %d, %a;", (F32,), F16, lambda a: a.astype(F16)),
    ("cvt.rn.bf16.f32 %d, %a;", (F32,), U16, bf16),
    ("cvt.rn.bf16x2.f32 %d, %a, %b;", (F32, F32), U32, lambda a, b: bf16(a).astype(U32) << 16 | bf16(b)),
]


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.finfo(F32).tiny, np.copysign(F32(0), x), x)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The product is exact in fp64; for these values its sum, rounded to fp64 first, rounds to the same fp32."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(F32)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("instructions", "sources", "out", "definition"),
    [*INTEGER, *MOVES, *FLOAT, *CONVERSIONS],
    ids=lambda value: value.split(" %")[0] if isinstance(value, str) else "",
)
def test_elementwise(
    executor: Device, instructions: str, sources: Sequence[type], out: type, definition: Callable[..., object]
) -> None:
    values = crossed([edge if edge is not F16 else U16 for edge in sources])
    values = [v.view(F16) if edge is F16 else v for v, edge in zip(values, sources, strict=True)]
    got = elementwise(executor, instructions, values, np.dtype(out))
    with np.errstate(all="ignore"):
        expected = wrapped(definition(*values), out)
    np.testing.assert_array_equal(got, expected)
    if np.issubdtype(out, np.floating):
        numbers = ~np.isnan(got)
        np.testing.assert_array_equal(np.signbit(got)[numbers], np.signbit(expected)[numbers])


@pytest.mark.parametrize(
    ("mode", "source"),
    [
        ("bfly.b32 %r2|%p1, %r1, 5, 31", lambda lane: lane ^ 5),
        ("up.b32 %r2|%p1, %r1, 3, 0", lambda lane: lane - 3 if lane >= 3 else lane),
        ("down.b32 %r2|%p1, %r1, 3, 31", lambda lane: lane + 3 if lane + 3 <= 31 else lane),
        ("idx.b32 %r2|%p1, %r1, 2, 0x181f", lambda lane: lane // 8 * 8 + 2),
        ("down.b32 %r2|%p1, %r1, 1, 0x181f", lambda lane: lane + 1 if lane % 8 < 7 else lane),
    ],
)
def test_shuffle(executor: Device, mode: str, source: Callable[[int], int]) -> None:
    x = torch.arange(32, dtype=torch.int32) * 7
    got = warp(executor, f"shfl.sync.{mode}, 0xffffffff; st.global.b32 [%rd2], %r2;", x, x)
    assert got.tolist() == [7 * source(lane) for lane in range(32)]


def test_vote(executor: Device) -> None:
    x = torch.arange(32, dtype=torch.int32)
    body = "setp.gt.u32 %p1, %r1, 20; vote.sync.ballot.b32 %r2, %p1, 0xffffffff; st.global.b32 [%rd2], %r2;"
    assert set(warp(executor, body, x, x).tolist()) == {sum(1 << i for i in range(21, 32)) - (1 << 32)}


def test_divergence_meets_again(executor: Device) -> None:
    """A loop that each lane leaves after its own number of rounds, with a branch in it; then the whole warp is back."""
    x = torch.arange(32, dtype=torch.int32)
    body = """
        mov.u32 %r2, 0; mov.u32 %r3, 0;
        loop: setp.ge.u32 %p1, %r2, %r1;
        @%p1 bra done;
        and.b32 %r4, %r2, 1; setp.eq.u32 %p2, %r4, 0;
        @%p2 bra even;
        add.u32 %r3, %r3, 10;
        bra.uni next;
        even: add.u32 %r3, %r3, 1;
        next: add.u32 %r2, %r2, 1;
        bra.uni loop;
        done: activemask.b32 %r5; setp.ne.u32 %p3, %r5, 0xffffffff;
        @%p3 mov.u32 %r3, 0xdead;
        st.global.b32 [%rd2], %r3;"""
    assert warp(executor, body, x, x).tolist() == [(i + 1) // 2 + 10 * (i // 2) for i in range(32)]


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix(executor: Device, trans: str) -> None:
    x = torch.arange(4 * 64, dtype=torch.int16)
    body = f"""
        {COPY} cp.async.cg.shared.global [%r2], [%rd3], 16; cp.async.wait_all; bar.warp.sync 0xffffffff;
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r3, %r4, %r5, %r6}}, [%r2];
        st.global.v4.b32 [%rd2], {{%r3, %r4, %r5, %r6}};"""
    with executor.run() as run:
        out = torch.empty(32, 4, 2, dtype=torch.int16)
        run.register(x)
        launch(executor, run, "mad.wide.u32 %rd2, %tid, 16, %y;" + body, {"x": x, "y": out}, shared_bytes=512)
    matrices = x.view(4, 8, 8)
    matrices = matrices.mT if trans else matrices
    lanes = matrices.reshape(4, 8, 4, 2).permute(1, 2, 0, 3).reshape(32, 4, 2)  # row, pair of columns, matrix, column
    assert torch.equal(out, lanes)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_mma(executor: Device, name: str, dtype: torch.dtype) -> None:
    A, B, C = (
        torch.randint(-8, 9, shape).to(t) for shape, t in (((16, 16), dtype), ((16, 8), dtype), ((16, 8), torch.float32))
    )
    lane = torch.arange(32)
    row, col = lane // 4, 2 * (lane % 4)
    pair = torch.arange(2)
    a = torch.stack([A[row[:, None] + r, col[:, None] + c + pair] for r, c in ((0, 0), (8, 0), (0, 8), (8, 8))], 1)
    b = torch.stack([B[col[:, None] + k + pair, row[:, None]] for k in (0, 8)], 1)
    c = torch.cat([C[row[:, None] + r, col[:, None] + pair] for r in (0, 8)], 1)
    body = f"""
        mad.wide.u32 %rd1, %tid, 16, %a; ld.global.v4.b32 {{%r0, %r1, %r2, %r3}}, [%rd1];
        mad.wide.u32 %rd1, %tid, 8, %b; ld.global.v2.b32 {{%r4, %r5}}, [%rd1];
        mad.wide.u32 %rd1, %tid, 16, %c; ld.global.v4.b32 {{%f0, %f1, %f2, %f3}}, [%rd1];
        mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32
            {{%f4, %f5, %f6, %f7}}, {{%r0, %r1, %r2, %r3}}, {{%r4, %r5}}, {{%f0, %f1, %f2, %f3}};
        mad.wide.u32 %rd1, %tid, 16, %d; st.global.v4.b32 [%rd1], {{%f4, %f5, %f6, %f7}};"""
    with executor.run() as run:
        d = torch.empty(32, 4)
        arguments = {"a": a.contiguous(), "b": b.contiguous(), "c": c.contiguous(), "d": d}
        for t in arguments.values():
            run.register(t, initialised=t is not d)
        launch(executor, run, body, arguments)
        assert run.counters.mma_count == 1
    D = torch.empty(16, 8)
    for i, r in enumerate((0, 8)):
        D[row[:, None] + r, col[:, None] + pair] = d[:, 2 * i : 2 * i + 2]
    assert torch.equal(D, A.float() @ B.float() + C)


def test_unknown_instructions_are_errors(executor: Device) -> None:
    with pytest.raises(RuntimeError, match=r"PTX line 16.*not implemented.*frobnicate"), executor.run() as run:
        launch(executor, run, "frobnicate.b32 %r1, %r2;", {"x": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"modifier \.rz"), executor.run() as run:
        launch(executor, run, "add.rz.f32 %f1, %f2, %f3;", {"x": torch.zeros(1)})
