"""Every CUDA kernel, from the PTX of both architectures: shapes of every residue of its tiles, and every rank from 1 to 100.

Values are held to compare.py's policy, launch by launch; 4-bit products, bit for bit, to the dense ones of the decoded weight.
"""

from collections.abc import Iterator

import pytest
import test_cuda_lora_backward_dx as dx
import test_cuda_lora_forward as forward
import test_cuda_qlora_backward_dx as qdx
import test_cuda_qlora_forward as qforward
import torch
from compare import F32, Dtypes, Shape, assert_within_bound, error, make_case
from four_bit import make_quantised_case
from ptx.device import Device
from skinny import DTYPES, Dropout, lora_backward_down, lora_backward_up, lora_down, normal, strided

pytestmark = pytest.mark.cuda

every_arch = pytest.mark.parametrize("arch", [80, 90])


def sweep(rows: int, columns: int, depth: int) -> Iterator[tuple[int, Shape, Dtypes]]:
    """(number, (M, columns, depth, r), dtypes): each size takes every residue of its tile, now and then beyond a whole tile."""
    for i in range(max(rows, columns, depth)):
        M = i % rows + rows * (i % 7 == 3)
        wide = 11 * i % columns + columns * (i % 5 == 2)
        deep = 7 * i % depth + depth * (i % 3)
        yield i, (M or rows, wide or columns, deep or depth, i % 20 + 1), DTYPES[i % 4]


def check_dense(device: Device, arch: int, i: int, shape: Shape, dtypes: Dtypes, **how) -> None:
    M, wide, deep, r = shape
    case, other = make_case((M, deep, wide, r), dtypes), make_case((M, wide, deep, r), dtypes, dropout_p=i % 3 / 4)
    S, dS = forward.down(case), dx.down(other)
    with device.run(arch=arch) as run:
        y, result = forward.launch(run, case, S, **how), dx.launch(run, other, dS, **how)
    forward.assert_right(y, case)
    dx.assert_right(result, other)


def check_skinny(device: Device, arch: int, i: int, M: int, columns: int, r: int, dtypes: Dtypes, vector: bool) -> None:
    dropout, sm_count = (None, Dropout(0.3))[i % 2], i % 5 + 1
    x, A = normal(M, columns, dtype=dtypes.x), normal(r, columns, dtype=dtypes.adapter, std=columns**-0.5)
    B, S = normal(columns, r, dtype=dtypes.adapter, std=r**-0.5), normal(M, r, dtype=F32, draw=1)
    with device.run(arch=arch) as run:
        for t in (A, B, S):
            run.register(t, readonly=True)
        wide = x.clone() if vector else strided(x, 1, 1 + columns % 2)
        results = {
            "S": lora_down(run.library, wide, A, dropout=dropout, sm_count=sm_count),
            "dA": lora_backward_down(run.library, S, wide, dtypes.adapter, dropout=dropout, sm_count=sm_count),
            **lora_backward_up(run.library, wide, B, S, 0.75, sm_count=sm_count),
        }
    h, exact_h = (t if dropout is None else dropout.of(t) for t in (x.to(dtypes.adapter), x.double()))
    eager = {
        "S": (x.float() if dropout is None else dropout.of(x.float())) @ A.float().T,
        "dA": S.to(dtypes.adapter).T @ h,
        "dS": 0.75 * (x.float() @ B.float()),
        "dB": (x.to(dtypes.adapter) * 0.75).T @ S.to(dtypes.adapter),
        "dbias": x.sum(0),
    }
    exact = {
        "S": exact_h @ A.double().T,
        "dA": S.double().T @ exact_h,
        "dS": 0.75 * (x.double() @ B.double()),
        "dB": 0.75 * (x.double().T @ S.double()),
        "dbias": x.double().sum(0),
    }
    shape = f"{M} x {columns}, r = {r}, {dtypes}"
    assert_within_bound({f"{name} of {shape}": error(t, eager[name], exact[name]) for name, t in results.items()})


@every_arch
@pytest.mark.parametrize(
    ("tile", "layout", "sizes"),
    [
        ("small", "padded", (32, 64, 64)), ("medium", "padded", (64, 64, 64)), ("large", "padded", (128, 128, 32)),
        ("medium", "odd", (64, 64, 64)),
    ],
)  # fmt: skip
def test_dense_products(device: Device, tile, layout, sizes, arch):
    for i, shape, dtypes in sweep(*sizes):
        transposed = (i % 2 == 0) == (arch == 80)
        check_dense(device, arch, i, shape, dtypes, tile=tile, layout=layout, transposed=transposed)


@every_arch
@pytest.mark.parametrize(("tile", "sizes"), [("small", (32, 64, 1)), ("medium", (64, 128, 1))])
def test_4bit_forward(device: Device, tile, sizes, arch):
    for i, (M, wide, _, r), dtypes in sweep(*sizes):
        case = make_quantised_case((M, 128 * (i % 4 + 1), wide, r), dtypes)
        S = forward.down(case)
        with device.run(arch=arch) as run:
            assert torch.equal(qforward.launch(run, case, S, tile=tile), forward.launch(run, case, S))


@every_arch
def test_4bit_dx(device: Device, arch):
    for i, (M, _, deep, r), dtypes in sweep(64, 1, 64):
        case = make_quantised_case((M, 128 * (i % 2 + 1), deep, r), dtypes, dropout_p=i % 3 / 4)
        dS = dx.down(case)
        with device.run(arch=arch) as run:
            assert torch.equal(qdx.launch(run, case, dS), dx.launch(run, case, dS))


@every_arch
@pytest.mark.parametrize("vector", [True, False])
def test_skinny_products(device: Device, vector, arch):
    """The wide tile is 64 x 128."""
    for i, (M, columns, _, r), dtypes in sweep(64, 128, 1):
        if vector:
            columns, r = -(-columns // 8) * 8, -(-r // 4) * 4
        check_skinny(device, arch, i, M, columns, r, dtypes, vector)


@every_arch
def test_every_rank(device: Device, arch):
    for r in range(1, 101):
        dtypes = DTYPES[(r + arch // 90) % 4]
        check_skinny(device, arch, r, 9, 40, r, dtypes, vector=r % 2 == 0)
        check_dense(device, arch, r, (9, 24, 40, r), dtypes, tile="small")
