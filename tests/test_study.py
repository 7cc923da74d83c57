"""examples/study.py, its short form: what it writes, what of the claims holds at any size, and that a cut study goes on."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import _study_cells  # noqa: E402
import _study_digits  # noqa: E402
import _study_llm  # noqa: E402
from _study_methods import METHODS, VARIANTS  # noqa: E402
from _study_results import better, verdict  # noqa: E402

Table = list[dict[str, str]]


def study(out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, EXAMPLES / "study.py", "--short", "--out", out]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("study")
    finished = study(directory)
    assert finished.returncode == 0, finished.stderr
    return directory


def table(path: Path) -> Table:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_study_writes_tables_figures_and_a_report(out: Path) -> None:
    figures = [f"{name}.{ending}" for name in ("digits", "smollm2", "learning_rates", "claims") for ending in ("png", "svg")]
    tables = [f"{name}.csv" for name in ("runs", "digits", "smollm2", "ratio", "scaling", "rank", "claims")]
    assert {path.name for path in out.iterdir()} == {*figures, *tables, "README.md"}
    assert all((out / name).stat().st_size > 1000 for name in figures)
    report = (out / "README.md").read_text(encoding="utf-8")
    for claim in table(out / "claims.csv"):
        assert claim["text"] in report
        assert claim["verdict"] in ("holds", "partly", "does not hold", "no difference seen")


def test_every_method_is_in_the_tables(out: Path) -> None:
    assert [row["method"] for row in table(out / "digits.csv")] == [*METHODS, *VARIANTS]
    assert [row["method"] for row in table(out / "smollm2.csv")] == list(METHODS)


def test_the_numbers_are_finite(out: Path) -> None:
    words = {"method", "at the grid's edge"}
    for name in ("digits", "smollm2", "ratio", "scaling", "rank"):
        for row in table(out / f"{name}.csv"):
            assert all(math.isfinite(float(value)) for key, value in row.items() if key not in words), (name, row)


def test_gradients_collapse_with_alpha_over_r_and_not_with_its_root(out: Path) -> None:
    rows = _study_cells.pick(_study_cells.read(out / "runs.csv").values(), study="scaling")
    first = {
        (name, r): _study_cells.over_seeds(_study_cells.pick(rows, method=name, r=r), "gradient")[0]
        for name in ("LoRA", "rsLoRA")
        for r in (2, 512)
    }
    assert first["LoRA", 512] < first["LoRA", 2] / 4
    assert first["rsLoRA", 512] > first["rsLoRA", 2] / 2


def test_every_start_is_the_pretrained_model(out: Path) -> None:
    """Whatever the method does to the weights: the first loss of the language model, of the same tokens, is the same."""
    rows = _study_cells.pick(_study_cells.read(out / "runs.csv").values(), part="smollm2", seed=0)
    first = [row["curve"][0] for row in rows]
    assert max(first) - min(first) < 1e-3 * min(first)


def test_a_cut_study_goes_on(out: Path, tmp_path: Path) -> None:
    lines = (out / "runs.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "runs.csv").write_text("".join(lines[:-3]) + lines[-3][:40], encoding="utf-8")
    known = _study_cells.read(tmp_path / "runs.csv")
    assert len(known) == len(lines) - 4
    finished = study(tmp_path)
    assert finished.returncode == 0, finished.stderr
    again = _study_cells.read(tmp_path / "runs.csv")
    assert again.keys() == _study_cells.read(out / "runs.csv").keys()
    assert all(again[cell] == row for cell, row in known.items())


def test_learning_rates_are_climbed_until_the_best_has_neighbours() -> None:
    size, rows = _study_cells.SHORT, []
    for _ in range(20):
        todo = [cell for cell in _study_llm.wanted(rows, size) if cell.method == "LoRA" and vars(cell) not in cells_of(rows)]
        if not todo:
            break
        rows += [vars(cell) | {"val_loss": abs(_study_llm.GRID.index(cell.lr) - 7)} for cell in todo]
    assert {row["lr"] for row in rows if row["seed"] == 0} == set(_study_llm.GRID[3:])
    assert {row["lr"] for row in rows if row["seed"] == 1} == {_study_llm.GRID[7]}


def cells_of(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{key: value for key, value in row.items() if key != "val_loss"} for row in rows]


def test_verdicts() -> None:
    fast, slow = ([{"seed": s, "t10": t + s} for s in range(3)] for t in (10, 20))
    noisy = [{"seed": s, "t10": t} for s, t in enumerate((5, 30, 12))]
    assert (better(fast, slow, "t10"), better(slow, fast, "t10")) == ("holds", "does not hold")
    assert better(noisy, fast, "t10") == "no difference seen"
    assert verdict(True, "holds") == "holds"
    assert verdict("no difference seen", True) == "partly"
    assert verdict(False, "no difference seen") == "does not hold"
    assert verdict("no difference seen", "no difference seen") == "no difference seen"


def test_steps_to_a_loss() -> None:
    smooth = _study_digits.smoothed(np.array([9.0, 3.0, 9.0, 1.0, 0.9, 0.2, 0.8, 0.1]), window=3)
    assert smooth.tolist() == [9.0, 9.0, 3.0, 1.0, 0.9, 0.8, 0.2, 0.1]
    assert [_study_digits.reached(smooth, level) for level in (4, 1, 0.5, 0.1)] == [3, 5, 7, 9]
