"""A run of study.py by what it is of, how many there are, and the file that they are kept in."""

import csv
import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

GRID = tuple(1e-4 * 2**k for k in range(12))  # of learning rates; 0.0001 to 0.2
WORST = 100.0  # what a loss that is larger, or not finite, counts as


@dataclass(frozen=True)
class Cell:
    part: str  # "digits" or "smollm2"
    study: str
    method: str
    lr: float
    seed: int
    r: int = 8
    width: int = 0
    ratio: float = 0  # 0: the method's own


@dataclass(frozen=True)
class Size:
    """How large the study is."""

    seeds: int = 3
    grid: tuple[float, ...] = GRID
    widths: tuple[int, ...] = (64, 256, 1024)  # the last but one is that of all studies without widths
    hurry: int = 1  # digits: divides the numbers of steps
    # Of the language model; without it a random one of two layers takes its place.
    smollm2: bool = True
    lm_steps: int = 20


SHORT = Size(seeds=2, grid=GRID[4::4], widths=(32, 64, 128), hurry=5, smollm2=False, lm_steps=6)

METRICS = (
    "t50", "t10", "loss", "val", "val_loss", "test", "old", "shifted", "before", "params", "saved_kib", "gradient",
    "init_s", "train_s", "correlation", "curve",
)  # fmt: skip
FIELDS = {f.name: f.type for f in dataclasses.fields(Cell)}

Row = dict[str, Any]  # a cell's fields and a run's metrics


def read(path: Path) -> dict[Cell, Row]:
    """The runs of the file. A last line that was cut off is left out."""
    if not path.exists():
        return {}
    found = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row.get("curve") is None:
                continue
            values: Row = {key: number(value) for key, value in row.items()}
            values["r"], values["seed"], values["width"] = (int(values[key]) for key in ("r", "seed", "width"))
            values["curve"] = [float(v) for v in row["curve"].split()]
            found[Cell(**{key: values[key] for key in FIELDS})] = values
    return found


def mend(path: Path) -> None:
    """Removes a last line that was cut off."""
    if path.exists():
        text = path.read_text(encoding="utf-8")
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")


def append(path: Path, cell: Cell, metrics: Row) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*FIELDS, *METRICS], lineterminator="\n")
        if new:
            writer.writeheader()
        short = {key: f"{v:.5g}" if isinstance(v, float) else v for key, v in metrics.items()}
        writer.writerow(dataclasses.asdict(cell) | short)


def number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def pick(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def over_seeds(rows: Iterable[Row], metric: str) -> tuple[float, float]:
    """Mean and standard deviation."""
    values = [row[metric] for row in rows]
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def best_lr(rows: Iterable[Row], *criteria: str) -> float:
    """The learning rate with the best mean over seeds of the first criterion; the others break ties. "val" is an accuracy, all
    else is better if it is less."""
    by_lr: dict[float, list[Row]] = {}
    for row in rows:
        by_lr.setdefault(row["lr"], []).append(row)
    return min(by_lr, key=lambda lr: [(-1 if key == "val" else 1) * over_seeds(by_lr[lr], key)[0] for key in criteria])


def at_edge(lr: float, grid: Iterable[float]) -> bool:
    """Whether a learning rate is the grid's first or last: the best one may lie beyond."""
    return any(math.isclose(lr, end) for end in (min(grid), max(grid)))
