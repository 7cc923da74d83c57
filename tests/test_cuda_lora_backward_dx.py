"""dx = dy W0 + drop'(dS A) on a device, against fp64 and by compare.py's policy."""

import itertools

import pytest
import torch
from compare import BF16, F16, F32, Case, Dtypes, assert_within_bound, eager_lora, error, make_case, oracle
from compare import run as run_case
from cuda_structs import LAYOUTS, TILES, Dropout, LoraBackwardDx, call, empty, laid_out, matrix
from ptx.device import Device, Run
from torch import Tensor

from lora_ops import reference

pytestmark = pytest.mark.cuda

DTYPES = [Dtypes(t, a) for t in (BF16, F16) for a in (t, F32)]
# (M, K, N, r): within a tile, one tile, beyond it in every direction
SHAPES = [(1, 8, 8, 1), (64, 128, 128, 3), (130, 136, 72, 20)]


def down(case: Case) -> Tensor:
    return (case.scaling * (case.dy.double() @ case.lora_B.double())).float()


def launch(
    run: Run,
    case: Case,
    dS: Tensor,
    *,
    tile: str = "automatic",
    layout: str = "plain",
    transposed: bool = False,
    base: Tensor | None = None,
) -> Tensor:
    """With `base`, dx holds it and the weight is absent."""
    (M, K), N, r, p = case.x.shape, case.weight.shape[0], case.lora_A.shape[0], case.dropout_p
    dx = empty(M, K, case.dy.dtype, layout) if base is None else laid_out(base, layout)
    dy = None if base is not None else laid_out(case.dy, layout)
    weight = None if base is not None else laid_out(case.weight, layout, transposed, apart=8)
    lora_A, dS = laid_out(case.lora_A, layout), dS.clone()
    seed = None if case.seed is None else case.seed.clone()
    dropout = Dropout(None, 0, 1.0) if seed is None else Dropout(seed.data_ptr(), reference.dropout_threshold(p), 1 / (1 - p))
    for t in (dy, weight, lora_A, dS, seed):
        if t is not None:
            run.register(t, readonly=True)
    matrices = map(matrix, (dy, weight, lora_A, dx))
    params = LoraBackwardDx(M, K, N, r, *matrices, dS.data_ptr(), dropout, TILES[tile])
    call(run, "lora_backward_dx", params)
    return dx


