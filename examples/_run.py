"""One side of the comparison, in a process of its own: what finetune.py loads, trains, measures and asks."""

import argparse
import ctypes
import io
import math
import multiprocessing
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _quiet  # noqa: F401
import bitsandbytes
import numpy as np
import peft
import torch
import transformers
from torch import Tensor, nn

import lora_ops

# Theirs and ours, in 16 bits and in 4.
DENSE = ("PEFT", "lora_ops")
QUANT = ("PEFT + bitsandbytes", "lora_ops NF4")
FROZEN = "frozen"


def resident_mib(peak: bool) -> float:
    """Resident memory of this process, at present or at its highest since `reset_peak`."""
    status = Path("/proc/self/status")
    if not status.exists():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    (kib,) = re.findall(rf"^{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", status.read_text(), re.MULTILINE)
    return int(kib) / 1024


def reset_peak() -> None:
    if sys.platform == "linux":
        # What loading has left in malloc's free lists would hide as much of the training's own memory.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def load_in_4_bits(base: str, dtype: torch.dtype) -> nn.Module:
    """By transformers and bitsandbytes: NF4 in blocks of 64, double quantisation, everything else in dtype."""
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=settings)
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and module.in_features % 64:
            raise ValueError(
                f"{name} has rows of {module.in_features} weights, no whole number of blocks of 64, which bitsandbytes "
                "dequantises wrongly on some CPUs: there is nothing to compare with (--quant none leaves it out)"
            )
    return model


