"""What LoRA-GA's initialisation costs beside the training that follows: SmolLM2 in bf16, r = 16 on all linear layers, batches
of 2 x 256 tokens. Seconds of the initialisation, over those of 300 steps; and the peak memory of either, in processes of their
own.
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

import lora_ops
from lora_ops.init import initialize

STEPS, BATCHES = 300, (1, 4)
TIMED_STEPS = 4


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
    torch.set_num_threads(2)
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


def bench_lora_ga(benchmark, tmp_path_factory, capsys) -> None:
    files = str(smollm2_files(tmp_path_factory.getbasetemp().parent))
    runs = {}

    def all_of_them() -> None:
        for batches in (0, *BATCHES):
            command = [sys.executable, __file__, files, str(batches)]
            runs[batches] = json.loads(
                subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines()[-1]
            )

    benchmark.pedantic(all_of_them, rounds=1)
    with capsys.disabled():
        print(f"\nLoRA: a step {runs[0]['step s']:.2f} s, at most {runs[0]['training MiB']:.0f} MiB")
        for batches in BATCHES:
            found = runs[batches]
            share = found["init s"] / (STEPS * found["step s"])
            print(
                f"LoRA-GA from {batches} batches: {found['init s']:.1f} s, "
                f"{share:.1%} of {STEPS} steps of {found['step s']:.2f} s; "
                f"at most {found['init MiB']:.0f} MiB, training {found['training MiB']:.0f} MiB"
            )


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
