"""The operator's tests again for every instruction set that this machine has, and with the base product in torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lora_ops

HERE = Path(__file__).parent
FILES = [
    "test_lora_forward.py", "test_lora_backward.py", "test_dropout.py", "test_qlora_linear.py", "test_multi_lora.py",
    "test_general_operator.py", "test_nonfinite.py",
]  # fmt: skip
INFO = lora_ops.build_info()


def run_suite(**variables: str) -> None:
    """conftest.py asserts that the forced ISA is the one that runs.

    One thread: the cases are small, and what depends on threads says how many.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        *(str(HERE / f) for f in FILES),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.parametrize("isa", [isa for isa in INFO["isas_supported"] if isa != INFO["isa"]])
def test_operator_on(isa):
    """The operator's tests pass on every other instruction set."""
    run_suite(LORA_OPS_CPU_ISA=isa, LORA_OPS_CPU_BASE="kernel")


def test_operator_with_the_base_product_in_torch():
    """Without AMX in oneDNN: its bf16 product there reads behind the rows of a matrix of odd width and multiplies what it finds
    by zero, so that a NaN behind x is one in y (https://github.com/uxlfoundation/oneDNN/issues/5717)."""
    run_suite(LORA_OPS_CPU_BASE="torch", ONEDNN_MAX_CPU_ISA="AVX512_CORE_BF16")


def test_every_machine_runs_the_generic_kernels():
    assert INFO["isas_supported"][-1] == "generic"
    assert set(INFO["isas_supported"]) <= set(INFO["isas_built"])
    assert INFO["isa"] in INFO["isas_supported"]


@pytest.mark.parametrize(
    ("variable", "value"), [("LORA_OPS_CPU_ISA", "sse9"), ("LORA_OPS_CPU_ISA", "AVX2"), ("LORA_OPS_CPU_BASE", "mkl")]
)
def test_unknown_choice_is_an_error_by_name(variable, value):
    code = (
        "import torch, lora_ops\n"
        "lora_ops.lora_linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1), scaling=1.0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, variable: value},
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )
    assert done.returncode == 1  # an exception, not a signal
    last = done.stderr.strip().splitlines()[-1]
    assert variable in last and f'"{value}"' in last
    assert all(name in last for name in (INFO["isas_supported"] if variable.endswith("ISA") else ["torch", "kernel", "auto"]))
