"""lora_linear against what a user would have instead, all sides taking turns in one run.

    pytest bench/                            one thread; LORA_OPS_BENCH_THREADS=2 for two
    pytest bench/ -k "bf16 and forward"      a part of it

Each round times every side once; a side's figure is the minimum of its rounds. Ends with a table, bench_out/bench.csv and
bench_out/roofline.{png,svg}; the README's table is rewritten when the whole bench ran.
"""

import time

import pytest
import torch
from sides import Case, sides

FP32, BF16 = torch.float32, torch.bfloat16
SHAPES = ((576, 1536), (2048, 2048), (4096, 4096), (4096, 11008))

FORWARD = [Case(M, K, N, 16, dtype, FP32) for K, N in SHAPES for M in (1, 16, 64, 512) for dtype in (FP32, BF16)]
FORWARD += [Case(512, 2048, 2048, r, BF16, BF16) for r in (8, 64)]
BACKWARD = [Case(512, K, N, 16, dtype, FP32) for K, N in SHAPES for dtype in (FP32, BF16)]
BACKWARD += [Case(512, 2048, 2048, 16, dtype, FP32, dropout=0.05) for dtype in (FP32, BF16)]
BACKWARD += [Case(512, 2048, 2048, r, BF16, BF16) for r in (8, 64)]


def _rounds(case: Case) -> int:
    """Many for what is short, few for what is long: about a second per side."""
    seconds = 4 * case.flops("eager", True) / 1e11
    return int(min(max(1.0 / seconds, 4), 60))


@pytest.mark.parametrize(
    ("case", "backward"),
    [
        pytest.param(case, backward, id=f"{case.name} {'forward+backward' if backward else 'forward'}")
        for backward, cases in ((False, FORWARD), (True, BACKWARD))
        for case in cases
    ],
)
def bench_lora_linear(case: Case, backward: bool, benchmark, results) -> None:
    runs = sides(case, backward)
    seconds = {side: [] for side in runs}

    def turn() -> None:
        for side, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[side].append(time.perf_counter() - start)

    benchmark.pedantic(turn, rounds=_rounds(case), warmup_rounds=1)
    best = {side: min(times[1:]) for side, times in seconds.items()}
    benchmark.extra_info.update({f"{side} ms": round(t * 1e3, 4) for side, t in best.items()})
    results.add(case, backward, best)
