"""python -m lora_ops doctor, as far as it goes without a GPU, and its self-test on the CPU."""

import subprocess
import sys

import pytest
import torch

import lora_ops
from lora_ops import doctor

CPU = torch.device("cpu")
SMALL = [case._replace(M=min(case.M, 40), K=case.K // 4, N=case.N // 4) for case in doctor.CASES]


def module(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "lora_ops", *arguments], capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    """It says what is there, that there is no GPU, and that this is no failure."""
    done = module("doctor")
    assert done.returncode == 0, done.stderr
    for words in (lora_ops.__version__, torch.__version__, lora_ops.build_info()["isa"], "CUDA", "no GPU was found"):
        assert words in done.stdout


@pytest.mark.parametrize(("arguments", "code"), [([], 0), (["--help"], 0), (["docter"], 2)])
def test_usage(arguments, code):
    done = module(*arguments)
    assert done.returncode == code
    assert "usage: python -m lora_ops doctor" in done.stdout


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_self_test_passes(case):
    assert list(doctor.self_test(CPU, [case])) == [(case, [])]


@pytest.mark.parametrize("name", ["y", "dx", "dA", "dB", "dbias"])
def test_the_self_test_notices(name):
    """One element off by a tenth of the largest, a NaN, another dtype, an op that raises."""
    actual, eager, exact = doctor.results(SMALL[3], CPU)
    for spoil in (lambda t: t.flatten()[0].add_(0.1 * t.abs().max()), lambda t: t.flatten()[-1].fill_(torch.nan)):
        spoiled = {**actual, name: actual[name].clone()}
        spoil(spoiled[name].view(-1))
        (problem,) = doctor.failures(spoiled, eager, exact)
        assert problem.startswith(f"{name} is off by")
    (problem,) = doctor.failures({**actual, name: actual[name].double()}, eager, exact)
    assert "float64" in problem


def test_an_op_that_raises_is_a_failure():
    ((_, problems),) = doctor.self_test(CPU, [SMALL[0]._replace(r=0)])
    assert len(problems) == 1 and "r" in problems[0]
