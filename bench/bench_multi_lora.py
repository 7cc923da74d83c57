"""A mixed batch against lora_linear with one adapter for all rows, and against PEFT's mixed batch, all sides taking turns.

    pytest bench/bench_multi_lora.py -s      one thread; LORA_OPS_BENCH_THREADS=2 for two

Adapters lie in the bank; at most as many as there are rows occur, drawn anew for each round, the same for every side. A side's
figure is the minimum of its calls.
"""

import time

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import lora_ops

M, K, N, R, SCALING = 64, 2048, 2048, 16, 2.0
SECONDS = 3.0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CASES = [(count, "bf16", adapter, False) for adapter in ("bf16", "fp32") for count in (1, 8, 64, 1000)]
CASES += [(8, "fp32", "fp32", False), (8, "bf16", "bf16", True), (64, "bf16", "bf16", True)]


def peft_layer(base: nn.Linear, bank: lora_ops.AdapterBank, adapters: list[tuple[Tensor, Tensor]]) -> nn.Module:
    config = LoraConfig(r=R, lora_alpha=SCALING * R, target_modules=["layer"], init_lora_weights=False)
    first, *others = bank.names
    layer = inject_adapter_in_model(config, nn.ModuleDict({"layer": base}), adapter_name=first).layer
    for name in others:
        layer.update_layer(name, R, lora_alpha=SCALING * R, config=config)
    for name, (A, B) in zip(bank.names, adapters, strict=True):
        layer.lora_A[name].weight, layer.lora_B[name].weight = nn.Parameter(A.detach()), nn.Parameter(B.detach())
    return layer.eval()


@pytest.mark.parametrize(("count", "dtype", "adapter_dtype", "backward"), CASES, ids=str)
def bench_multi_lora(count: int, dtype: str, adapter_dtype: str, backward: bool, benchmark, rows_of) -> None:
    torch.manual_seed(0)
    base = nn.Linear(K, N, bias=False, dtype=DTYPES[dtype]).requires_grad_(False)
    x, dy = torch.randn(M, K).to(DTYPES[dtype]).requires_grad_(backward), torch.randn(M, N).to(DTYPES[dtype])

    def adapter() -> tuple[Tensor, Tensor]:
        made = (torch.randn(R, K) / K**0.5, torch.randn(N, R))
        return tuple(t.to(DTYPES[adapter_dtype]).requires_grad_(backward) for t in made)  # type: ignore[return-value]

    adapters, bank = [adapter() for _ in range(count)], lora_ops.AdapterBank()
    for i, (A, B) in enumerate(adapters):
        bank.add(f"adapter{i}", A, B, SCALING)
    peft = peft_layer(base, bank, adapters)
    leaves = [t for pair in adapters for t in pair] + [x]

    def ran(forward) -> float:  # type: ignore[no-untyped-def]
        for leaf in leaves:
            leaf.grad = None
        start = time.perf_counter()
        with torch.set_grad_enabled(backward):
            y = forward()
            if backward:
                y.backward(dy)
        return time.perf_counter() - start

    seconds: dict[str, list[float]] = {"one adapter": [], "mixed": [], "peft": []}

    def turn() -> None:
        ids = torch.arange(M) % count if count <= M else torch.randperm(count)[:M]
        ids = ids[torch.randperm(M)]
        names = [f"adapter{i}" for i in ids.tolist()]
        A, B = adapters[int(ids[0])]
        seconds["one adapter"].append(ran(lambda: lora_ops.lora_linear(x, base.weight, A, B, scaling=SCALING)))
        seconds["mixed"].append(ran(lambda: lora_ops.multi_lora_linear(x, base.weight, bank, ids)))
        seconds["peft"].append(ran(lambda: peft(x, adapter_names=names)))

    turn()
    once = sum(times[0] for times in seconds.values())
    benchmark.pedantic(turn, rounds=int(min(max(SECONDS / once, 5), 200)))
    one, mixed, loop = (min(times[1:]) for times in seconds.values())
    row = {"adapters": count, "x": dtype, "dtype": adapter_dtype, "pass": "forward+backward" if backward else "forward"}
    row |= {"one ms": one * 1e3, "mixed ms": mixed * 1e3, "peft ms": loop * 1e3}
    benchmark.extra_info.update(row)
    caption = (
        f"{M} rows, {K} x {N}, r = {R}, {torch.get_num_threads()} thread(s). Minimum of many rounds, all sides taking turns."
    )
    results = rows_of("bench-multi", caption, COLUMNS)
    results.add(row)
    print(f"\n{results.line(row)}")


COLUMNS = {
    "adapters": lambda row: str(row["adapters"]),
    "pass": lambda row: row["pass"],
    "x": lambda row: row["x"],
    "A and B": lambda row: row["dtype"],
    "one adapter": lambda row: f"{row['one ms']:.2f} ms",
    "mixed": lambda row: f"{row['mixed ms']:.2f} ms",
    "PEFT's loop": lambda row: f"{row['peft ms']:.2f} ms",
    "over one adapter": lambda row: f"{row['mixed ms'] / row['one ms']:.2f} x",
    "faster than PEFT": lambda row: f"{row['peft ms'] / row['mixed ms']:.2f} x",
}
