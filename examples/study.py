"""Trains LoRA and what came after it, with lora_ops, and puts what the papers claim beside what comes out.

LoRA, rsLoRA, LoRA+, LoRA-GA, PiSSA, MiLoRA, OLoRA, DoRA, VeRA, LoRA-FA, AdaLoRA and full fine-tuning, on scikit-learn's digits
and on SmolLM2-135M-Instruct with CPython's documentation, with a learning rate of each method's own from one grid and three
random starts. _study_methods.py has how each is set up.

Writes into --out: runs.csv, a line as soon as a run ends (a study that was cut goes on from there), and from it README.md,
tables as CSV and figures as PNG and SVG. About half an hour on two cores; --short, with smaller models, fewer steps and starts
and a random language model, under a minute.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _study_digits as digits
import _study_llm as llm
import _study_report as report
import torch
from _study_cells import SHORT, Cell, Row, Size, append, mend, read
from tqdm import tqdm

PROCESSES = 2


def wanted(rows: dict[Cell, Row], size: Size) -> list[Cell]:
    """The runs that are still to be made, as far as can be said."""
    known = rows.values()
    cells = [*llm.wanted(known, size), *digits.cells(size), *digits.later(known, size)]
    return [cell for cell in cells if cell not in rows]


def run(task: tuple[Cell, Size, Path | None]) -> tuple[Cell, dict[str, Any]]:
    cell, size, model = task
    torch.set_num_threads(1)
    return cell, digits.run(cell, size) if cell.part == "digits" else llm.run(cell, size, model)


def runs(size: Size, model: Path | None, path: Path, processes: int) -> Iterator[Cell]:
    """Makes runs until none is wanted, and yields each that is in the file."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes below: each has a core
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        while cells := wanted(read(path), size):
            for cell, metrics in pool.imap_unordered(run, [(cell, size, model) for cell in cells]):
                append(path, cell, metrics)
                yield cell


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("study_out"), metavar="DIR")
    parser.add_argument("--model", type=Path, default=Path("demo_out/model"), metavar="DIR", help="SmolLM2; made if missing")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="each has one thread")
    options = parser.parse_args(argv)
    if options.processes < 1:
        parser.error(f"--processes must be at least 1, got {options.processes}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    size, begin = SHORT if options.short else Size(), time.perf_counter()
    model = options.model.resolve() if size.smollm2 else None
    if model is not None:
        llm.prepare(model)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "runs.csv"
    mend(path)
    known = read(path)
    bar = tqdm(desc="runs", unit="run", mininterval=1, initial=len(known), total=len(known) + len(wanted(known, size)))
    for _ in runs(size, model, path, options.processes):
        bar.total = max(bar.total, bar.n + 1)  # learning rates that are climbed add to what was known
        bar.update()
    bar.close()
    report.write(options.out, list(read(path).values()), size)
    print(f"{bar.n} runs, {time.perf_counter() - begin:.0f} s. Written to {options.out}/: README.md, *.csv, *.png, *.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