class Run:
    """A model, what trains in it and its optimiser. `side` is one of DENSE or QUANT, or FROZEN: nothing trains."""

    def __init__(self, side: str, base: str, options: argparse.Namespace) -> None:
        transformers.utils.logging.disable_progress_bar()
        warnings.simplefilter("ignore", FutureWarning)  # transformers reads deprecated properties of its own
        torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        dtype = getattr(torch, options.dtype)
        theirs = side in (DENSE[0], QUANT[0])
        if side == QUANT[0]:
            # Without peft.prepare_model_for_kbit_training, which PEFT's guide puts here: it turns everything that is not
            # quantised, the output layer and the hidden states among it, to float32, and a step takes some three times as long.
            self.model = load_in_4_bits(base, dtype)
        else:
            self.model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        self.model.requires_grad_(False)

        settings = {"r": options.r, "lora_alpha": options.lora_alpha, "lora_dropout": options.dropout}
        trainable: list[nn.Parameter] = []
        if side == FROZEN:
            self.model.enable_input_require_grads()
        elif theirs:
            self.model = peft.get_peft_model(self.model, peft.LoraConfig(target_modules="all-linear", **settings))
            trainable = [p for p in self.model.parameters() if p.requires_grad]
        else:
            config = lora_ops.LoraConfig(target_modules="all-linear", **settings)
            lora_ops.add_lora(self.model, config, quant="nf4" if side == QUANT[1] else None)
            trainable = list(lora_ops.lora_parameters(self.model))
        self.optimizer = torch.optim.AdamW(trainable, lr=options.lr, weight_decay=0.0) if trainable else None

        # The checkpoint is mapped: touched once, it is all resident and counts as the loaded model.
        sum(float(p.detach().sum()) for p in self.model.parameters())
        reset_peak()
        self.loaded_mib = resident_mib(peak=False)

    def weights(self) -> tuple[float, float | None]:
        """MiB of everything that is frozen, and bits per weight of the layers in 4 bits, if there are any."""
        dense = sum(p.nbytes for p in self.model.parameters() if not p.requires_grad and not hasattr(p, "quant_state"))
        nbytes = count = 0
        for module in self.model.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                state = module.weight.quant_state
                kept = (module.weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
                nbytes += sum(t.nbytes for t in kept)
                count += math.prod(state.shape)
            elif isinstance(module, lora_ops.FusedLoraLinear) and isinstance(module.weight, lora_ops.NF4Weight):
                nbytes += module.weight.nbytes
                count += math.prod(module.weight.shape)
        return (dense + nbytes) / 2**20, 8 * nbytes / count if count else None

    def _adapter(self) -> dict[str, Tensor]:
        """A and B by the keys of PEFT's adapter files: base_model.model.<module path>.lora_A.weight."""
        found = {}
        for name, parameter in self.model.named_parameters():
            match = re.fullmatch(r"(?:base_model\.model\.)?(.+\.lora_[AB])\.default(?:\.weight)?", name)
            if match:
                found[f"base_model.model.{match[1]}.weight"] = parameter
        return found

    def adapter(self) -> dict[str, np.ndarray]:
        return {key: p.detach().numpy() for key, p in self._adapter().items()}

    @torch.no_grad()
    def load_adapter(self, values: dict[str, np.ndarray]) -> None:
        mine = self._adapter()
        if mine.keys() != values.keys():
            raise RuntimeError(f"the two sides adapt different layers: {sorted(mine.keys() ^ values.keys())}")
        for key, parameter in mine.items():
            parameter.copy_(torch.from_numpy(values[key]))

    def state(self) -> bytes:
        """All that a training step changes or draws from."""
        assert self.optimizer is not None
        adapter = {key: p.detach() for key, p in self._adapter().items()}
        file = io.BytesIO()
        torch.save({"adapter": adapter, "optimizer": self.optimizer.state_dict(), "generator": torch.get_rng_state()}, file)
        return file.getvalue()

    def load_state(self, state: bytes) -> None:
        assert self.optimizer is not None
        kept = torch.load(io.BytesIO(state), weights_only=True)
        self.load_adapter({key: t.numpy() for key, t in kept["adapter"].items()})
        self.optimizer.load_state_dict(kept["optimizer"])
        torch.set_rng_state(kept["generator"])

    def step(self, ids: np.ndarray) -> tuple[float, float]:
        """One training step on ids (batch, length): its loss, and its seconds from forward to optimiser."""
        tokens = torch.from_numpy(ids)
        self.model.train()
        start = time.perf_counter()
        loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.item(), time.perf_counter() - start

    @torch.no_grad()
    def held_out(self, ids: np.ndarray) -> float:
        """Mean loss over blocks (count, length), one at a time."""
        self.model.eval()
        for module in self.model.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                # It has no dropout, and in eval mode would repack its weight in place: scales rounded to bfloat16, and no
                # gradient for its input ever after.
                module.train()
        losses = []
        for block in torch.from_numpy(ids).split(1):
            losses.append(self.model(input_ids=block, labels=block, use_cache=False).loss.item())
        return float(np.mean(losses))

    def peak_mib(self) -> float:
        """Highest resident memory since the start, less what the model and its adapters occupied then."""
        return resident_mib(peak=True) - self.loaded_mib

    @torch.no_grad()
    def decode(self, prompt: list[int], count: int) -> tuple[list[int], float]:
        """Greedy continuation of the prompt, and tokens per second after the first. bitsandbytes' layers are repacked."""
        self.model.eval()
        out = self.model(input_ids=torch.tensor([prompt]), use_cache=True)
        tokens = [int(out.logits[0, -1].argmax())]
        start = time.perf_counter()
        while len(tokens) < count:
            last = torch.tensor([tokens[-1:]])
            out = self.model(input_ids=last, past_key_values=out.past_key_values, use_cache=True)
            tokens.append(int(out.logits[0, -1].argmax()))
        return tokens, (count - 1) / (time.perf_counter() - start)


def serve(connection: Any, make: Callable[..., Any], *args: Any) -> None:
    """Body of a process: makes a Run, or what else, and calls the methods it is asked for, until the other end hangs up."""
    try:
        run = make(*args)
        connection.send((True, None))
        while True:
            method, arguments = connection.recv()
            connection.send((True, getattr(run, method)(*arguments)))
    except (EOFError, KeyboardInterrupt):
        pass
    except BaseException:
        connection.send((False, traceback.format_exc()))


class Process:
    """The other end of `serve`. Starts at once; the first `ask` waits until the model is loaded."""

    def __init__(self, make: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, make, *args), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False

    def receive(self) -> Any:
        try:
            fine, value = self.connection.recv()
        except EOFError:
            self.process.join()
            raise SystemExit(f"a run's process ended with exit code {self.process.exitcode}") from None
        if not fine:
            raise SystemExit(f"a run failed:\n{value}")
        return value

    def begin(self, method: str, *arguments: Any) -> None:
        """`ask`, whose answer `receive` will give."""
        if not self.ready:
            self.receive()
            self.ready = True
        self.connection.send((method, arguments))

    def ask(self, method: str, *arguments: Any) -> Any:
        self.begin(method, *arguments)
        return self.receive()

    def close(self) -> None:
        self.connection.close()
        self.process.join()
