"""PEFT training scripts for SmolLM2 as they are, and with the one added line `lora_ops.integrations.peft.patch(model)`.

    pytest bench/bench_peft_patch.py -s -k DoRA      one of bf16, dropout, QLoRA, DoRA, Trainer, SFTTrainer...; all without -k

Each side lives in a process of its own, whose peak memory is the operating system's figure, and the two take turns, a training
step each: 2 x 256 tokens of CPython's documentation, forward, backward, AdamW. Time is the minimum of LORA_OPS_BENCH_STEPS (8)
steps after a first one; trainers run LORA_OPS_BENCH_TRAINER_STEPS (20) steps. SFTTrainer's defaults, autocast to bf16 and
activation checkpointing, have a case of their own: PEFT's adapters are then multiplied in bf16. Two threads unless
LORA_OPS_BENCH_THREADS says otherwise.
"""

import multiprocessing
import os

import numpy as np
import pytest
import transformers
from report_rows import Rows
from sides_peft import SIDES, Script, Side  # first: it finds examples/

from _run import Process  # isort: skip
from finetune import batches, blocks, documents, smollm2, split  # isort: skip

THREADS = int(os.environ.get("LORA_OPS_BENCH_THREADS", "2"))
STEPS = 1 + int(os.environ.get("LORA_OPS_BENCH_STEPS", "8"))
TRAINER_STEPS = int(os.environ.get("LORA_OPS_BENCH_TRAINER_STEPS", "20"))
BATCH, LENGTH = 2, 256
SCRIPTS = [
    Script("bf16"),
    Script("bf16, keep_memory()", keep_memory=True),
    Script("dropout 0.05", lora_dropout=0.05),
    Script("QLoRA", four_bit=True),
    Script("DoRA", use_dora=True),
    Script("Trainer", trainer="Trainer"),
    Script("SFTTrainer", trainer="SFTTrainer", settings=(("bf16", False), ("gradient_checkpointing", False))),
    Script("SFTTrainer, autocast, checkpointing", trainer="SFTTrainer"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(smollm2(tmp_path_factory.getbasetemp().parent / "model"))


def tokens(base: str, steps: int) -> np.ndarray:
    """(steps, batch, length)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    text = split(documents(None))[0][: 8 * steps * BATCH * LENGTH]
    return batches(blocks(tokenizer(text)["input_ids"], LENGTH, "training"), steps, BATCH, seed=0)


class Peer(Process):
    """A side in its process."""

    def __init__(self, side: str, script: Script, base: str, data: np.ndarray) -> None:
        self.script = script
        self.turns, theirs = multiprocessing.get_context("spawn").Pipe()
        super().__init__(Side, side, script, base, data, THREADS, theirs)
        theirs.close()

    def step(self, i: int) -> float:
        """Seconds of step i."""
        if self.script.trainer is None:
            return self.ask("step", i)
        if i == 0:
            self.begin("train")
        try:
            self.turns.send(None)
            return self.turns.recv()
        except (EOFError, BrokenPipeError):
            return self.receive()  # says why

    def losses(self) -> list[float]:
        """Of all steps."""
        return self.ask("losses") if self.script.trainer is None else self.receive()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def bench_peft_patch(script: Script, base: str, benchmark, rows_of, capsys) -> None:
    steps = STEPS if script.trainer is None else TRAINER_STEPS
    data = tokens(base, steps)
    peers = {side: Peer(side, script, base, data) for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}

    def turn() -> None:
        for side, peer in peers.items():
            seconds[side].append(peer.step(len(seconds[side])))

    benchmark.pedantic(turn, rounds=steps - 1, warmup_rounds=1)
    losses = {side: np.array(peer.losses()) for side, peer in peers.items()}
    row = {"script": script.name, "steps": steps}
    for side, peer in peers.items():
        row |= {f"{side} s": min(seconds[side][1:]), f"{side} total s": sum(seconds[side])}
        row |= {f"{side} peak MiB": peer.ask("peak_mib"), f"{side} last loss": losses[side][-1]}
        peer.close()
    row["losses differ"] = float((np.abs(losses["patched"] / losses["stock"] - 1)).max())
    benchmark.extra_info.update(row)
    results = rows_of("bench-peft", CAPTION.format(threads=THREADS, tokens=f"{BATCH} x {LENGTH}"), COLUMNS)
    results.add(row)
    with capsys.disabled():
        print(f"\n{results.line(row)}")


CAPTION = (
    "SmolLM2-135M, {threads} threads, {tokens} tokens, bf16, fp32 adapters of r = 16 on all linear layers. Time of a training "
    "step, minimum of many, both sides taking turns, each in a process of its own; peak of resident memory beyond the loaded "
    "model; losses: the largest difference at any step."
)
COLUMNS: dict[str, Rows.Cell] = {
    "script": lambda row: row["script"],
    "steps": lambda row: str(row["steps"]),
    "PEFT": lambda row: f"{row['stock s']:.3f} s",
    "patched": lambda row: f"{row['patched s']:.3f} s",
    "faster": lambda row: f"{row['stock s'] / row['patched s']:.2f} x",
    "all steps": lambda row: f"{row['stock total s'] / row['patched total s']:.2f} x",
    "memory, PEFT": lambda row: f"{row['stock peak MiB']:.0f} MiB",
    "memory, patched": lambda row: f"{row['patched peak MiB']:.0f} MiB",
    "last losses": lambda row: f"{row['stock last loss']:.4f}, {row['patched last loss']:.4f}",
    "losses differ by": lambda row: f"{row['losses differ']:.2%}",
}
