"""What finetune.py prints and writes: table, verdict, plot, adapter files."""

import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
from safetensors.numpy import save_file

# Of the largest difference between the curves. Rounding in bfloat16 is what parts them: over the default's first 14 steps they
# agree to 0.001 % with --dtype float32, while each lies up to 0.4 % from its own float32 curve, and 50 steps in bfloat16 part
# them by 0.25 %.
BOUND = 0.01
DROPOUT_BOUND = 0.03


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Calls `writer` on a temporary name and renames: `path` is the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        writer(Path(scratch, path.name))
        os.replace(Path(scratch, path.name), path)


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


def table(results: dict[str, dict[str, Any]]) -> str:
    """One row per run, and a caption."""
    header = ["", "step median", "step min", "tokens/s", "memory", "first loss", "last loss", "held-out loss"]
    rows, fastest = [header], {}
    for name, run in results.items():
        seconds = run["seconds"][1:] or run["seconds"]
        median, fastest[name] = statistics.median(seconds), min(seconds)
        row = [
            name,
            f"{median:.3f} s",
            f"{fastest[name]:.3f} s",
            f"{run['tokens_per_step'] / median:.0f}",
            f"{run['peak_mib']:.0f} MiB",
        ]
        if run["held_out_before"] is None:
            row += ["", "", ""]
        else:
            row += [f"{run['losses'][0]:.4f}", f"{run['losses'][-1]:.4f}"]
            row += [f"{run['held_out_before']:.4f} -> {run['held_out_after']:.4f}"]
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(
        [
            *lines,
            f"lora_ops: {fastest['PEFT'] / fastest['lora_ops']:.2f} x faster than PEFT, "
            f"{fastest['lora_ops'] / fastest['frozen']:.2f} x the step of the frozen model (minima).",
            "The runs took turns, one step each, in separate processes. A step is forward, backward and AdamW; the",
            "first is left out of the times. frozen: no adapter, forward and backward to the embeddings' output, first",
            "steps only. memory: peak of the process above the loaded model. tokens/s: at the median step.",
        ]
    )


def differences(a: list[float], b: list[float]) -> np.ndarray:
    """|b - a| / |a| at every step."""
    return np.abs(np.subtract(b, a)) / np.abs(a)


def verdict(peft: list[float], ours: list[float], dropout: float) -> tuple[str, bool]:
    """A line, and whether the runs agree. A loss that is not finite agrees with nothing."""
    if dropout > 0:
        last = max(len(peft) // 4, min(len(peft), 10))
        ends = [float(np.mean(losses[-last:])) for losses in (peft, ours)]
        worst, bound = float(differences(ends[:1], ends[1:])[0]), DROPOUT_BOUND
        agree = worst <= bound
        what = (
            f"mean training loss of the last {last} steps differs by {worst:.2%} (bound {bound:.0%}; "
            "dropout masks come from different generators, so single steps are not compared)"
        )
    else:
        difference = differences(peft, ours)
        step, bound = int(np.argmax(difference)), BOUND
        worst = float(difference[step])
        agree = worst <= bound
        what = f"training losses differ by at most {worst:.3%}, at step {step + 1} of {len(peft)} (bound {bound:.0%})"
    return f"VERDICT: PEFT and lora_ops {'agree' if agree else 'DISAGREE'}: {what}", agree


def plot(directory: Path, peft: list[float], ours: list[float]) -> None:
    """loss.png and loss.svg: both curves, and their relative difference below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = np.arange(1, len(peft) + 1)
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=[3, 1], layout="constrained")
    top.plot(steps, peft, color="tab:orange", linewidth=5, alpha=0.45, label="PEFT, eager")
    top.plot(steps, ours, color="tab:blue", linewidth=1.5, label="lora_ops")
    top.set_ylabel("training loss")
    top.legend()
    top.grid(alpha=0.3)
    # A difference of exactly zero has no place on a logarithmic axis.
    bottom.semilogy(steps, 100 * np.maximum(differences(peft, ours), 1e-7), color="tab:blue", marker=".", linewidth=1)
    bottom.axhline(100 * BOUND, color="tab:red", linestyle="--", linewidth=1, label=f"{BOUND:.0%}")
    bottom.set_ylabel("difference, %")
    bottom.set_xlabel("step")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    bottom.legend(loc="upper right")
    bottom.grid(alpha=0.3)
    for name in ("loss.png", "loss.svg"):
        write(directory / name, lambda path: figure.savefig(path, dpi=150))
    plt.close(figure)
