"""What study.py writes of its runs: tables, figures, README.md."""

import csv
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import _study_llm as llm
import _study_plots as plots
from _report import write as write_whole
from _study_cells import Row, Size, at_edge, best_lr, over_seeds, pick
from _study_claims import Claim, claims
from _study_methods import METHODS, VARIANTS
from _study_results import SPEED, Results

Table = list[dict[str, Any]]


def write(out: Path, rows: list[Row], size: Size) -> None:
    tables: dict[str, Table] = {
        "digits": digits_table(rows, size, "methods", METHODS) + digits_table(rows, size, "starts", VARIANTS),
        "smollm2": lm_table(rows),
        "ratio": grouped(rows, "ratio", ("width", "ratio"), ("loss", "test")),
        "scaling": grouped(rows, "scaling", ("method", "r"), ("loss", "gradient")),
        "rank": grouped(rows, "rank", ("r",), ("loss", "test"), "val"),
    }
    found = claims(rows)
    for name, table in {**tables, "claims": [dataclasses.asdict(claim) for claim in found]}.items():
        write_whole(out / f"{name}.csv", lambda path, table=table: write_csv(path, table))
    plots.write(out, Results(rows))
    text = readme(tables, found, rows, size)
    write_whole(out / "README.md", lambda path: path.write_text(text, encoding="utf-8"))


