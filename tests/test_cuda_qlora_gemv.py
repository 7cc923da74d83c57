"""y = x W0ᵀ + scaling · S Bᵀ + bias for one to eight rows of x on a device, W0 in 4 bits, by compare.py's policy."""

import pytest
import test_cuda_lora_forward as dense
import torch
from compare import BF16, F16, F32, Dtypes, assert_within_bound, error
from compare import run as run_case
from four_bit import SETTINGS, eager_lora, exact_results, make_quantised_case
from ptx.build import GPU
from ptx.device import Device
from test_cuda_qlora_forward import DTYPES, assert_right, launch

pytestmark = pytest.mark.cuda

every_arch = pytest.mark.parametrize("arch", [80, 90])


@every_arch
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_values(device: Device, dtypes: Dtypes, arch: int) -> None:
    """Every number of rows, every residue of the 16 rows of W0 that a warp has, one chunk and several per warp."""
    for i in range(32):
        shape = (i % 8 + 1, 128 * (1, 2, 9, 17, 33)[i % 5], 7 * i % 32 + 1, (1, 3, 8, 16, 17, 64, 100)[i % 7])
        case = make_quantised_case(shape, dtypes, SETTINGS[i % len(SETTINGS)])
        S = dense.down(case)
        with device.run(arch=arch) as run:
            y = launch(run, case, S)
        assert run.counters and all("gemv" in c.entry for c in run.counters)
        assert_right(y, case)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("N", [40, 4100])
def test_every_kind_of_block_and_code(device: Device, N: int, settings: tuple[int, bool, str]) -> None:
    """In blocks of 16 rows of W0, and of 32."""
    case = make_quantised_case((3, 384, N, 4), Dtypes(BF16, F32), settings)
    S = dense.down(case)
    with device.run() as run:
        y = launch(run, case, S)
    assert_right(y, case)


@pytest.mark.parametrize("N", [100, 4100])
def test_rows_and_their_neighbours(device: Device, N: int) -> None:
    """A row's result does not depend, not in a bit, on how many others there are, nor on the order of blocks and warps."""
    case = make_quantised_case((8, 640, N, 20), Dtypes(BF16, F32))
    S = dense.down(case)
    with device.run() as run:
        y = launch(run, case, S)
    for M, reverse in ((1, False), (3, True), (8, True)):
        some = make_quantised_case((8, 640, N, 20), Dtypes(BF16, F32))
        object.__setattr__(some, "x", case.x[:M])
        with device.run(reverse=reverse) as run:
            assert torch.equal(launch(run, some, S[:M].clone()), y[:M])


@pytest.mark.skipif(GPU, reason="a GPU counts nothing")
@pytest.mark.parametrize("double_quant", [True, False])
def test_what_is_read(device: Device, double_quant: bool) -> None:
    """Codes once; and weights are looked up without bank conflicts."""
    M, K, N = 4, 1024, 64
    case = make_quantised_case((M, K, N, 16), Dtypes(F16, F16), (64, double_quant, "nf4"))
    S = dense.down(case)
    with device.run() as run:
        launch(run, case, S)
    codes = run.counters.matching("ld.global.cs")
    assert codes.total("global_bytes") == N * K // 2
    assert codes.total("sectors") == codes.total("ideal_sectors")
    nested = {c.source for c in run.counters.bank_conflicts}  # whose table of 256 is looked up once per row and chunk
    assert len(nested) == double_quant
    assert run.counters.mma_count == N // 16 * (K // 16)


def test_infinities_stay_in_their_rows(device: Device) -> None:
    case = make_quantised_case((5, 256, 24, 4), Dtypes(BF16, BF16), (32, True, "nf4"))
    case.x[1, 3], case.x[3, 255] = torch.inf, torch.nan
    S = dense.down(case)
    with device.run() as run:
        y = launch(run, case, S)
    assert torch.equal(y.isfinite().all(1), torch.tensor([True, False, True, False, True]))


def test_comparison_notices_a_lost_element(device: Device) -> None:
    case = make_quantised_case((2, 256, 24, 4), Dtypes(BF16, F32))
    S, eager, exact = dense.down(case), run_case(eager_lora, case, backward=False), exact_results(case, backward=False)
    case.x[:, -1] = 0
    with device.run() as run:
        y = launch(run, case, S)
    with pytest.raises(AssertionError, match="error"):
        assert_within_bound({"y": error(y, eager["y"], exact["y"])})
