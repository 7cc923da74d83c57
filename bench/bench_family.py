"""What LoRA's relatives cost: a training step of SmolLM2 in bf16, 2 x 256 tokens, r = 16 in all on all linear layers, fp32
adapters, AdamW. LoRA and a relative take turns; the figure is the minimum of LORA_OPS_BENCH_STEPS (8) steps.

    pytest bench/bench_family.py -s      two threads unless LORA_OPS_BENCH_THREADS says otherwise
"""

from collections.abc import Callable

import pytest
import torch
from bench_training_step import STEPS, minima, smollm2, step, threads  # noqa: F401  (a fixture)
from report_rows import Rows
from torch import nn

import lora_ops
from lora_ops import compose, factors

R = 16
SCALING = 2.0


def with_factors(model: nn.Module, make: Callable[[str, nn.Module], nn.Module]) -> nn.Module:
    return lora_ops.add_factors(model, make, scaling=SCALING, adapter_dtype=torch.float32)


def with_lora(model: nn.Module, **options: object) -> nn.Module:
    config = lora_ops.LoraConfig(r=R, lora_alpha=SCALING * R, target_modules="all-linear", **options)  # type: ignore[arg-type]
    return lora_ops.add_lora(model, config)


def with_vera(model: nn.Module) -> nn.Module:
    pairs: dict[tuple[int, int], nn.Module] = {}

    def make(name: str, linear: nn.Module) -> nn.Module:
        shape = linear.out_features, linear.in_features
        if shape not in pairs:
            pairs[shape] = factors.tied_pair(*shape, r=R)
        return factors.vera(linear, pairs[shape])

    return with_factors(model, make)


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "LoRA": with_lora,
    "DoRA": lambda model: with_lora(model, use_dora=True),
    "VeRA": with_vera,
    "LoRA-XS": lambda model: with_factors(model, lambda _, linear: lora_ops.init.LoraXS(linear.weight, R)),
    "AdaLoRA": lambda model: with_factors(model, lambda _, linear: factors.gated(linear, r=R)),
    "8 experts of rank 2": lambda model: with_factors(model, lambda _, linear: compose.LoraMixture.of(linear, 8, R // 8)),
}

COLUMNS: dict[str, Rows.Cell] = {
    "method": lambda row: row["method"],
    "step": lambda row: f"{row['s']:.3f} s",
    "LoRA's": lambda row: f"{row['LoRA s']:.3f} s",
    "over LoRA's": lambda row: f"{row['s'] / row['LoRA s']:.3f} x",
}
CAPTION = "A training step of SmolLM2 in bf16, 2 x 256 tokens, r = 16 in all on all linear layers, two threads."


@pytest.mark.parametrize("name", [name for name in METHODS if name != "LoRA"])
def bench_family(name, benchmark, tmp_path_factory, rows_of, capsys) -> None:
    """Each beside LoRA alone: with all of them in one process, what malloc gives back to the system and takes again depends on
    the others' memory."""
    cache = tmp_path_factory.getbasetemp().parent
    torch.manual_seed(0)
    ids = torch.randint(0, 49152, (2, 256))
    runs = {side: step(METHODS[side](smollm2(cache)), ids) for side in ("LoRA", name)}
    best = minima(runs, benchmark, STEPS)
    results = rows_of("bench-family", CAPTION, COLUMNS)
    results.add({"method": name, "s": best[name], "LoRA s": best["LoRA"]})
    with capsys.disabled():
        print(f"\n{results.line(results.rows[-1])}", end="")