def write_csv(path: Path, table: Table) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, table[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{v:.5g}" if isinstance(v, float) else v for key, v in row.items()} for row in table)


def spread(rows: Iterable[Row], *metrics: str) -> dict[str, float]:
    """Mean and standard deviation of each."""
    return {key: v for m in metrics for key, v in zip((m, f"{m} sd"), over_seeds(rows, m), strict=True)}


def digits_table(rows: list[Row], size: Size, study: str, names: Iterable[str]) -> Table:
    results, table = Results(rows), []
    for name in names:
        fast, accurate = (results.of(name, *criteria, study=study) for criteria in (SPEED, ("val",)))
        table.append(
            {"method": name, "parameters": int(fast[0]["params"]), "kept KiB": fast[0]["saved_kib"], "lr, speed": fast[0]["lr"]}
            | spread(fast, "t50", "t10", "loss")
            | {"lr, accuracy": accurate[0]["lr"]}
            | spread(accurate, "test", "old", "shifted")
            | {"at the grid's edge": edge({"speed": fast[0]["lr"], "accuracy": accurate[0]["lr"]}, size.grid)}
        )
    return table


def lm_table(rows: list[Row]) -> Table:
    results, table = Results(rows), []
    for name in METHODS:
        best = results.lm(name)
        row = {"method": name, "parameters": int(best[0]["params"]), "lr": best[0]["lr"]}
        row |= {"before": over_seeds(best, "before")[0]} | spread(best, "loss")
        table.append(row | {"at the grid's edge": edge({"yes": best[0]["lr"]}, llm.GRID)})
    return table


def grouped(rows: list[Row], study: str, by: tuple[str, ...], metrics: tuple[str, ...], criterion: str = "loss") -> Table:
    """Each at its own best learning rate."""
    table, done = [], pick(rows, part="digits", study=study)
    for key in sorted({tuple(row[k] for k in by) for row in done}):
        group = pick(done, **dict(zip(by, key, strict=True)))
        lr = best_lr(group, criterion)
        row = dict(zip(by, key, strict=True)) | {"lr": lr} | spread(pick(group, lr=lr), *metrics)
        table.append(row | {"at the grid's edge": edge({"yes": lr}, {row["lr"] for row in group})})
    return table


def edge(lrs: dict[str, float], grid: Iterable[float]) -> str:
    return ", ".join(name for name, lr in lrs.items() if at_edge(lr, grid))


def markdown(table: Table, columns: Iterable[str] | None = None) -> str:
    """A column and its " sd" become one."""
    columns = [c for c in (columns or table[0]) if not c.endswith(" sd")]
    rows = [columns, ["---"] * len(columns)]
    for row in table:
        rows.append([shown(row[c]) + (f" ± {row[f'{c} sd']:.2g}" if f"{c} sd" in row else "") for c in columns])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def count(found: Iterable[Claim], test: Callable[[str], bool]) -> int:
    return sum(test(claim.verdict) for claim in found)


def readme(tables: dict[str, Table], found: list[Claim], rows: list[Row], size: Size) -> str:
    lm = "SmolLM2-135M-Instruct" if size.smollm2 else "a random Llama of two layers (--short)"
    claim_table = [{"claim": c.text, "source": c.source, "measured": c.measured, "verdict": f"**{c.verdict}**"} for c in found]
    width = size.widths[-2]
    steps = {part: len(pick(rows, part=part, study="methods")[0]["curve"]) for part in ("digits", "smollm2")}
    return f"""# The family, measured

Written by `python examples/study.py{"" if size.smollm2 else " --short"}`; {len(rows)} runs, all in [runs.csv](runs.csv).
Of {len(found)} claims {count(found, lambda v: v == "holds")} hold here, {count(found, lambda v: v == "partly")} in part, and
{count(found, lambda v: v not in ("holds", "partly"))} do not or show no difference. These are small models and short runs: a
claim that fails here may hold for large ones.

## Claims

Mean ± standard deviation over {size.seeds} random starts. "Better" is a verdict on the differences between runs with the
same start (base model, data, order): their mean must exceed their standard deviation; else no difference was seen.
Steps are those until the loss has fallen that far; one more than the run has means never.

{markdown(claim_table)}

## How

* **Digits**: an MLP {" - ".join(map(str, (64, width, width, 10)))} learns scikit-learn's digits, upright; the task is the same
  digits turned by 90 degrees with permuted labels. 60 % train, 20 % choose the learning rate, 20 % test. AdamW without decay,
  {steps["digits"] * 10} steps of 128; r = 8, lora_alpha = 16 on all three layers, r = 5 on the last, whose ten outputs
  allow LoRA-GA no more. AdaLoRA starts with 1.5 r.
* **SmolLM2**: {lm}; CPython's documentation, {steps["smollm2"]} steps of {llm.BATCH} x {llm.LENGTH} tokens, all linear
  layers of the upper half of the blocks, which halves the backward; bfloat16 with adapters in float32, full fine-tuning in
  float32. Learning rates are chosen by {llm.VALIDATION} held-out blocks with the first start, and losses are of {llm.TEST}
  others. All this is little, for the whole study is to take half an hour on two cores: it tells methods that learn fast from
  others, nothing of long training.
* **Learning rates**: each method's own best from one grid: digits {", ".join(f"{lr:.2g}" for lr in size.grid)}; SmolLM2
  {", ".join(f"{lr:.2g}" for lr in llm.GRID)}, climbed from the middle until the best has neighbours on both sides. "At the
  grid's edge" marks those that may have a better one beyond.
* **Seconds** are CPU seconds, on a machine that did other work: only LoRA-GA's, of one process each, are compared.
* Full fine-tuning trains the weights of the same layers. LoRA-FA is the one with the preconditioned gradient; "B only" is its
  first form. +SO is rsLoRA with random A and B and the offset; +GA is LoRA-GA with scale "unit" and alpha / r.

## Digits

t50, t10: steps until the smoothed loss is below 0.5 and 0.1 (one more than all if never), at the learning rate best for t10.
test, old, shifted: accuracy on the task, on the upright digits, and on the task's digits shifted by a pixel, at the learning
rate best for accuracy. kept: what the forward of 128 digits keeps for the backward.

{markdown(tables["digits"])}

![Loss](digits.png)

## SmolLM2

Held-out loss before and after.

{markdown(tables["smollm2"])}

![Loss](smollm2.png)

## Learning rates

![Learning rates](learning_rates.png)

## LoRA+: ratio and width

Loss after {100 // size.hurry} steps, lr the geometric mean of A's and B's.

{markdown(tables["ratio"])}

## rsLoRA: rank and scaling

lora_alpha = 16; loss after {150 // size.hurry} steps.

{markdown(tables["scaling"])}

## Rank

lora_alpha = 2 r.

{markdown(tables["rank"])}

![Ratio, scaling, rank](claims.png)
"""
