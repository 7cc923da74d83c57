"""dx = dy W0 + drop'(dS A) on a device, W0 in 4 bits: bit for bit the dense kernel on the decoded weight."""

import ctypes

import pytest
import test_cuda_lora_backward_dx as dense
import torch
from compare import BF16, F16, F32, Dtypes, assert_within_bound, eager_lora, error
from compare import run as run_case
from cuda_structs import Dropout, Matrix, QuantizedWeight, empty, laid_out, matrix, quantized
from four_bit import SETTINGS, QuantisedCase, exact_results, make_quantised_case
from ptx.device import Device, Run
from torch import Tensor

from lora_ops import reference

pytestmark = pytest.mark.cuda

DTYPES = [Dtypes(t, a) for t in (BF16, F16) for a in (t, F32)]


class QloraBackwardDx(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in "MKNr"),
        ("dy", Matrix),
        ("weight", QuantizedWeight),
        *((name, Matrix) for name in ("lora_A", "dx")),
        ("dS", ctypes.c_void_p),
        ("dropout", Dropout),
    ]


def launch(run: Run, case: QuantisedCase, dS: Tensor, *, layout: str = "padded", layout_out: str = "odd") -> Tensor:
    (M, K), N, r, p = case.x.shape, case.weight.shape[0], case.lora_A.shape[0], case.dropout_p
    dy, lora_A, dS, dx = (
        laid_out(case.dy, layout),
        laid_out(case.lora_A, layout_out),
        dS.clone(),
        empty(M, K, case.dy.dtype, layout_out),
    )
    seed = None if case.seed is None else case.seed.clone()
    dropout = Dropout(None, 0, 1.0) if seed is None else Dropout(seed.data_ptr(), reference.dropout_threshold(p), 1 / (1 - p))
    for t in (dy, lora_A, dS, seed):
        if t is not None:
            run.register(t, readonly=True)
    weight = quantized(run, case.qweight)
    params = QloraBackwardDx(M, K, N, r, matrix(dy), weight, matrix(lora_A), matrix(dx), dS.data_ptr(), dropout)
    run.library.lora_ops_last_error.restype = ctypes.c_char_p
    if run.library.lora_ops_qlora_backward_dx(ctypes.byref(params), None):
        raise RuntimeError(run.library.lora_ops_last_error().decode())
    return dx


def assert_right(dx: Tensor, case: QuantisedCase) -> None:
    eager, exact = run_case(eager_lora, case, backward=True)["dx"], exact_results(case, backward=True)["dx"]
    assert_within_bound({"dx": error(dx, eager, exact)})


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_values(device: Device, dtypes: Dtypes) -> None:
    """Within a tile, one tile, beyond it in every direction; more steps than the ring has stages."""
    for shape, p in [((1, 128, 8, 1), 0.5), ((64, 128, 128, 16), 0.0), ((70, 256, 328, 20), 0.25)]:
        case = make_quantised_case(shape, dtypes, dropout_p=p)
        dS = dense.down(case)
        with device.run() as run:
            dx = launch(run, case, dS)
        assert_right(dx, case)
        assert run.counters.bank_conflicts.matching(entry="gemm_4bit") == []
        with device.run() as run:
            expected = dense.launch(run, case, dS)
        assert torch.equal(dx, expected)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_kind_of_block_and_code(device: Device, settings: tuple[int, bool, str]) -> None:
    case = make_quantised_case((33, 384, 150, 4), Dtypes(BF16, F32), settings)
    dS = dense.down(case)
    with device.run() as run:
        dx = launch(run, case, dS)
    with device.run() as run:
        assert torch.equal(dx, dense.launch(run, case, dS))


def test_every_residue(device: Device) -> None:
    """Of M modulo an mma's rows, of N modulo a step and its pieces, and of the rank."""
    for i in range(1, 17):
        shape = (16 * (i % 5) + i, 128 * (i % 3 + 1), 16 * (i % 9) + 11 * i % 16 + 1, i)
        case = make_quantised_case(shape, Dtypes(F16, F32), dropout_p=i % 2 / 4)
        dS = dense.down(case)
        with device.run() as run:
            dx = launch(run, case, dS)
        with device.run() as run:
            assert torch.equal(dx, dense.launch(run, case, dS))


@pytest.mark.parametrize("arch", [80, 90])
def test_same_bits_in_any_order(device: Device, arch: int) -> None:
    case = make_quantised_case((140, 256, 200, 20), Dtypes(BF16, F32), dropout_p=0.1)
    dS, results = dense.down(case), []
    for reverse in (False, True):
        with device.run(arch=arch, limits=86 if arch == 80 else None, reverse=reverse) as run:
            results.append(launch(run, case, dS))
    assert torch.equal(*results)
    assert_right(results[0], case)


def test_what_is_read(device: Device) -> None:
    """Codes once per row of tiles, dy once per column of tiles, and no weight twice by any warp of a block."""
    M, K, N = 128, 256, 512
    case = make_quantised_case((M, K, N, 16), Dtypes(BF16, BF16))
    dS = dense.down(case)
    with device.run() as run:
        launch(run, case, dS, layout="plain")
    copied = run.counters.matching("cp.async", entry="gemm_4bit")
    assert copied.total("global_bytes") == M // 64 * N * K // 2 + K // 128 * M * N * 2
    assert copied.total("sectors") == copied.total("ideal_sectors")
    ahead = 16  # of depth: the fragments after the last are decoded too
    assert run.counters.matching("ld.shared.f32").total("executions") == M // 64 * (N + ahead) * K // 32
    assert run.counters.mma_count == M // 16 * (K // 8) * (N // 16 + 1)


@pytest.mark.parametrize(("K", "layout", "message"), [(64, "padded", "K is a multiple of 128"), (128, "odd", "16 bytes")])
def test_what_is_refused(device: Device, K: int, layout: str, message: str) -> None:
    case = make_quantised_case((4, K, 8, 2), Dtypes(BF16, F32))
    with pytest.raises(RuntimeError, match=f"qlora_backward_dx: .*{message}.*K = {K}, N = 8"), device.run() as run:
        launch(run, case, dense.down(case), layout=layout)
