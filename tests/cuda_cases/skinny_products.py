"""Cases of lora_down, lora_backward_up, lora_backward_down and the reduction of their partial sums.

Where there are parts of fp32 operands, half of the cases have one wide element per sum: it is exact then, in all 24 bits.
"""

from collections.abc import Iterator
from typing import NamedTuple

import skinny
import test_cuda_lora_segments as segments
import torch
from compare import BF16, F32
from ptx.device import Device, Run
from skinny import Dropout, normal, products, strided
from torch import Tensor

from lora_ops import reference

from .case import F64, Case, Counts, Kernel, Results, odd, one_of_each_row, times, whole, whole_normal

SCALING, SEED = 0.5, 0x123456789ABCDF1  # with which some numbers of each column that _thresholds looks at are odd


class Skinny(NamedTuple):
    rows: int
    columns: int
    r: int
    sm_count: int
    dropout: Dropout | None
    single: bool = False  # one element per sum
    aligned: bool = False  # whole tiles


def _shapes(kernel: Kernel, columns: int) -> Iterator[Skinny]:
    """For tiles of 64 rows and `columns`. Survivors of dropout are multiplied by 2 or 4."""
    (most,), (vector,) = kernel.sizes, kernel.flags
    least = most // 2 if most > 16 else 0  # below it, another kernel has fewer ranks per block
    for single in (False, True):
        yield Skinny(2 * 64, 2 * columns, most, 1, Dropout(0.5), single, aligned=True)
        yield Skinny(64 + 2, 4 * columns + 40, 100 if most == 64 else most - 4, 8, None, single)
        yield Skinny(4 * 64 + 37, 24, most - 8 if most > 16 else 8, 2, None, single)
    for i in range(48):  # up to four tiles one way, with an end in each eighth of each, and three the other; and of its ranks
        wide = columns * ((i + i // 4) % 3) + 5 * i % 16 * (columns // 16)
        if i >= 16:
            wide = columns + 8 + 5 * i % 16 * (columns // 16)  # too wide for a split
        rows = 64 * ((i + i // 8) % 4 if i < 16 else i // 8 - 2) + 8 * (i % 8) + (3 * i + 2) % 8
        rank = least + (4 * (i % ((most - least) // 4) + 1) if vector else (5 * i + 1) % (most - least) + 1)
        beyond = 64 - least if most == 64 and i % 2 else 0
        dropout = Dropout(0.75, SEED + i % 2 * 0x100000001) if i // 2 % 2 else None
        yield Skinny(rows, (wide or 8) + (0 if vector else 7 * i % 16), rank + beyond, 1 + i % 3, dropout, i // 3 % 2 > 0)
    for p in _thresholds():
        yield Skinny(16, 128, most, 1, Dropout(p, SEED))


def _thresholds() -> Iterator[float]:
    """The smallest odd numbers of one thread's columns, in even turns of a loop that drops rows or columns and in odd ones,
    each as a threshold that keeps it and as one that drops it."""
    bits = reference.dropout_bits(torch.tensor(SEED), 16, 128)
    for rows in (slice(0, 8, 2), slice(9, 16, 2)):
        for col in (c for c in range(128) if c % 32 < 2):
            numbers = bits[rows, col][bits[rows, col] % 2 == 1]
            yield from ((int(numbers.min()) + above) / 65536 for above in (0, 1))


def _layout(kernel: Kernel, t: Tensor) -> Tensor:
    """Rows that begin at multiples of 16 bytes, or that do not."""
    return strided(t, 0, -t.shape[1] % 8) if kernel.flags[0] else strided(t, 1, 1 + t.shape[1] % 2)


def _kept(x: Tensor, dropout: Dropout | None) -> tuple[Tensor, float]:
    """What dropout leaves of x, in float64, and the factor of it."""
    if dropout is None:
        return x.double(), 1.0
    return x.double() * dropout.keep(*x.shape), 1 / (1 - dropout.p)


def down(kernel: Kernel, _: Device) -> Iterator[Case]:
    dtypes = kernel.dtypes
    for i, (M, columns, r, sm_count, dropout, single, aligned) in enumerate(_shapes(kernel, 128)):
        K = -(-columns // 8) * 8 if kernel.flags[0] else columns  # A is contiguous
        r = r - (i + i // 8) % 4 if kernel.flags[0] and not aligned else r  # nor does anything else depend on its rows
        x = odd(whole_normal(M, K, dtype=dtypes.x))
        A = whole_normal(r, K, dtype=dtypes.adapter)
        if single:
            x, A = one_of_each_row(M, K).to(dtypes.x) * (1 - M % 2 * 2), normal(r, K, dtype=dtypes.adapter)

        def launch(run: Run, x=x, A=A, sm_count=sm_count, dropout=dropout) -> Results:
            return {"S": skinny.lora_down(run.library, _layout(kernel, x), A.clone(), dropout=dropout, sm_count=sm_count)}

        def exact(x=x, A=A, dropout=dropout) -> Results:
            h, factor = _kept(x, dropout)
            return {"S": times(h @ A.double().T, factor)}

        mma = products(dtypes) * (M // 16) * (K // 16) * (r // 8)
        copied = x.nbytes + M // 64 * A.nbytes if kernel.flags[0] else 0
        yield Case(launch, exact, counts=Counts(mma, copied) if aligned else None)


def down_segments(kernel: Kernel, _: Device) -> Iterator[Case]:
    dtypes, (most,), (vector,) = kernel.dtypes, kernel.sizes, kernel.flags
    for i, batch in enumerate([*segments.BATCHES.values(), *segments.BATCHES.values()]):
        batch = [(rows + 3 * i, r if most == 64 else r % (most + 1)) for rows, r in batch]
        batch += [(70 - 3 * i, (100 if most == 64 else most) - i % 3)]
        M, K, dropout = (
            sum(rows for rows, _ in batch),
            128 * (i % 4) + 64 + 8 * i,
            Dropout(0.75, SEED + i % 2 * 0x100000001) if i % 3 else None,
        )
        K, padding = (K, 0) if vector else (K + i % 8, 3)
        adapters, x = segments.make_adapters(batch, K, 8, dtypes.adapter), odd(whole_normal(M, K, dtype=dtypes.x))
        if i < 4:
            for a in adapters:
                a.A = whole(a.A)
        else:
            x = one_of_each_row(M, K).to(dtypes.x)

        yield _of_segments(x, adapters, dropout, 1 + 3 * (i % 3), padding)
    x, padding = whole_normal(128, 256, dtype=dtypes.x), 0 if vector else 3
    adapters = segments.make_adapters([(64, most), (64, most)], 256, 8, dtypes.adapter)
    for a in adapters:
        a.A = whole(a.A)
    counts = Counts(products(dtypes) * 8 * 16 * most // 8, x.nbytes + 2 * adapters[0].A.nbytes if vector else 0)
    yield _of_segments(x, adapters, Dropout(0.5), 1, padding)._replace(counts=counts)
    for p in _thresholds():
        x = odd(whole_normal(16, 128, dtype=dtypes.x))
        adapters = segments.make_adapters([(16, most)], 128, 8, dtypes.adapter)
        adapters[0].A = whole(adapters[0].A)
        yield _of_segments(x, adapters, Dropout(p, SEED), 1, padding)


def _of_segments(x: Tensor, adapters: list[segments.Adapter], dropout: Dropout | None, sm_count: int, padding: int) -> Case:
    def exact() -> Results:
        h, factor = _kept(x, dropout)
        S = torch.zeros(len(x), segments.columns(adapters), dtype=F64)
        for a in adapters:
            S[a.rows, : a.rank] = h[a.rows] @ a.A.double().T
        return {"S": times(S, factor)}

    return Case(lambda run: {"S": segments.down(run, x, adapters, dropout, sm_count, padding)}, exact)


def backward_down(kernel: Kernel, _: Device) -> Iterator[Case]:
    dtypes = kernel.dtypes
    for M, K, r, sm_count, dropout, single, aligned in _shapes(kernel, 128):
        x, dS = odd(whole_normal(M, K, dtype=dtypes.x)), whole_normal(M, r, dtype=F32)
        if single:
            x, dS = one_of_each_row(K, M).T.to(dtypes.x), normal(M, r, dtype=F32)

        def launch(run: Run, x=x, dS=dS, sm_count=sm_count, dropout=dropout) -> Results:
            inputs = dS.clone(), _layout(kernel, x), dtypes.adapter
            return {"dA": skinny.lora_backward_down(run.library, *inputs, dropout=dropout, sm_count=sm_count)}

        def exact(x=x, dS=dS, dropout=dropout) -> Results:
            h, factor = _kept(x, dropout)
            return {"dA": times(dS.to(dtypes.adapter).double().T @ h, factor)}

        mma = products(dtypes) * (M // 16) * (K // 16) * (r // 8)
        copied = x.nbytes + K // 128 * dS.nbytes if kernel.flags[0] else 0
        yield Case(launch, exact, counts=Counts(mma, copied) if aligned else None)


def backward_up(kernel: Kernel, _: Device) -> Iterator[Case]:
    dtypes, names = kernel.dtypes, ("dS", "dB", "dbias")
    some = [names, names, names, names, names, names, ("dB",), ("dS", "dbias"), names, ("dbias",), ("dS",), names]
    columns = 256 if kernel.sizes[0] <= 32 else 128
    for i, (M, N, r, sm_count, _, single, aligned) in enumerate(_shapes(kernel, columns)):
        if M == 16:
            return  # thresholds
        wanted = some[i % len(some)]
        r = r - 1 if kernel.flags[0] and "dB" not in wanted else r  # S, which is not read, need not be aligned
        dy, B = whole_normal(M, N, dtype=dtypes.x), whole_normal(N, r, dtype=dtypes.adapter)
        S = whole_normal(M, r, dtype=F32, draw=1)
        if single:
            dy = (one_of_each_row(M, N) & (torch.arange(M)[:, None] < N)).to(dtypes.x)
            B, S = normal(N, r, dtype=dtypes.adapter), normal(M, r, dtype=F32, draw=1)

        def launch(run: Run, dy=dy, B=B, S=S, sm_count=sm_count, wanted=wanted) -> Results:
            inputs = _layout(kernel, dy), B.clone(), S.clone()
            return skinny.lora_backward_up(run.library, *inputs, SCALING, wanted=wanted, sm_count=sm_count)

        def exact(dy=dy, B=B, S=S) -> Results:
            wide = dy.double()
            dB = SCALING * (wide.T @ S.to(dtypes.adapter).double())
            return {"dS": SCALING * (wide @ B.double()), "dB": dB, "dbias": wide.sum(0)}

        mma = (M // 16) * (N // 16) * (2 * products(dtypes) * (r // 8) + 1)
        copied = dy.nbytes + N // columns * S.nbytes if kernel.flags[0] else 0
        yield Case(launch, exact, counts=Counts(mma, copied) if aligned else None)


def reduce(_: Kernel, device: Device) -> Iterator[Case]:
    """Of every output type, and three reductions at once, of up to ten splits."""
    for i in range(2, 9):
        x, A = whole_normal(3, 128 * i - 8, dtype=BF16), whole_normal(40 * i + 16, 128 * i - 8, dtype=F32)

        def launch(run: Run, x=x, A=A) -> Results:
            return {"S": skinny.lora_down(run.library, x.clone(), A.clone(), sm_count=100)}

        yield Case(launch, lambda x=x, A=A: {"S": x.double() @ A.double().T})
    for t in ("Bf16", "Half"):
        kernel = Kernel("lora_backward_up.cu", f"lora_backward_up_kernel<{t}, {t}, 16, true>")
        yield from (case._replace(counts=None) for case in list(backward_up(kernel, device))[1:12])
    for N in (600, 0):  # of no columns, no sums
        dy, B = whole_normal(70, N, dtype=BF16), whole_normal(N, 6, dtype=F32)

        def of_wider(run: Run, dy=dy, B=B) -> Results:
            dS = torch.empty(70, 11)[:, 3:9]
            return skinny.lora_backward_up(
                run.library, dy.clone(), B.clone(), torch.empty(0, 6), SCALING, wanted=("dS",), dS=dS
            )

        yield Case(of_wider, lambda dy=dy, B=B: {"dS": SCALING * (dy.double() @ B.double())})
