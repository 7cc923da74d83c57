"""Calls leave no memory behind."""

import ctypes
import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzzing import FACTORS, Call
from test_nonfinite import KINDS, spec
from torch import nn

import lora_ops
from lora_ops import LoraConfig

FIELDS = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]


class MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


def in_use() -> int:
    """Bytes that malloc has given out: what a sanitizer's says, or glibc's."""
    process = ctypes.CDLL(None)
    if hasattr(process, "__sanitizer_get_current_allocated_bytes"):
        counter = process.__sanitizer_get_current_allocated_bytes
        counter.restype = ctypes.c_size_t
        return counter()
    if not hasattr(process, "mallinfo2"):
        pytest.skip("needs glibc 2.33 or later")
    process.mallinfo2.restype = MallInfo
    info = process.mallinfo2()
    return info.uordblks + info.hblkhd


def refused() -> None:
    with pytest.raises(ValueError):
        lora_ops.lora_linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 2), torch.ones(4, 1), scaling=1.0)


def calls() -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {"refused": refused}
    for op in KINDS:
        factors = frozenset() if op.startswith("mixed") else frozenset(FACTORS)
        for name, of in ((op, frozenset()), (f"{op}, general", factors)):
            options = {"dropout_p": 0.5, "dtypes": (torch.bfloat16, torch.float32), "draw": 2}
            found[name] = Call(spec(op, ((41,), 64, 33), "none", "nan", factors=of, **options)).run
    weight = torch.randn(40, 33)
    found["quantise"] = lambda: lora_ops.quantize_nf4(weight).dequantize()
    found["state"] = lambda: lora_ops.NF4Weight.from_bitsandbytes(lora_ops.quantize_nf4(weight).to_bitsandbytes())
    found["pack"] = lambda: lora_ops.pack_weight(weight, torch.float32)
    return found


@pytest.mark.parametrize("name", calls())
def test_calls_leave_nothing_behind(name: str) -> None:
    call = calls()[name]
    for _ in range(20):
        call()
    before = in_use()
    for _ in range(200):
        call()
    grown = in_use() - before
    assert grown < 200 * 16, f"{grown} bytes more after 200 calls"  # less than one smallest block each


def test_adapter_files_leave_nothing_behind(tmp_path: Path) -> None:
    """Nor does what reads safetensors: of Python's memory, which malloc does not tell."""
    config = LoraConfig(r=300, target_modules=["0"], init_lora_weights=False)
    lora_ops.save_adapter(lora_ops.add_lora(nn.Sequential(nn.Linear(400, 500)), config), tmp_path)
    model = nn.Sequential(nn.Linear(400, 500))

    def grown(calls: int) -> int:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(calls):
            lora_ops.load_adapter(model, tmp_path)
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before

    tracemalloc.start()
    try:
        grown(50)
        bytes_more = min(grown(100) for _ in range(4))  # what is lost is lost every time
    finally:
        tracemalloc.stop()
    assert bytes_more < 100 * 48, f"{bytes_more} bytes more after 100 files"  # less than two integers each
