"""docs/distributed.md's table, and the simulation. That the formulas are what is sent: test_distributed.py."""

import csv
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import communication
import scaling

SIZES = ["--hidden=64", "--intermediate=128", "--layers=4", "--vocabulary=96", "--heads=4", "--kv-heads=4", "--r=4"]
SIZES += ["--batch=2", "--length=8"]
SECONDS = {"lora": 0.5, "qlora": 0.75, "full": 1.0}


def simulated(out: Path, *options: str) -> dict[tuple[str, str, int], dict[str, float]]:
    scaling.main([*SIZES, f"--out={out}", *options])
    with (out / "scaling.csv").open() as file:
        rows = list(csv.DictReader(file))
    keys = ("tokens", "compute_s", "communication_s", "efficiency", "efficiency_overlapped")
    return {(r["method"], r["tuning"], int(r["workers"])): {k: float(r[k]) for k in keys} for r in rows}


def test_the_page_has_the_formulas_numbers() -> None:
    page = communication.PAGE.read_text()
    assert communication.with_table(page) == page
    assert "| DDP | " in page


def test_bytes_that_leave_a_process() -> None:
    assert communication.sent({"all_reduce": 100}, 4) == 150
    assert communication.sent({"all_gather": 100, "reduce_scatter": 20, "send": 7}, 4) == 75 + 15 + 7
    assert communication.sent({"all_reduce": 100, "all_gather": 100}, 1) == 0


def test_simulated_seconds_are_the_stated_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"--{tuning}-seconds={s}" for tuning, s in SECONDS.items()]
    rows = simulated(tmp_path, *given, "--bandwidth=0.001", "--latency=100", "--microbatches=2")
    assert "simulated from a step of lora 0.5 s" in capsys.readouterr().out
    assert all((tmp_path / f"scaling.{ending}").stat().st_size > 10_000 for ending in ("png", "svg"))
    # A block's adapters: 4 layers of 64 x 64 and 3 of 64 x 128, r = 4, fp32. A ring of 8.
    adapters = 4 * 4 * (4 * 128 + 3 * 192) * 4
    for tuning in ("lora", "qlora"):
        row = rows["DDP", tuning, 8]
        assert row["communication_s"] == pytest.approx(2 * 7 / 8 * adapters / 1e6 + 14 * 1e-4, rel=1e-4)
        assert row["efficiency"] == pytest.approx(SECONDS[tuning] / (SECONDS[tuning] + row["communication_s"]), rel=1e-4)
        assert row["tokens"] == 8 * 16
    # Of a pipeline of 4: two microbatches need 5 slots, there and back, of 8 tokens in bf16.
    row = rows["PP", "full", 4]
    assert row["compute_s"] == pytest.approx(1.0 / 4 * 5 / 2)
    assert row["communication_s"] == pytest.approx(2 * 5 * (8 * 64 * 2 / 1e6 + 1e-4), rel=1e-4)
    assert {workers for method, _, workers in rows if method in ("TP", "PP")} == {1, 2, 4}
    for (method, tuning, workers), row in rows.items():
        assert 0 < row["efficiency"] <= row["efficiency_overlapped"] <= 1
        if workers == 1:
            assert row["efficiency"] == 1
        assert (
            row["communication_s"]
            < rows.get((method, tuning, 2 * workers), {"communication_s": float("inf")})["communication_s"]
        )


def test_a_step_is_measured_where_none_is_given(tmp_path: Path) -> None:
    rows = simulated(tmp_path, "--full-seconds=1000")
    assert rows["DDP", "full", 1]["compute_s"] == 1000
    for tuning in ("lora", "qlora"):
        assert 0 < rows["DDP", tuning, 1]["compute_s"] < 1000
