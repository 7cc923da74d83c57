"""Quantising to 4 bits and back on a device: the CPU's results, bit for bit."""

import ctypes

import pytest
import torch
from compare import BF16, F16, F32
from cuda_structs import QuantizedWeight, quantized
from four_bit import SETTINGS
from ptx.device import Device, Run
from torch import Tensor

from lora_ops import NF4Weight, quantize_nf4
from lora_ops.quant import layout

pytestmark = pytest.mark.cuda

every_dtype = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
every_arch = pytest.mark.parametrize("arch", [80, 90])
# Every kind of row's end: nothing, a short tail, a whole chunk.
WIDTHS = [*range(1, 131, 3), 128, 192, 193, 256, 300, 384, 1000, 1100]


class Quantize4Bit(ctypes.Structure):
    _fields_ = [
        ("N", ctypes.c_int64), ("K", ctypes.c_int64), ("quant_type", ctypes.c_int), ("blocksize", ctypes.c_int64),
        ("weight", ctypes.c_void_p), ("dtype", ctypes.c_int), ("codes", ctypes.c_void_p), ("absmax", ctypes.c_void_p),
    ]  # fmt: skip


class Dequantize4Bit(ctypes.Structure):
    _fields_ = [
        ("N", ctypes.c_int64), ("K", ctypes.c_int64), ("weight", QuantizedWeight), ("out", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
    ]  # fmt: skip


def launch(run: Run, op: str, params: ctypes.Structure) -> None:
    run.library.lora_ops_last_error.restype = ctypes.c_char_p
    if getattr(run.library, f"lora_ops_{op}")(ctypes.byref(params), None):
        raise RuntimeError(run.library.lora_ops_last_error().decode())


def quantize(run: Run, weight: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    N, K = weight.shape
    run.register(weight, readonly=True)
    codes = torch.empty(N, layout.row_bytes(K), dtype=torch.uint8)
    absmax = torch.empty(-(-N * K // blocksize))
    launch(run, "quantize_4bit", Quantize4Bit(
        N, K, layout.QUANT_TYPES[quant_type], blocksize, weight.data_ptr(), layout.DTYPES[weight.dtype], codes.data_ptr(),
        absmax.data_ptr(),
    ))  # fmt: skip
    return codes, absmax


def dequantize(run: Run, qweight: NF4Weight, dtype: torch.dtype) -> Tensor:
    out = torch.empty(qweight.shape, dtype=dtype)
    weight = quantized(run, qweight)
    launch(run, "dequantize_4bit", Dequantize4Bit(*qweight.shape, weight, out.data_ptr(), layout.DTYPES[dtype]))
    return out


@every_arch
@every_dtype
def test_dequantize(device: Device, dtype, arch):
    """Both codes, nested scales and not, blocks within rows and across them; whole chunks move 16 bytes at a time."""
    for i, K in enumerate(WIDTHS):
        qweight = quantize_nf4(torch.randn(1 + i % 9, K), *SETTINGS[i % len(SETTINGS)])
        with device.run(arch=arch) as run:
            actual = dequantize(run, qweight, dtype)
        assert torch.equal(actual, qweight.dequantize(dtype)), qweight
        if K % 128 == 0:
            stores = run.counters.matching("st.global")
            assert stores.total("global_bytes") == stores.matching("st.global.v4").total("global_bytes") == actual.nbytes
            # A thread's eight weights in fp32 are a sector, written in two stores.
            assert stores.total("sectors") == stores.total("ideal_sectors") * (2 if dtype == F32 else 1)


@every_arch
@every_dtype
def test_quantize(device: Device, dtype, arch):
    """Among the blocks one of zeros, or one of the smallest numbers that there are."""
    for i, K in enumerate(WIDTHS):
        blocksize, _, quant_type = SETTINGS[i % len(SETTINGS)]
        weight = torch.randn(1 + i % 9, K).to(dtype)
        weight.view(-1)[blocksize : 2 * blocksize] = (0, torch.finfo(dtype).tiny / 4)[i % 2]
        codes, absmax = layout.quantize(weight, blocksize, quant_type)
        with device.run(arch=arch) as run:
            actual = quantize(run, weight, blocksize, quant_type)
        assert torch.equal(actual[0], codes) and torch.equal(actual[1], absmax), (weight.shape, blocksize, quant_type)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_shows_in_its_scales(device: Device, bad):
    """In those of the blocks that it is in, and in no others."""
    weight = torch.randn(3, 100)
    weight[1, 99] = weight[2, 99] = bad
    with device.run() as run:
        _, absmax = quantize(run, weight, 32, "nf4")
    assert absmax.isfinite().logical_not().nonzero().flatten().tolist() == [199 // 32, 299 // 32]


@pytest.mark.parametrize("blocksize", [16, 48])
def test_what_is_refused(device: Device, blocksize):
    message = "quantize_4bit: the block size is a power of two from 32, N = 3, K = 64"
    with pytest.raises(RuntimeError, match=message), device.run() as run:
        quantize(run, torch.randn(3, 64), blocksize, "nf4")
