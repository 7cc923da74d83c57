"""What is asked of study.py's runs, and how the answers are said."""

from collections.abc import Iterable, Mapping
from statistics import mean, stdev
from typing import Any

from _study_cells import Row, best_lr, over_seeds, pick

SPEED = ("t10", "loss")  # what learning rates are chosen by where it is about speed; else "val", accuracy
NO_DIFFERENCE = "no difference seen"


class Results:
    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)

    def of(self, method: str, *criteria: str, **wanted: object) -> list[Row]:
        """All starts of a digits run at its best learning rate."""
        wanted = {"part": "digits", "study": "methods"} | wanted
        found = pick(self.rows, method=method, **wanted)
        return pick(found, lr=best_lr(found, *(criteria or SPEED)))

    def at(self, method: str, lr: float, **wanted: object) -> list[Row]:
        return pick(self.rows, method=method, **({"part": "digits", "study": "methods", "lr": lr} | wanted))

    def lm(self, method: str) -> list[Row]:
        found = pick(self.rows, part="smollm2", method=method)
        return pick(found, lr=best_lr(pick(found, seed=0), "val_loss"))

    def middle_lr(self) -> float:
        """The one that all share in the claims about one learning rate: about 0.001."""
        lrs = {row["lr"] for row in pick(self.rows, part="digits", study="scaling")}
        return min(lrs, key=lambda lr: abs(lr - 1.6e-3))


def text(rows: Iterable[Row], metric: str, digits: int = 3) -> str:
    m, s = over_seeds(rows, metric)
    return f"{m:.{digits}g} ± {s:.2g}" if digits < 4 else f"{m:.{digits - 1}f} ± {s:.3f}"


def listed(by_name: Mapping[Any, list[Row]], metric: str) -> str:
    return ", ".join(f"{name} {text(rows, metric)}" for name, rows in by_name.items())


def better(of: list[Row], than: list[Row], metric: str, sign: int = -1) -> str:
    """By the mean over starts of the differences, which must exceed their standard deviation: starts are in pairs, with the
    same data. sign -1: less is better."""
    others = {row["seed"]: row[metric] for row in than}
    gains = [sign * (row[metric] - others[row["seed"]]) for row in of]
    spread = stdev(gains) if len(gains) > 1 else 0.0
    return "holds" if mean(gains) > spread else "does not hold" if mean(gains) < -spread else NO_DIFFERENCE


def verdict(*parts: bool | str) -> str:
    held = [part in (True, "holds") for part in parts]
    if any(held):
        return "holds" if all(held) else "partly"
    return NO_DIFFERENCE if all(part == NO_DIFFERENCE for part in parts) else "does not hold"


def ratio_of(a: list[Row], b: list[Row], metric: str) -> float:
    return over_seeds(a, metric)[0] / over_seeds(b, metric)[0]
