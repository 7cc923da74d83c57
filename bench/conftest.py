"""Collects what the bench measured and reports it at the end of the run."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from report import Results
from report_4bit import Results4Bit
from report_rows import Rows

RESULTS = pytest.StashKey[list[Results | Results4Bit | Rows]]()


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ.get("LORA_OPS_BENCH_THREADS", "1")))
    config.option.benchmark_quiet = True  # its table would list turns of all sides together


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Results:
    results = Results()
    request.config.stash.setdefault(RESULTS, []).append(results)
    return results


@pytest.fixture(scope="session")
def results_4bit(request: pytest.FixtureRequest) -> Results4Bit:
    results = Results4Bit()
    request.config.stash.setdefault(RESULTS, []).append(results)
    return results


@pytest.fixture(scope="session")
def rows_of(request: pytest.FixtureRequest) -> Callable[[str, str, dict[str, Rows.Cell]], Rows]:
    """The rows of that name, which are new where there are none yet."""
    by_name: dict[str, Rows] = {}

    def rows(name: str, caption: str, columns: dict[str, Rows.Cell]) -> Rows:
        if name not in by_name:
            by_name[name] = Rows(name, caption, columns)
            request.config.stash.setdefault(RESULTS, []).append(by_name[name])
        return by_name[name]

    return rows


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    whole = not config.option.keyword and not terminalreporter.stats.get("failed") and "::" not in "".join(config.args)
    for results in config.stash.get(RESULTS, []):
        if results.rows:
            terminalreporter.write(results.report(Path(config.rootpath), update_readme=whole))
