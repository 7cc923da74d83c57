"""A PEFT user's script, as it is or with the one added line, in a process of its own."""

import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import _quiet  # noqa: F401
import numpy as np
import peft
import torch
import transformers
from _run import load_in_4_bits, reset_peak, resident_mib
from torch import Tensor, nn

from lora_ops import keep_memory
from lora_ops.integrations.peft import patch

LEARNING_RATE = 2e-4
SIDES = ("stock", "patched")


@dataclass(frozen=True)
class Script:
    """SmolLM2 in bf16, fp32 adapters of r = 16 on all linear layers."""

    name: str
    lora_dropout: float = 0.0
    use_dora: bool = False
    four_bit: bool = False  # NF4 by bitsandbytes, double quantisation, everything else bf16
    keep_memory: bool = False  # lora_ops.keep_memory(), on both sides
    trainer: str | None = None  # "Trainer" or "SFTTrainer"; else a loop of its own
    settings: tuple[tuple[str, Any], ...] = ()  # of the trainer, which is otherwise as it is by default

    @property
    def config(self) -> peft.LoraConfig:
        return peft.LoraConfig(
            r=16, lora_alpha=32, lora_dropout=self.lora_dropout, use_dora=self.use_dora, target_modules="all-linear",
            task_type="CAUSAL_LM",
        )  # fmt: skip


class Side:
    """`data`: (steps, batch, length) token ids. A trainer takes its turns through a connection of their own."""

    def __init__(self, side: str, script: Script, base: str, data: np.ndarray, threads: int, turns: Connection) -> None:
        transformers.utils.logging.disable_progress_bar()
        warnings.simplefilter("ignore")
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        if script.keep_memory and not keep_memory():
            raise RuntimeError("keep_memory needs glibc")
        self.data = torch.from_numpy(data)
        if script.four_bit:
            self.model = load_in_4_bits(base, torch.bfloat16)
        else:
            self.model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        if script.trainer is None:
            self.model = peft.get_peft_model(self.model, script.config)
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
        else:
            self.scratch = tempfile.TemporaryDirectory()
            self.trainer = trainer_of(script, self.model, self.data, base, self.scratch.name)
            self.trainer.remove_callback(transformers.PrinterCallback)
            self.trainer.add_callback(Turns(turns))
            self.model = self.trainer.model
        if side == "patched":
            patch(self.model)
        self.seen: list[float] = []

        # The checkpoint is mapped: touched once, it is all resident and counts as the loaded model.
        sum(float(p.detach().sum()) for p in self.model.parameters())
        reset_peak()
        self.loaded_mib = resident_mib(peak=False)

    def step(self, i: int) -> float:
        """Seconds of a training step, from forward to optimiser."""
        self.model.train()
        ids = self.data[i]
        start = time.perf_counter()
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - start
        self.seen.append(loss.item())
        return seconds

    def losses(self) -> list[float]:
        """Of the steps so far."""
        return self.seen

    def train(self) -> list[float]:
        """The trainer's whole run, and its losses."""
        self.trainer.train()
        return [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]

    def peak_mib(self) -> float:
        """Highest resident memory since the start, less what the model and its adapters occupied then."""
        return resident_mib(peak=True) - self.loaded_mib


class Turns(transformers.TrainerCallback):
    """Has a trainer wait for its turn before every step, and tell how long it took."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.connection.recv()
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.connection.send(time.perf_counter() - self.start)


def trainer_of(script: Script, model: nn.Module, data: Tensor, base: str, out: str) -> transformers.Trainer:
    steps, batch, _ = data.shape
    blocks = data.flatten(0, 1).tolist()
    settings: dict[str, Any] = {
        "output_dir": out, "max_steps": steps, "per_device_train_batch_size": batch, "seed": 0, "logging_steps": 1,
        "learning_rate": LEARNING_RATE, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "dataloader_pin_memory": False, **dict(script.settings),
    }  # fmt: skip
    if script.trainer == "Trainer":
        model = peft.get_peft_model(model, script.config)
        rows = [{"input_ids": ids, "labels": ids} for ids in blocks]
        return transformers.Trainer(model, transformers.TrainingArguments(**settings), train_dataset=rows)
    import datasets
    import trl

    datasets.disable_progress_bars()
    return trl.SFTTrainer(
        model, trl.SFTConfig(**settings), train_dataset=datasets.Dataset.from_dict({"input_ids": blocks}),
        processing_class=transformers.AutoTokenizer.from_pretrained(base), peft_config=script.config,
    )  # fmt: skip
