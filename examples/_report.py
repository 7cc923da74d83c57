"""What finetune.py prints and writes: table, verdict, plot, adapter files."""

import os
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _quiet  # noqa: F401
import numpy as np
import peft
from safetensors.numpy import save_file

# Of the largest difference between the curves of a pair. Rounding in bfloat16 is what parts them: with --dtype float32 both
# pairs agree to 0.0001 %, while in bfloat16 each curve lies off its own float32 curve, by up to 0.4 % over dense weights
# (PEFT), and by up to 0.7 % over 4-bit weights, which bitsandbytes rounds once more (a second step; AdamW's first is as long
# for a gradient of mere rounding as for any other). 14 steps in bfloat16 parted the pairs by 0.3 % and 0.7 %, as far as the
# curves lie off. The dense curves, in comparison, lie 2 to 11 % below those in 4 bits.
BOUND = 0.01
BOUND_4BIT = 0.02
DROPOUT_BOUND = 0.03


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Calls `writer` on a temporary name and renames: `path` is the old file or folder, or the whole new one."""
    scratch = path.parent / ".partial"  # what a process that was killed has left there is written over
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        writer(scratch / path.name)
        os.replace(scratch / path.name, path)
    except OSError as error:
        words = f"{path} is not written, what was there stays: {error.strerror or error}"
        raise OSError(error.errno, words) if error.errno else OSError(words) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def save_adapter(
    directory: Path, tensors: dict[str, np.ndarray], base: str, r: int, lora_alpha: float, lora_dropout: float
) -> None:
    """adapter_model.safetensors and adapter_config.json, as `peft.PeftModel.from_pretrained` reads them."""
    config = peft.LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        # The module's own name: base_model.model.model.layers.0.mlp.up_proj.lora_A.weight -> up_proj.
        target_modules=sorted({key.split(".")[-3] for key in tensors}),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    write(directory / "adapter_model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    # PEFT fixes the file's name, adapter_config.json, and is told the folder.
    write(directory / "adapter_config.json", lambda path: config.save_pretrained(str(path.parent)))


def indent(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


def table(results: dict[str, dict[str, Any]], pairs: list[tuple[str, str]]) -> str:
    """One row per run, and a caption."""
    header = ["", "step median", "step min", "tokens/s", "memory", "weights", "loss", "held-out loss", "decoding"]
    rows, fastest = [header], {}
    for name, run in results.items():
        seconds = run["seconds"][1:] or run["seconds"]
        median, fastest[name] = statistics.median(seconds), min(seconds)
        losses = ["", ""]
        if run["held_out_before"] is not None:
            losses = [f"{run['losses'][0]:.4f} -> {run['losses'][-1]:.4f}"]
            losses.append(f"{run['held_out_before']:.4f} -> {run['held_out_after']:.4f}")
        rows.append(
            [
                name,
                f"{median:.3f} s",
                f"{fastest[name]:.3f} s",
                f"{run['tokens_per_step'] / median:.0f}",
                f"{run['peak_mib']:.0f} MiB",
                f"{run['weights_mib']:.1f} MiB",
                *losses,
                f"{run['decoded_tokens_per_s']:.1f} /s",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    for theirs, ours in pairs:
        bits = results[ours]["bits_per_weight"]
        lines.append(
            f"{ours}: {fastest[theirs] / fastest[ours]:.2f} x faster than {theirs}, {fastest[ours] / fastest['frozen']:.2f} x "
            "the step of the frozen model (minima)" + (f"; {bits:.2f} bits per weight of its layers." if bits else ".")
        )
    return "\n".join(
        [
            *lines,
            "The runs took turns, one step each, in separate processes. A step is forward, backward and AdamW; the",
            "first is left out of the times. frozen: no adapter, forward and backward to the embeddings' output, first",
            "steps only. tokens/s: at the median step. memory: peak of the process above the model with its adapters.",
            "weights: all that is frozen; embeddings and output layer are never quantised. loss: of the first and of",
            "the last step. decoding: tokens per second, greedy, one at a time, adapters not merged, the faster of two",
            "rounds (bitsandbytes changes to another layout for that, with scales rounded to bfloat16).",
        ]
    )


def differences(a: list[float], b: list[float]) -> np.ndarray:
    """|b - a| / |a| at every step."""
    return np.abs(np.subtract(b, a)) / np.abs(a)


def bound_of(run: dict[str, Any]) -> float:
    return BOUND_4BIT if run["bits_per_weight"] else BOUND


def verdict(results: dict[str, dict[str, Any]], pair: tuple[str, str], dropout: float) -> tuple[str, bool]:
    """A line, and whether the runs agree. A loss that is not finite agrees with nothing."""
    theirs, ours = (results[name]["losses"] for name in pair)
    if dropout > 0:
        last = max(len(theirs) // 4, min(len(theirs), 10))
        ends = [float(np.mean(losses[-last:])) for losses in (theirs, ours)]
        worst, bound = float(differences(ends[:1], ends[1:])[0]), DROPOUT_BOUND
        agree = worst <= bound
        what = (
            f"mean training loss of the last {last} steps differs by {worst:.2%} (bound {bound:.0%}; "
            "dropout masks come from different generators, so single steps are not compared)"
        )
    else:
        difference = differences(theirs, ours)
        step, bound = int(np.argmax(difference)), bound_of(results[pair[1]])
        worst = float(difference[step])
        agree = worst <= bound
        what = f"training losses differ by at most {worst:.3%}, at step {step + 1} of {len(theirs)} (bound {bound:.0%})"
    return f"VERDICT: {pair[0]} and {pair[1]} {'agree' if agree else 'DISAGREE'}: {what}", agree


def plot(directory: Path, results: dict[str, dict[str, Any]], pairs: list[tuple[str, str]]) -> None:
    """loss.png and loss.svg: the curves, and the relative difference of each pair below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=[3, 1], layout="constrained")
    for (theirs, ours), (wide, narrow) in zip(pairs, (("tab:orange", "tab:blue"), ("tab:pink", "tab:green")), strict=False):
        expected, actual = results[theirs]["losses"], results[ours]["losses"]
        steps = np.arange(1, len(expected) + 1)
        top.plot(steps, expected, color=wide, linewidth=5, alpha=0.45, label=theirs)
        top.plot(steps, actual, color=narrow, linewidth=1.5, label=ours)
        # A difference of exactly zero has no place on a logarithmic axis.
        difference = 100 * np.maximum(differences(expected, actual), 1e-7)
        bottom.semilogy(steps, difference, color=narrow, marker=".", linewidth=1)
        bound = bound_of(results[ours])
        bottom.axhline(100 * bound, color=narrow, linestyle="--", linewidth=1, label=f"bound, {bound:.0%}")
    top.set_ylabel("training loss")
    top.legend()
    top.grid(alpha=0.3)
    bottom.set_ylabel("difference, %")
    bottom.set_xlabel("step")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    bottom.legend(loc="upper right")
    bottom.grid(alpha=0.3)
    for name in ("loss.png", "loss.svg"):
        write(directory / name, lambda path: figure.savefig(path, dpi=150))
    plt.close(figure)
