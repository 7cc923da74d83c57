"""Embeddings and convolutions of PEFT's, patched and stock, and the bare layers, all sides taking turns.

    pytest bench/bench_other_layers.py -s      one thread; LORA_OPS_BENCH_THREADS=2 for two

The figures are minima of many calls. Convolutions are those that are matrix products; x has its channels first in memory,
as torch makes it, or last.
"""

import copy
import os
import time

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from lora_ops.integrations import peft

R, SECONDS = 16, 3.0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CONVOLUTIONS = {
    "1x1, 320 to 320 channels, 64x64": (lambda: nn.Conv2d(320, 320, 1), (1, 320, 64, 64)),
    "1x1, 1280 to 1280 channels, 16x16": (lambda: nn.Conv2d(1280, 1280, 1), (2, 1280, 16, 16)),
    "1x1, 64 to 256 channels, 56x56": (lambda: nn.Conv2d(64, 256, 1), (4, 64, 56, 56)),
    "1x1, 256 to 64 channels, 56x56": (lambda: nn.Conv2d(256, 64, 1), (2, 256, 56, 56)),
    "1x1 of stride 2, 256 to 512 channels, 56x56": (lambda: nn.Conv2d(256, 512, 1, 2), (2, 256, 56, 56)),
    "patches of 16x16, 3 to 768 channels": (lambda: nn.Conv2d(3, 768, 16, 16), (4, 3, 224, 224)),
    "patches of 2x14x14, 3 to 1152 channels": (lambda: nn.Conv3d(3, 1152, (2, 14, 14), (2, 14, 14)), (1, 3, 2, 224, 224)),
    "1, 512 to 2048 channels, 500": (lambda: nn.Conv1d(512, 2048, 1), (2, 512, 500)),
}
CASES = [(name, dtype, last) for name in CONVOLUTIONS for dtype in DTYPES for last in (False, True)]
CASES = [case for case in CASES if not case[2] or len(CONVOLUTIONS[case[0]][1]) == 4]
EMBEDDINGS = [(V, N, rows, dtype) for V, N, rows in ((49152, 576, 512), (32000, 2048, 2048)) for dtype in DTYPES]


def sides(base: nn.Module) -> tuple[nn.Module, nn.Module]:
    """PEFT's layer, stock and patched."""
    config = LoraConfig(r=R, target_modules=["layer"], init_lora_weights=False)
    stock = inject_adapter_in_model(config, nn.ModuleDict({"layer": base.requires_grad_(False)}))
    return stock.layer, peft.patch(copy.deepcopy(stock)).layer


def minima(layers: list[nn.Module], x: Tensor, backward: bool) -> list[float]:
    best = [float("inf")] * len(layers)
    end = time.perf_counter() + SECONDS
    dy = torch.randn_like(layers[-1](x))
    while time.perf_counter() < end:
        for i, layer in enumerate(layers):
            start = time.perf_counter()
            with torch.set_grad_enabled(backward):
                y = layer(x)
                if backward:
                    y.backward(dy)
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def report(name: str, base: nn.Module, x: Tensor) -> None:
    torch.set_num_threads(int(os.environ.get("LORA_OPS_BENCH_THREADS", "1")))
    stock, patched = sides(base)
    bare, of_stock, of_patched = minima([base, stock, patched], x, backward=False)
    x = x.requires_grad_() if x.is_floating_point() else x
    both_of_stock, both = minima([stock, patched], x, backward=True)
    print(
        f"\n{name:58} forward: bare {bare * 1e3:7.2f} ms, PEFT {of_stock * 1e3:7.2f}, patched {of_patched * 1e3:7.2f}: "
        f"{of_stock / of_patched:.2f} x   forward+backward: PEFT {both_of_stock * 1e3:7.2f}, patched {both * 1e3:7.2f}: "
        f"{both_of_stock / both:.2f} x"
    )


@pytest.mark.parametrize(("name", "dtype", "channels_last"), CASES, ids=str)
def bench_convolution(name: str, dtype: str, channels_last: bool) -> None:
    torch.manual_seed(0)
    make, shape = CONVOLUTIONS[name]
    x = torch.randn(shape).to(DTYPES[dtype])
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    report(f"{name}, {dtype}{', channels last' * channels_last}", make().to(DTYPES[dtype]), x)


@pytest.mark.parametrize(("V", "N", "rows", "dtype"), EMBEDDINGS, ids=str)
def bench_embedding(V: int, N: int, rows: int, dtype: str) -> None:
    torch.manual_seed(0)
    report(f"embedding, {V} x {N}, {rows} rows, {dtype}", nn.Embedding(V, N).to(DTYPES[dtype]), torch.randint(0, V, (rows,)))
