"""What LoRA-GA's initialisation costs beside the training that follows: SmolLM2 in bf16, r = 16 on all linear layers, batches
of 2 x 256 tokens. Seconds of the initialisation, over those of 300 steps; and the peak memory of either, each number of batches
in a process of its own.

    pytest bench/bench_lora_ga.py -s      two threads
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from bench_training_step import smollm2_files
from report_rows import Rows

import lora_ops
from lora_ops.init import initialize

STEPS, BATCHES, TIMED_STEPS, THREADS = 300, (1, 4), 4, 2


def peak(run: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and MiB of resident memory at most, while it runs (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return seconds, int(line.split()[1]) / 1024


def measure(files: str, batches: int) -> dict[str, float]:
    """With no batches: plain LoRA."""
    torch.set_num_threads(THREADS)
    model = transformers.AutoModelForCausalLM.from_pretrained(files, dtype=torch.bfloat16).train()
    for p in model.parameters():
        p.data = p.data.clone()  # no pages of the file, which count when they are read
    ids = torch.randint(0, 49152, (max(batches, TIMED_STEPS), 2, 256))
    data = [{"input_ids": block, "labels": block} for block in ids]
    lora_ops.add_lora(model, lora_ops.LoraConfig(r=16, lora_alpha=16, use_rslora=True, target_modules="all-linear"))
    found = {}
    if batches:
        found["init s"], found["init MiB"] = peak(lambda: initialize(model, "lora_ga", data[:batches]) and None)
    optimizer = torch.optim.AdamW(lora_ops.lora_parameters(model), lr=1e-4)
    seconds = []

    def step(batch: dict[str, torch.Tensor]) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for batch in data[:TIMED_STEPS]:
        s, found["training MiB"] = peak(lambda batch=batch: step(batch))
        seconds.append(s)
    return found | {"step s": min(seconds)}


def bench_lora_ga(benchmark, tmp_path_factory, rows_of, capsys) -> None:
    files = str(smollm2_files(tmp_path_factory.getbasetemp().parent))
    runs = {}

    def all_of_them() -> None:
        for batches in (0, *BATCHES):
            command = [sys.executable, __file__, files, str(batches)]
            done = subprocess.run(command, capture_output=True, check=True, text=True)
            runs[batches] = json.loads(done.stdout.splitlines()[-1])

    benchmark.pedantic(all_of_them, rounds=1)
    results = rows_of("bench-lora_ga", CAPTION.format(threads=THREADS, steps=STEPS), COLUMNS)
    for batches in BATCHES:
        row = {"batches": batches, **runs[batches], "LoRA MiB": runs[0]["training MiB"]}
        results.add(row)
        with capsys.disabled():
            print(f"\n{results.line(row)}")


CAPTION = (
    "SmolLM2-135M in bf16, {threads} threads, batches of 2 x 256 tokens, fp32 adapters of r = 16 on all linear layers; share: "
    "of {steps} training steps. Peaks of resident memory, the model in it; a layer that LoRA-GA starts keeps W0, too."
)
COLUMNS: dict[str, Rows.Cell] = {
    "batches": lambda row: str(row["batches"]),
    "initialisation": lambda row: f"{row['init s']:.1f} s",
    "a step": lambda row: f"{row['step s']:.2f} s",
    "share": lambda row: f"{row['init s'] / (STEPS * row['step s']):.1%}",
    "memory, initialisation": lambda row: f"{row['init MiB']:.0f} MiB",
    "memory, training": lambda row: f"{row['training MiB']:.0f} MiB",
    "memory, training of LoRA": lambda row: f"{row['LoRA MiB']:.0f} MiB",
}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
