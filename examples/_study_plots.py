"""Figures of study.py, as PNG and SVG."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from _report import write as write_whole
from _study_cells import Row, over_seeds, pick
from _study_methods import METHODS
from _study_results import Results

matplotlib.use("Agg")
from matplotlib import pyplot as plt

matplotlib.rcParams.update({"svg.hashsalt": "study", "axes.grid": True, "grid.alpha": 0.3, "font.size": 9})
COLOURS = dict(
    zip(METHODS, ["black", *(matplotlib.colormaps["tab20"](i) for i in (0, 1, 2, 6, 4, 5, 9, 8, 14, 16, 18))], strict=True)
)


def write(out: Path, r: Results) -> None:
    for name, figure in {"digits": digits(r), "smollm2": smollm2(r), "learning_rates": rates(r), "claims": studies(r)}.items():
        for ending, options in {"png": {"dpi": 110}, "svg": {"metadata": {"Date": None}}}.items():
            write_whole(out / f"{name}.{ending}", lambda path, f=figure, o=options: f.savefig(path, **o))
        plt.close(figure)


def curve(axes: Any, name: str, xs: Any, runs: list[Row]) -> None:
    curves = np.array([row["curve"] for row in runs if len(row["curve"]) == len(xs)])
    if len(curves):
        axes.plot(xs, curves.mean(0), color=COLOURS[name], label=name, linewidth=2 if name in ("full", "LoRA") else 1.2)
        axes.fill_between(xs, curves.min(0), curves.max(0), color=COLOURS[name], alpha=0.08)


def digits(r: Results) -> Any:
    figure, (same, own) = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    lr = r.middle_lr()
    for name in METHODS:
        for axes, runs in ((same, r.at(name, lr)), (own, r.of(name))):
            curve(axes, name, np.arange(1, len(runs[0]["curve"]) + 1) * 10, runs)
    same.set(title=f"digits, one learning rate ({lr:.2g})", xlabel="step", ylabel="training loss, smoothed", yscale="log")
    own.set(title="digits, each its own learning rate", xlabel="step")
    own.legend(ncols=2, fontsize=8)
    return figure


def smollm2(r: Results) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    lora = {row["seed"]: np.array(row["curve"]) for row in r.lm("LoRA")}
    for name in METHODS:
        # Of the same tokens: what the loss of one block is to the next hides every difference.
        gaps = np.array([row["curve"] - lora[row["seed"]] for row in r.lm(name) if row["seed"] in lora])
        steps = np.arange(1, gaps.shape[1] + 1)
        left.plot(steps, (gaps.cumsum(1) / steps).mean(0), color=COLOURS[name], label=name)
    left.set(title="language model, own learning rates", xlabel="step", ylabel="training loss over LoRA's, mean so far")
    left.legend(ncols=2, fontsize=8)
    for k, name in enumerate(METHODS):
        mean, sd = over_seeds(r.lm(name), "loss")
        right.errorbar(mean, -k, xerr=sd, fmt="o", color=COLOURS[name], capsize=3)
    right.axvline(over_seeds(r.lm("LoRA"), "before")[0], color="grey", linestyle="--", label="before")
    right.set(title="after", xlabel="held-out loss", yticks=[-k for k in range(len(METHODS))], yticklabels=list(METHODS))
    right.legend()
    return figure


def over(axes: Any, rows: list[Row], x: str, metric: str, **options: Any) -> None:
    """Mean over starts, with the standard deviation."""
    xs = sorted({row[x] for row in rows})
    points = [over_seeds(pick(rows, **{x: value}), metric) for value in xs]
    axes.errorbar(xs, [m for m, _ in points], yerr=[s for _, s in points], capsize=2, marker=".", **options)


def rates(r: Results) -> Any:
    figure, (steps, accuracy, held_out) = plt.subplots(1, 3, figsize=(13, 4.5), layout="constrained")
    for name in METHODS:
        mine = pick(r.rows, part="digits", study="methods", method=name)
        over(steps, mine, "lr", "t10", color=COLOURS[name], label=name)
        over(accuracy, mine, "lr", "test", color=COLOURS[name])
        first = pick(r.rows, part="smollm2", method=name, seed=0)
        over(held_out, first, "lr", "val_loss", color=COLOURS[name])
    steps.set(title="digits: steps to a loss of 0.1", xlabel="learning rate", xscale="log")
    steps.legend(fontsize=7, ncols=2)
    accuracy.set(title="digits: test accuracy", xlabel="learning rate", xscale="log")
    before = over_seeds(r.lm("LoRA"), "loss")[0]
    held_out.set(title="language model: held-out loss", xlabel="learning rate", xscale="log", ylim=(None, before * 1.3))
    return figure


def studies(r: Results) -> Any:
    figure, ((ratio, gradient), (loss, rank)) = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    of_ratio = pick(r.rows, study="ratio")
    for width in sorted({row["width"] for row in of_ratio}):
        best = [
            row
            for x in {row["ratio"] for row in of_ratio}
            for row in r.of("LoRA+", "loss", study="ratio", width=width, ratio=x)
        ]
        over(ratio, best, "ratio", "loss", label=f"width {width}")
    ratio.set(
        title="LoRA+: loss over the ratio, own learning rates", xlabel="B's learning rate over A's", xscale="log", yscale="log"
    )
    lr = r.middle_lr()
    for name, label in (("LoRA", "alpha / r"), ("rsLoRA", "alpha / √r")):
        at_one = r.at(name, lr, study="scaling")
        over(gradient, at_one, "r", "gradient", label=label)
        over(loss, at_one, "r", "loss", label=f"{label}, lr {lr:.2g}")
        own = [row for x in {row["r"] for row in at_one} for row in r.of(name, "loss", study="scaling", r=x)]
        over(loss, own, "r", "loss", label=f"{label}, own lr", linestyle="--")
    gradient.set(title="gradient's norm at the first step", xlabel="r", xscale="log", yscale="log")
    loss.set(title="loss over the rank", xlabel="r", xscale="log", yscale="log")
    own = [row for x in {row["r"] for row in pick(r.rows, study="rank")} for row in r.of("LoRA", "val", study="rank", r=x)]
    over(rank, own, "r", "test", label="LoRA")
    rank.set(title="accuracy over the rank, own learning rates", xlabel="r", xscale="log")
    for axes in (ratio, gradient, loss, rank):
        axes.legend(fontsize=8)
    return figure
