"""A PEFT user's script, as it is or with the one added line, in a process of its own."""

import sys
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass
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
    trainer: str | None = None  # "Trainer" or "SFTTrainer", each as it is by default; else a loop of its own

    @property
    def config(self) -> peft.LoraConfig:
        return peft.LoraConfig(
            r=16, lora_alpha=32, lora_dropout=self.lora_dropout, use_dora=self.use_dora, target_modules="all-linear",
            task_type="CAUSAL_LM",
        )  # fmt: skip


class Side:
    """`data`: (steps, batch, length) token ids."""

    def __init__(self, side: str, script: Script, base: str, data: np.ndarray, threads: int) -> None:
        transformers.utils.logging.disable_progress_bar()
        warnings.simplefilter("ignore")
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.data = torch.from_numpy(data)
        if script.four_bit:
            self.model = load_in_4_bits(base, torch.bfloat16)
        else:
            self.model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        self.turns = None
        if script.trainer is None:
            self.model = peft.get_peft_model(self.model, script.config)
        else:
            self.turns = Turns(script, self.model, self.data, base)
            self.model = self.turns.trainer.model
        if side == "patched":
            patch(self.model)
        self.losses_: list[float] = []
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=LEARNING_RATE)

        # The checkpoint is mapped: touched once, it is all resident and counts as the loaded model.
        sum(float(p.detach().sum()) for p in self.model.parameters())
        reset_peak()
        self.loaded_mib = resident_mib(peak=False)

    def step(self, i: int) -> float:
        """Seconds of a training step, from forward to optimiser."""
        if self.turns is not None:
            return self.turns.step()
        self.model.train()
        ids = self.data[i]
        start = time.perf_counter()
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - start
        self.losses_.append(loss.item())
        return seconds

    def losses(self) -> list[float]:
        """Of every step. The trainers' are at their end then."""
        return self.losses_ if self.turns is None else self.turns.losses()

    def peak_mib(self) -> float:
        """Highest resident memory since the start, less what the model and its adapters occupied then."""
        return resident_mib(peak=True) - self.loaded_mib


class Turns(transformers.TrainerCallback):
    """A trainer in a thread of its own, which makes a step when it is told to."""

    def __init__(self, script: Script, model: nn.Module, data: Tensor, base: str) -> None:
        steps, batch, _ = data.shape
        blocks = data.flatten(0, 1).tolist()
        self.scratch = tempfile.TemporaryDirectory()
        arguments: dict[str, Any] = {
            "output_dir": self.scratch.name, "max_steps": steps, "per_device_train_batch_size": batch, "seed": 0,
            "learning_rate": LEARNING_RATE, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
            "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False,
        }  # fmt: skip
        if script.trainer == "Trainer":
            dataset = [{"input_ids": ids, "labels": ids} for ids in blocks]
            model = peft.get_peft_model(model, script.config)
            settings = transformers.TrainingArguments(**arguments)
            self.trainer = transformers.Trainer(model, settings, train_dataset=dataset, callbacks=[self])
        else:
            import datasets
            import trl

            datasets.disable_progress_bars()
            self.trainer = trl.SFTTrainer(
                model, trl.SFTConfig(**arguments), train_dataset=datasets.Dataset.from_dict({"input_ids": blocks}),
                processing_class=transformers.AutoTokenizer.from_pretrained(base), peft_config=script.config,
                callbacks=[self],
            )  # fmt: skip
        self.trainer.remove_callback(transformers.PrinterCallback)
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.start = self.seconds = 0.0
        self.failure: BaseException | None = None
        self.thread: threading.Thread | None = None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.go.acquire()
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.start
        self.done.release()

    def _train(self) -> None:
        try:
            self.trainer.train()
        except BaseException as failure:
            self.failure = failure
            self.done.release()

    def step(self) -> float:
        if self.thread is None:
            self.thread = threading.Thread(target=self._train, daemon=True)
            self.thread.start()
        self.go.release()
        self.done.acquire()
        if self.failure is not None:
            raise self.failure
        return self.seconds

    def losses(self) -> list[float]:
        if self.thread is not None:
            self.thread.join()
        return [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]