def assert_right(dx: Tensor, case: Case) -> None:
    eager, exact = run_case(eager_lora, case, backward=True)["dx"], oracle(case, backward=True)["dx"]
    assert_within_bound({"dx": error(dx, eager, exact)})


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("tile", ["small", "medium", "large"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_values(device: Device, dtypes: Dtypes, tile: str, transposed: bool) -> None:
    for shape, p in zip(SHAPES, (0.5, 0.0, 0.25), strict=True):
        case = make_case(shape, dtypes, dropout_p=p)
        dS = down(case)
        with device.run() as run:
            dx = launch(run, case, dS, tile=tile, transposed=transposed)
        assert_right(dx, case)
        assert run.counters.bank_conflicts.matching(entry="gemm_kernel") == []


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("layout", ["padded", "odd"])
def test_every_residue(device: Device, layout: str, transposed: bool) -> None:
    """Of M, K and N modulo an mma's 16 rows and depths and a chunk's 8 columns, and every tile."""
    for i, tile in zip(range(1, 17), itertools.cycle(["small", "medium", "large"]), strict=False):
        shape = (32 * (i % 5) + i, 16 * (i % 8) + 7 * i % 16 + 1, 16 * (i % 6) + 11 * i % 16 + 1, i)
        case = make_case(shape, Dtypes(BF16, F32), dropout_p=i % 2 / 4)
        dS = down(case)
        with device.run() as run:
            dx = launch(run, case, dS, tile=tile, layout=layout, transposed=transposed)
        assert_right(dx, case)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_every_rank(device: Device, dtypes: Dtypes) -> None:
    for r in (1, 2, 3, 4, 5, 15, 16, 17, 100):
        case = make_case((20, 24, 32, r), dtypes, dropout_p=0.1)
        dS = down(case)
        with device.run() as run:
            dx = launch(run, case, dS)
        assert_right(dx, case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_base_product_in_dx(device: Device, dtypes: Dtypes, layout: str) -> None:
    """dx += drop'(dS A): rounded as often as eager."""
    for shape, tile in zip([(33, 71, 16, 5), (130, 136, 16, 16)], ["small", "large"], strict=True):
        case = make_case(shape, dtypes, dropout_p=0.25)
        dS, base = down(case), (case.dy.double() @ case.weight.double()).to(case.dy.dtype)
        with device.run() as run:
            dx = launch(run, case, dS, tile=tile, layout=layout, base=base)
        assert_right(dx, case)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.75])
@pytest.mark.parametrize("tile", ["small", "medium", "large"])
def test_mask_is_the_reference_s(device: Device, tile: str, p: float) -> None:
    """Element for element, over three groups of 128 columns: where dS A is one everywhere, dx is the mask times 1 / (1 - p)."""
    M, K = 70, 300
    case = make_case((M, K, 8, 1), Dtypes(BF16, F32), dropout_p=p)
    case.lora_A.fill_(1)
    with device.run() as run:
        dx = launch(run, case, torch.ones(M, 1), tile=tile, base=torch.zeros(M, K, dtype=BF16))
    keep = torch.ones(M, K) if case.seed is None else reference.dropout_keep(case.seed, p, M, K) / (1 - p)
    assert torch.equal(dx, keep.to(BF16))


@pytest.mark.parametrize(("arch", "tile"), [(80, "small"), (80, "medium"), (80, "large"), (90, "large")])
def test_same_bits_in_any_order(device: Device, arch: int, tile: str) -> None:
    case = make_case((140, 136, 200, 20), Dtypes(BF16, F32), dropout_p=0.1)
    dS, results = down(case), []
    for reverse in (False, True):
        with device.run(arch=arch, limits=86 if arch == 80 else None, reverse=reverse) as run:
            results.append(launch(run, case, dS, tile=tile))
    assert torch.equal(*results)
    assert_right(results[0], case)


def test_infinities_stay_in_their_rows(device: Device) -> None:
    case = make_case((5, 24, 40, 4), Dtypes(BF16, BF16))
    case.dy[1, 3], case.dy[3, 39] = torch.inf, torch.nan
    dS = down(case)
    with device.run() as run:
        dx = launch(run, case, dS)
    assert torch.equal(dx.isfinite().all(1), torch.tensor([True, False, True, False, True]))
    assert torch.equal(dx.isfinite().any(1), dx.isfinite().all(1))


def test_mma_count(device: Device) -> None:
    """What the tensor cores do: the padded product once, and three products of parts per 16 ranks."""
    case = make_case((256, 128, 96, 24), Dtypes(BF16, F32), dropout_p=0.1)
    dS = down(case)
    with device.run() as run:
        launch(run, case, dS, tile="large")
    per_16_depths = 256 // 16 * (128 // 8)
    assert run.counters.mma_count == per_16_depths * (96 // 16 + 3 * 2)
    copies = run.counters.matching("cp.async", entry="gemm_kernel")
    assert copies.total("sectors") == copies.total("ideal_sectors")


def test_base_product_s_work(device: Device) -> None:
    """dx is copied and stored once, and the tensor cores do the low-rank product alone."""
    case = make_case((256, 128, 96, 24), Dtypes(BF16, F32), dropout_p=0.1)
    dS, base = down(case), torch.zeros(256, 128, dtype=BF16)
    with device.run() as run:
        launch(run, case, dS, tile="large", base=base)
    assert run.counters.mma_count == 256 // 16 * (128 // 8) * 3 * 2
    copies, stores = (run.counters.matching(opcode, entry="gemm_kernel") for opcode in ("cp.async", "st.global"))
    for some in (copies, stores):
        assert some.total("global_bytes") == base.nbytes
        assert some.total("sectors") == some.total("ideal_sectors")
    assert run.counters.bank_conflicts.matching(entry="gemm_kernel") == []


def test_what_is_refused(device: Device) -> None:
    case = make_case((4, 8, 8, 2), Dtypes(F32, F32))
    message = r"lora_backward_dx: takes bf16 or fp16.*M = 4, columns = 8, depth = 8, r = 2"
    with pytest.raises(RuntimeError, match=message), device.run() as run:
        launch(run, case, down(case))
