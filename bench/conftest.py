"""Collects what the bench measured and reports it at the end of the run."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from report import Results


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ.get("LORA_OPS_BENCH_THREADS", "1")))
    config.option.benchmark_quiet = True  # its table would list turns of all sides together


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Results:
    request.config._lora_ops_results = Results()
    return request.config._lora_ops_results


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = getattr(config, "_lora_ops_results", None)
    if results is None or not results.rows:
        return
    whole = not config.option.keyword and not terminalreporter.stats.get("failed")
    terminalreporter.write(results.report(Path(config.rootpath), update_readme=whole))
