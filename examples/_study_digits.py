"""The digits of study.py: an MLP learns scikit-learn's 8 x 8 digits, and is then fine-tuned on the same digits turned by 90
degrees and with their labels permuted: its features are of use, its last layer is not.
"""

import copy
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import torch
from _study_cells import WORST, Cell, Row, Size, best_lr, pick
from _study_methods import METHODS, VARIANTS, Setup, start, train
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lora_ops

CLASSES, BATCH, PRETRAINING = 10, 128, 600
HEAD_RANK = 5  # LoRA-GA needs 2 r <= 10 outputs
CALIBRATION = 8  # batches
CHECKPOINTS = 4
RANKS, RATIOS = (2, 8, 32, 128, 512), (1, 4, 16, 64, 256)
LOW_RANKS = (1, 2, 4, 8, 16, 64)


def cells(size: Size) -> list[Cell]:
    """All that is known before the first run."""
    found = []
    for seed in range(size.seeds):
        common = {"part": "digits", "seed": seed}
        for lr in size.grid:
            found += [Cell(study="methods", method=name, lr=lr, width=size.widths[-2], **common) for name in METHODS]
            found += [Cell(study="starts", method=name, lr=lr, width=size.widths[-2], **common) for name in VARIANTS]
        for lr in size.grid[2:-2] or size.grid:
            found += [
                Cell(study="ratio", method="LoRA+", lr=lr, width=width, ratio=ratio, **common)
                for width in size.widths
                for ratio in RATIOS
            ]
        for lr in size.grid[::2]:
            found += [
                Cell(study="scaling", method=name, lr=lr, width=size.widths[-2], r=r, **common)
                for name in ("LoRA", "rsLoRA")
                for r in RANKS
            ]
            found += [Cell(study="rank", method="LoRA", lr=lr, width=size.widths[-2], r=r, **common) for r in LOW_RANKS]
    return found


def later(rows: Iterable[Row], size: Size) -> list[Cell]:
    """Those at the learning rates that were found best."""
    found = []
    for name in ("full", "LoRA", "DoRA"):
        done = pick(rows, part="digits", study="methods", method=name)
        if len(done) == len(size.grid) * size.seeds:
            lr = best_lr(done, "t10", "loss")
            found += [Cell("digits", "magnitude", name, lr, seed, width=size.widths[-2]) for seed in range(size.seeds)]
    return found


class Task:
    """Splits of one seed: 60 % to train, 20 % to choose the learning rate by, 20 % to test. `new` is what is fine-tuned on."""

    def __init__(self, seed: int) -> None:
        digits = load_digits()
        rng = np.random.default_rng(seed)
        order, n = rng.permutation(len(digits.target)), len(digits.target) // 5
        images = torch.tensor(digits.images[order] / 16, dtype=torch.float32)
        old = torch.tensor(digits.target[order])
        new = torch.tensor(rng.permutation(CLASSES))[old]
        self.rows = {"test": slice(0, n), "val": slice(n, 2 * n), "train": slice(2 * n, None)}
        turned = images.rot90(1, (1, 2))
        self.old = images.flatten(1), old
        self.new = turned.flatten(1), new
        self.shifted = turned.roll(1, 2).flatten(1), new  # by a pixel, as no training digit is

    def accuracy(self, model: nn.Module, data: tuple[Tensor, Tensor], rows: str = "test") -> float:
        x, y = (t[self.rows[rows]] for t in data)
        with torch.no_grad():
            return float((model(x).argmax(1) == y).float().mean())

    def batches(self, data: tuple[Tensor, Tensor], count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
        x, y = (t[self.rows["train"]] for t in data)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(x), (count, BATCH), generator=generator)
        return [(x[rows], y[rows]) for rows in chosen]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


@cache
def pretrained(width: int, seed: int) -> tuple[Task, nn.Module]:
    torch.manual_seed(seed)
    task = Task(seed)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for batch in task.batches(task.old, PRETRAINING, seed):
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return task, model


def run(cell: Cell, size: Size) -> dict[str, Any]:
    task, base = pretrained(cell.width, cell.seed)
    model = copy.deepcopy(base)
    torch.manual_seed(cell.seed)
    steps = {"ratio": 100, "scaling": 150}.get(cell.study, 200) // size.hurry
    setup = Setup(
        targets="[024]",
        steps=steps,
        batches=task.batches(task.new, CALIBRATION, 1000 + cell.seed),
        loss=loss,
        r=cell.r,
        # Everywhere 2 r, so that ranks differ in nothing else; but a fixed one where the claim is of alpha / r itself.
        alpha={"scaling": 16, "ratio": cell.r}.get(cell.study, 2 * cell.r),
        rank_pattern={"4": HEAD_RANK} if cell.study in ("methods", "starts", "magnitude") else {},
    )
    begun, init_s = start(model, cell.method, setup)
    lr = cell.lr
    if cell.ratio:  # lr is then the geometric mean of A's and B's, so that one grid holds the best of every ratio
        begun.ratio, lr = cell.ratio, cell.lr / cell.ratio**0.5
    weights = [] if cell.study != "magnitude" else [effective(model)]

    def checkpoint(step: int) -> None:
        if weights and step % (steps // CHECKPOINTS) == 0:
            weights.append(effective(model))

    found = train(model, begun, lr, task.batches(task.new, steps, cell.seed), loss, checkpoint)
    losses = np.nan_to_num(np.array(found.pop("losses")), nan=WORST, posinf=WORST).clip(max=WORST)
    losses = np.append(losses, np.full(steps - len(losses), WORST))
    smooth = smoothed(losses)
    model.eval()
    found |= {
        "init_s": init_s,
        "t50": reached(smooth, 0.5),
        "t10": reached(smooth, 0.1),
        "loss": float(losses[-20:].mean()),
        "val": task.accuracy(model, task.new, "val"),
        "test": task.accuracy(model, task.new),
        "old": task.accuracy(model, task.old),
        "shifted": task.accuracy(model, task.shifted),
    }
    if cell.study == "methods":
        found["curve"] = " ".join(f"{value:.3g}" for value in smooth[9::10])
    if weights:
        found["correlation"] = correlation(weights)
    return found


def smoothed(losses: np.ndarray, window: int = 5) -> np.ndarray:
    """Medians of a loss and its neighbours, which do not lag behind large first losses as running means do."""
    padded = np.pad(losses, window // 2, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, window), axis=1)


def reached(smooth: np.ndarray, level: float) -> int:
    """The first step below the level; one more than there are if there is none."""
    below = np.flatnonzero(smooth < level)
    return int(below[0]) + 1 if len(below) else len(smooth) + 1


def effective(model: nn.Module) -> list[Tensor]:
    """The weights of all layers, with what their adapters add."""
    merged = any(True for _ in lora_ops.lora_layers(model))
    if merged:
        lora_ops.merge_lora(model)
    found = [m.weight.detach().clone() for m in model if hasattr(m, "weight")]
    if merged:
        lora_ops.unmerge_lora(model)
    return found


def correlation(weights: list[list[Tensor]]) -> float:
    """Between changes of magnitude and of direction, over layers and checkpoints: DoRA's section 3."""
    magnitudes, directions = [], []
    for now in weights[1:]:
        for W, W0 in zip(now, weights[0], strict=True):
            magnitudes.append(float((W.norm(dim=1) - W0.norm(dim=1)).abs().mean()))
            directions.append(float((1 - torch.cosine_similarity(W, W0, dim=1)).mean()))
    return float(np.corrcoef(magnitudes, directions)[0, 1])
