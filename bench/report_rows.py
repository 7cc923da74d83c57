"""A table, a CSV and the README from rows that are measured one by one."""

import csv
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import replace_in_readme, written

import lora_ops


class Rows:
    """One row per case. `columns`: of the table, each with what it shows of a row; the CSV has the rows as they are."""

    Cell = Callable[[dict[str, Any]], str]

    def __init__(self, name: str, caption: str, columns: dict[str, Cell]) -> None:
        self.name, self.caption, self.columns = name, caption, columns
        self.rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def line(self, row: dict[str, Any]) -> str:
        """A row on its own."""
        return ", ".join(f"{column} {cell(row)}" for column, cell in self.columns.items())

    def report(self, root: Path, update_readme: bool) -> str:
        out = root / "bench_out" / f"{self.name.removeprefix('bench-')}.csv"
        out.parent.mkdir(exist_ok=True)
        with written(out) as temporary, temporary.open("w", newline="") as f:
            writer = csv.DictWriter(f, fieldnames=list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
        table = self._table()
        if update_readme:
            replace_in_readme(root, self.name, table)
        return f"\n{table}\nwritten: {out}\n"

    def _table(self) -> str:
        lines = [
            f"{platform.machine()}, {lora_ops.build_info()['isa']}, torch {torch.__version__}. {self.caption}",
            "",
            f"| {' | '.join(self.columns)} |",
            "|" + "---|" * len(self.columns),
            *(f"| {' | '.join(cell(row) for cell in self.columns.values())} |" for row in self.rows),
        ]
        return "\n".join(lines) + "\n"
