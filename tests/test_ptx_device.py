"""The rig itself: host code, launch limits and memory of the device that runs PTX."""

import ctypes
from pathlib import Path

import pytest
import torch
from ptx.device import Device

pytestmark = pytest.mark.cuda

KERNELS = Path(__file__).parent / "ptx" / "kernels"

INVALID_VALUE, INVALID_CONFIGURATION, OUT_OF_RESOURCES = 1, 9, 701


class Saxpy(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p), ("y", ctypes.c_void_p), ("a", ctypes.c_float), ("n", ctypes.c_int)]


@pytest.fixture(scope="module")
def self_test(nvcc: str) -> Device:
    return Device([KERNELS / "self_test.cu"])


def pointer(t: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("n", [1, 128, 1000])
def test_a_struct_by_value(self_test: Device, arch: int, n: int) -> None:
    with self_test.run(arch) as run:
        x, y = torch.randn(n), torch.randn(n)
        expected = 2.5 * x + y
        assert run.library.self_test_saxpy(ctypes.byref(Saxpy(x.data_ptr(), y.data_ptr(), 2.5, n)), None) == 0
    torch.testing.assert_close(y, expected)


def test_bounds_are_exact(self_test: Device) -> None:
    with self_test.run(check=False) as run:
        x, y = torch.randn(100), torch.randn(99)
        run.library.self_test_saxpy(ctypes.byref(Saxpy(x.data_ptr(), y.data_ptr(), 2.5, 100)), None)
        assert any(r.startswith("memcheck: self_test.cu:") and "out of bounds" in r for r in run.reports)


def test_empty_is_uninitialised(self_test: Device) -> None:
    with pytest.raises(AssertionError, match="initcheck"), self_test.run() as run:
        x, y = torch.empty(64), torch.randn(64)
        x[:63] = 1.0
        run.library.self_test_saxpy(ctypes.byref(Saxpy(x.data_ptr(), y.data_ptr(), 2.5, 64)), None)


@pytest.mark.parametrize("reverse", [False, True])
def test_shared_memory(self_test: Device, reverse: bool) -> None:
    with self_test.run(reverse=reverse) as run:
        x, sums = torch.randn(5, 128), torch.empty(5)
        assert run.library.self_test_sum(pointer(x), pointer(sums), 5, 128, 512, 0) == 0
    torch.testing.assert_close(sums, x.sum(1))


def test_mma(self_test: Device) -> None:
    with self_test.run() as run:
        A, B = torch.randn(16, 16, dtype=torch.bfloat16), torch.randn(8, 16, dtype=torch.bfloat16)
        D = torch.empty(16, 8)
        assert run.library.self_test_mma(pointer(A), pointer(B), pointer(D)) == 0
    torch.testing.assert_close(D, A.float() @ B.float().T)
    assert run.counters.mma_count == 1


@pytest.mark.parametrize(
    ("limits", "blocks", "threads", "shared_bytes", "opt_in", "error"),
    [
        (80, 5, 128, 48 * 1024, 0, 0),
        (80, 5, 128, 48 * 1024 + 4, 0, INVALID_VALUE),
        (80, 5, 128, 163 * 1024, 163 * 1024, 0),
        (80, 5, 128, 163 * 1024, 163 * 1024 + 4, INVALID_VALUE),
        (86, 5, 128, 99 * 1024, 99 * 1024, 0),
        (86, 5, 128, 99 * 1024 + 4, 99 * 1024 + 4, INVALID_VALUE),
        (80, 0, 128, 512, 0, INVALID_CONFIGURATION),
        (80, 5, 1025, 512, 0, INVALID_CONFIGURATION),
        (80, 5, 160, 640, 0, OUT_OF_RESOURCES),
    ],
)
def test_launches_that_a_device_refuses(
    self_test: Device, limits: int, blocks: int, threads: int, shared_bytes: int, opt_in: int, error: int
) -> None:
    with self_test.run(80, limits=limits) as run:
        x, sums = torch.randn(5, 128), torch.empty(5)
        got = run.library.self_test_sum(pointer(x), pointer(sums), blocks, threads, shared_bytes, opt_in)
    assert got == error


def test_what_a_launch_moves(self_test: Device) -> None:
    """x in two halves of one storage, each read by a launch of its own; y by both."""
    with self_test.run() as run:
        x, y = torch.randn(200), torch.randn(100)
        for half in (x[:100], x[100:]):
            run.library.self_test_saxpy(ctypes.byref(Saxpy(half.data_ptr(), y.data_ptr(), 2.5, 100)), None)
        values, sums = torch.randn(5, 128), torch.empty(5)
        run.library.self_test_sum(pointer(values), pointer(sums), 5, 128, 512, 0)
    assert [(launch.grid, launch.block, launch.shared_bytes) for launch in run.launches] == [
        ((1, 1, 1), (128, 1, 1), 0),
        ((1, 1, 1), (128, 1, 1), 0),
        ((5, 1, 1), (128, 1, 1), 512),
    ]
    assert "sum_kernel" in run.launches[2].entry
    assert run.traffic(x) == (800, 0, 800, 0)
    assert run.traffic(y, "saxpy") == (800, 800, 800, 800)
    assert run.traffic(y, "sum") == (0, 0, 0, 0)
    everything = run.traffic()
    assert everything.read == 800 + 800 + values.nbytes and everything.written == 800 + sums.nbytes
    assert everything.read + everything.written == run.counters.total("global_bytes")


def test_what_is_read_again_is_distinct_once(self_test: Device) -> None:
    """x and y are the same memory: read by two instructions. A second launch counts anew."""
    with self_test.run() as run:
        y = torch.randn(100)
        for _ in range(2):
            run.library.self_test_saxpy(ctypes.byref(Saxpy(y.data_ptr(), y.data_ptr(), 2.5, 100)), None)
    assert run.traffic(y) == (2 * 800, 2 * 400, 2 * 400, 2 * 400)
