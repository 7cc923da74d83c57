"""y = x W0ᵀ + scaling · S Bᵀ + bias on a device, against fp64 and by compare.py's policy."""

import itertools

import pytest
import torch
from compare import BF16, F16, F32, Case, Dtypes, assert_within_bound, eager_lora, error, make_case, oracle
from compare import run as run_case
from cuda_structs import LAYOUTS, TILES, LoraForward, call, empty, laid_out, matrix
from ptx.device import Device, Run
from torch import Tensor

from lora_ops import reference

pytestmark = pytest.mark.cuda

DTYPES = [Dtypes(t, a) for t in (BF16, F16) for a in (t, F32)]
# (M, K, N, r): within a tile, one tile, beyond it in every direction
SHAPES = [(1, 8, 8, 1), (64, 128, 128, 3), (130, 72, 136, 20)]


def down(case: Case) -> Tensor:
    wide = [t.double() for t in (case.x, case.weight, case.lora_A, case.lora_B)]
    return reference.lora_forward(*wide, None, case.scaling)[1].float()


def launch(
    run: Run,
    case: Case,
    S: Tensor,
    *,
    tile: str = "automatic",
    layout: str = "plain",
    transposed: bool = False,
    base: Tensor | None = None,
) -> Tensor:
    """With `base`, y holds it and the weight is absent. The bias goes in as the adapters' dtype."""
    (M, K), N, r = case.x.shape, case.weight.shape[0], case.lora_A.shape[0]
    y = empty(M, N, case.x.dtype, layout) if base is None else laid_out(base, layout)
    x = None if base is not None else laid_out(case.x, layout)
    weight = None if base is not None else laid_out(case.weight, layout, transposed, apart=8)
    lora_B, bias, S = (
        laid_out(case.lora_B, layout),
        None if case.bias is None else case.bias.to(case.lora_B.dtype, copy=True),
        S.clone(),
    )
    for t in (x, weight, lora_B, bias, S):
        if t is not None:
            run.register(t, readonly=True)
    matrices = map(matrix, (x, weight, lora_B, bias, y))
    params = LoraForward(M, K, N, r, *matrices, S.data_ptr(), case.scaling, TILES[tile])
    call(run, "lora_forward", params)
    return y


def assert_right(y: Tensor, case: Case) -> None:
    eager, exact = run_case(eager_lora, case, backward=False)["y"], oracle(case, backward=False)["y"]
    assert_within_bound({"y": error(y, eager, exact)})


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("tile", ["small", "medium", "large"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_values(device: Device, dtypes: Dtypes, tile: str, transposed: bool) -> None:
    for shape in SHAPES:
        case = make_case(shape, dtypes, bias=shape[0] != 1)
        S = down(case)
        with device.run() as run:
            y = launch(run, case, S, tile=tile, transposed=transposed)
        assert_right(y, case)
        assert run.counters.bank_conflicts.matching(entry="gemm_kernel") == []


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("layout", ["padded", "odd"])
def test_every_residue(device: Device, layout: str, transposed: bool) -> None:
    """Of M, K and N modulo an mma's 16 rows and depths and a chunk's 8 columns, and every tile."""
    for i, tile in zip(range(1, 17), itertools.cycle(["small", "medium", "large"]), strict=False):
        case = make_case(
            (32 * (i % 5) + i, 16 * (i % 6) + 7 * i % 16 + 1, 16 * (i % 8) + 11 * i % 16 + 1, i), Dtypes(BF16, F32)
        )
        S = down(case)
        with device.run() as run:
            y = launch(run, case, S, tile=tile, layout=layout, transposed=transposed)
        assert_right(y, case)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_every_rank(device: Device, dtypes: Dtypes) -> None:
    for r in (1, 2, 3, 4, 5, 15, 16, 17, 100):
        case = make_case((20, 32, 24, r), dtypes)
        S = down(case)
        with device.run() as run:
            y = launch(run, case, S)
        assert_right(y, case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_base_product_in_y(device: Device, dtypes: Dtypes, layout: str) -> None:
    """y += scaling · S Bᵀ + bias: rounded as often as eager."""
    for shape, tile in zip([(33, 16, 71, 5), (130, 16, 136, 16)], ["small", "large"], strict=True):
        case = make_case(shape, dtypes, bias=True)
        S, base = down(case), (case.x.double() @ case.weight.double().T).to(case.x.dtype)
        with device.run() as run:
            y = launch(run, case, S, tile=tile, layout=layout, base=base)
        assert_right(y, case)


@pytest.mark.parametrize(("arch", "tile"), [(80, "small"), (80, "medium"), (80, "large"), (90, "large")])
def test_same_bits_in_any_order(device: Device, arch: int, tile: str) -> None:
    case = make_case((140, 200, 136, 20), Dtypes(BF16, F32))
    S, results = down(case), []
    for reverse in (False, True):
        with device.run(arch=arch, limits=86 if arch == 80 else None, reverse=reverse) as run:
            results.append(launch(run, case, S, tile=tile))
    assert torch.equal(*results)
    assert_right(results[0], case)


def test_infinities_stay_in_their_rows(device: Device) -> None:
    case = make_case((5, 40, 24, 4), Dtypes(BF16, BF16))
    case.x[1, 3], case.x[3, 39] = torch.inf, torch.nan
    S = down(case)
    with device.run() as run:
        y = launch(run, case, S)
    assert torch.equal(y.isfinite().all(1), torch.tensor([True, False, True, False, True]))
    assert torch.equal(y.isfinite().any(1), y.isfinite().all(1))


def test_mma_count(device: Device) -> None:
    """What the tensor cores do: the padded product once, and three products of parts per 16 ranks."""
    case = make_case((256, 96, 128, 24), Dtypes(BF16, F32))
    S = down(case)
    with device.run() as run:
        launch(run, case, S, tile="large")
    per_16_depths = 256 // 16 * (128 // 8)
    assert run.counters.mma_count == per_16_depths * (96 // 16 + 3 * 2)
    copies = run.counters.matching("cp.async", entry="gemm_kernel")
    assert copies.total("sectors") == copies.total("ideal_sectors")


@pytest.mark.parametrize(("M", "tile"), [(32, "Li32ELi64E"), (33, "Li64ELi64E"), (1152, "Li64ELi64E"), (1153, "Li128ELi128E")])
def test_which_tile(device: Device, M: int, tile: str) -> None:
    """Few rows, too few large tiles to give every multiprocessor one, and enough of them."""
    case = make_case((M, 1, 1280, 1), Dtypes(BF16, BF16), bias=False)
    S, base = down(case), torch.zeros(M, 1280, dtype=BF16)
    with device.run() as run:
        launch(run, case, S, base=base)
    assert run.counters and all(tile in c.entry for c in run.counters)


def test_what_is_refused(device: Device) -> None:
    case = make_case((4, 8, 8, 2), Dtypes(F32, F32))
    with (
        pytest.raises(RuntimeError, match=r"lora_forward: takes bf16 or fp16.*M = 4, columns = 8, depth = 8, r = 2"),
        device.run() as run,
    ):
        launch(run, case, down(case))


def test_nothing_to_do(device: Device) -> None:
    case = make_case((0, 8, 8, 2), Dtypes(BF16, F32))
    with device.run() as run:
        assert launch(run, case, down(case)).shape == (0, 8)
