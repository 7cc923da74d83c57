"""y = x W0ᵀ + scaling · S Bᵀ + bias on a device, W0 in 4 bits: bit for bit the dense kernel on the decoded weight."""

import ctypes

import pytest
import test_cuda_lora_forward as dense
import torch
from compare import BF16, F16, F32, Dtypes, assert_within_bound, eager_lora, error
from compare import run as run_case
from cuda_structs import TILES, Matrix, QuantizedWeight, empty, laid_out, matrix, quantized
from four_bit import SETTINGS, QuantisedCase, exact_results, make_quantised_case
from ptx.device import Device, Run
from torch import Tensor

pytestmark = pytest.mark.cuda

DTYPES = [Dtypes(t, a) for t in (BF16, F16) for a in (t, F32)]


class QloraForward(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in "MKNr"),
        ("x", Matrix),
        ("weight", QuantizedWeight),
        *((name, Matrix) for name in ("lora_B", "bias", "y")),
        ("S", ctypes.c_void_p),
        ("scaling", ctypes.c_float),
        ("tile", ctypes.c_int),
    ]


def launch(
    run: Run,
    case: QuantisedCase,
    S: Tensor,
    *,
    tile: str = "automatic",
    layout: str = "padded",
    layout_out: str = "odd",
    adapter_transposed: bool = False,
) -> Tensor:
    (M, K), N, r = case.x.shape, case.weight.shape[0], case.lora_A.shape[0]
    x, lora_B, S, y = (
        laid_out(case.x, layout),
        laid_out(case.lora_B, layout_out, adapter_transposed),
        S.clone(),
        empty(M, N, case.x.dtype, layout_out),
    )
    bias = None if case.bias is None else case.bias.clone()
    for t in (x, lora_B, bias, S):
        if t is not None:
            run.register(t, readonly=True)
    weight = quantized(run, case.qweight)
    rest = map(matrix, (lora_B, bias, y))
    params = QloraForward(M, K, N, r, matrix(x), weight, *rest, S.data_ptr(), case.scaling, TILES[tile])
    run.library.lora_ops_last_error.restype = ctypes.c_char_p
    if run.library.lora_ops_qlora_forward(ctypes.byref(params), None):
        raise RuntimeError(run.library.lora_ops_last_error().decode())
    return y


def assert_right(y: Tensor, case: QuantisedCase) -> None:
    eager, exact = run_case(eager_lora, case, backward=False)["y"], exact_results(case, backward=False)["y"]
    assert_within_bound({"y": error(y, eager, exact)})


@pytest.mark.parametrize("tile", ["small", "medium"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_values(device: Device, dtypes: Dtypes, tile: str) -> None:
    """Within a tile, one tile, beyond it in every direction; more steps than the ring has stages."""
    for shape in [(1, 128, 8, 1), (64, 256, 128, 16), (70, 640, 136, 20)]:
        case = make_quantised_case(shape, dtypes)
        S = dense.down(case)
        with device.run() as run:
            y = launch(run, case, S, tile=tile)
        assert_right(y, case)
        assert run.counters.bank_conflicts.matching(entry="gemm_4bit") == []
        with device.run() as run:
            expected = dense.launch(run, case, S)
        assert torch.equal(y, expected)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("tile", ["small", "medium"])
def test_every_kind_of_block_and_code(device: Device, tile: str, settings: tuple[int, bool, str]) -> None:
    case = make_quantised_case((33, 384, 150, 4), Dtypes(BF16, F32), settings)
    S = dense.down(case)
    with device.run() as run:
        y = launch(run, case, S, tile=tile)
    with device.run() as run:
        assert torch.equal(y, dense.launch(run, case, S))


@pytest.mark.parametrize("tile", ["small", "medium"])
def test_every_residue(device: Device, tile: str) -> None:
    """Of M modulo an mma's rows, of N modulo a chunk's columns and every tile, and of the rank."""
    for i in range(1, 17):
        case = make_quantised_case((16 * (i % 5) + i, 128 * (i % 3 + 1), 16 * (i % 9) + 11 * i % 16 + 1, i), Dtypes(F16, F32))
        S = dense.down(case)
        with device.run() as run:
            y = launch(run, case, S, tile=tile)
        with device.run() as run:
            assert torch.equal(y, dense.launch(run, case, S))


@pytest.mark.parametrize(("arch", "tile"), [(80, "small"), (80, "medium"), (90, "small"), (90, "medium")])
def test_same_bits_in_any_order(device: Device, arch: int, tile: str) -> None:
    case = make_quantised_case((140, 512, 136, 20), Dtypes(BF16, F32))
    S, results = dense.down(case), []
    for reverse in (False, True):
        with device.run(arch=arch, limits=86 if arch == 80 else None, reverse=reverse) as run:
            results.append(launch(run, case, S, tile=tile))
    assert torch.equal(*results)
    assert_right(results[0], case)


def test_what_is_read(device: Device) -> None:
    """Codes once per row of tiles, x once per column of tiles, and no weight twice by any warp of a block."""
    M, K, N = 128, 512, 256
    case = make_quantised_case((M, K, N, 16), Dtypes(BF16, BF16))
    S = dense.down(case)
    with device.run() as run:
        launch(run, case, S, tile="medium", layout="plain")
    copied = run.counters.matching("cp.async", entry="gemm_4bit")
    assert copied.total("global_bytes") == M // 64 * N * K // 2 + N // 128 * M * K * 2
    assert copied.total("sectors") == copied.total("ideal_sectors")
    ahead = 16  # of depth: the fragments after the last are decoded too
    assert run.counters.matching("ld.shared.f32").total("executions") == M // 64 * N * (K + ahead) // 32
    assert run.counters.mma_count == M // 16 * (N // 8) * (K // 16 + 1)


@pytest.mark.parametrize(("K", "layout", "message"), [(64, "padded", "K is a multiple of 128"), (128, "odd", "16 bytes")])
def test_what_is_refused(device: Device, K: int, layout: str, message: str) -> None:
    for M, name in ((4, "qlora_gemv"), (9, "qlora_forward")):
        case = make_quantised_case((M, K, 8, 2), Dtypes(BF16, F32))
        with pytest.raises(RuntimeError, match=f"{name}: .*{message}.*K = {K}, N = 8"), device.run() as run:
            launch(run, case, dense.down(case), layout=layout)
