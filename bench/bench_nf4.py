"""qlora_linear against what else multiplies by 4-bit weights, and against dense weights, all sides taking turns in one run.

    pytest bench/bench_nf4.py                one thread; LORA_OPS_BENCH_THREADS=2 for two

Each round times every side, one call or, for few rows, several in a row; a side's figure is the minimum of its calls. Ends with
a table, bench_out/nf4.csv and bench_out/nf4.{png,svg}; the README's table is rewritten when the whole bench ran. What a weight
costs that was not read a moment ago, as when a model decodes text: bench_decoding in bench_training_step.py.
"""

import time

import pytest
import torch
from sides import Case
from sides_4bit import sides_4bit

FP32, BF16 = torch.float32, torch.bfloat16
SECONDS = 5.0
# With few rows the weight's way into the core is all the time there is, and the side before has driven it out of the caches.
FEW_ROWS, IN_A_ROW = 64, 5

CASES = [(Case(2**i, 4096, 4096, 16, BF16, FP32), False) for i in range(12)]
CASES += [(Case(M, 4096, 4096, 16, FP32, FP32), False) for M in (1, 128)]
CASES += [(Case(512, 4096, 4096, 16, BF16, FP32), True)]


@pytest.mark.parametrize(
    ("case", "backward"),
    [pytest.param(*c, id=f"{c[0].name} {'forward+backward' if c[1] else 'forward'}") for c in CASES],
)
def bench_nf4(case: Case, backward: bool, benchmark, results_4bit) -> None:
    runs, bits = sides_4bit(case, backward)
    seconds: dict[str, list[float]] = {side: [] for side in runs}

    calls = IN_A_ROW if case.M <= FEW_ROWS else 1

    def turn() -> None:
        for side, run in runs.items():
            for _ in range(calls):
                start = time.perf_counter()
                run()
                seconds[side].append(time.perf_counter() - start)

    turn()
    once = sum(sum(times) for times in seconds.values())
    benchmark.pedantic(turn, rounds=int(min(max(SECONDS / once, 3), 60)))
    best = {side: min(times[calls:]) for side, times in seconds.items()}
    benchmark.extra_info.update({f"{side} ms": round(t * 1e3, 4) for side, t in best.items()})
    results_4bit.add(case, backward, best, bits)
