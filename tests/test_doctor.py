"""python -m lora_ops doctor, as far as it goes without a GPU, and its self-test on the CPU."""

import contextlib
import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import lora_ops
from lora_ops import doctor
from lora_ops.cuda import path

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
    assert list(doctor.self_test(CPU, [case])) == [(case, "auto", [])]


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
    ((_, _, problems),) = doctor.self_test(CPU, [SMALL[0]._replace(adapter_dtype=torch.float16)])
    assert len(problems) == 1 and problems[0].startswith("TypeError: lora_A")


@pytest.mark.parametrize("before", [None, "split"])
def test_each_path_is_forced_in_turn(monkeypatch, before):
    """And what the user has forced is there again, whatever happens."""
    if before is None:
        monkeypatch.delenv(path.VARIABLE, raising=False)
    else:
        monkeypatch.setenv(path.VARIABLE, before)
    forced = []

    def results(case, device):
        forced.append((case.M, path.forced()))
        if case.M == SMALL[1].M:
            raise RuntimeError("no")
        return {}, {}, {}

    monkeypatch.setattr(doctor, "results", results)
    told = [(case.M, chosen) for case, chosen, _ in doctor.self_test(CPU, SMALL[:2], path.PATHS)]
    assert told == forced == [(case.M, chosen) for case in SMALL[:2] for chosen in ("fused", "split")]
    assert os.environ.get(path.VARIABLE) == before


ADVICE = "\nCUDA kernel errors might be asynchronously reported\nCompile with `TORCH_USE_CUDA_DSA`"


class FakeGpus:
    """torch.cuda as it looks with two GPUs of which one dies at its `fatal`-th case, and whose ops fail at `failing` ones."""

    def __init__(self, monkeypatch, *, fatal=(), failing=(), bench_error=None):
        self.cases, self.benches, self.dead = 0, 0, False

        def results(case, device):
            self.cases += 1
            self.dead |= self.cases in fatal
            if self.dead or self.cases in failing:
                raise RuntimeError("CUDA error: an illegal memory access was encountered" + ADVICE)
            return {}, {}, {}

        def bench(device):
            self.benches += 1
            yield "  a table"
            if bench_error:
                self.dead = bench_error == "fatal"
                raise RuntimeError("CUDA error: something else" + ADVICE)

        def synchronize(device):
            if self.dead:
                raise RuntimeError("CUDA error: an illegal memory access was encountered" + ADVICE)

        properties = SimpleNamespace(name="a GPU", major=8, minor=0, multi_processor_count=108)
        for name, value in {
            "is_available": lambda: True, "device_count": lambda: 2, "get_device_properties": lambda device: properties,
            "device": lambda device: contextlib.nullcontext(), "synchronize": synchronize,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(doctor.dispatch, "extension", lambda: None)
        monkeypatch.setattr(doctor, "results", results)
        monkeypatch.setattr(doctor, "bench", bench)


def test_two_gpus_that_are_well(monkeypatch, capsys):
    gpus = FakeGpus(monkeypatch)
    assert doctor.main() == 0
    assert (gpus.cases, gpus.benches) == (2 * len(doctor.CASES), 2)
    assert "all checks passed" in capsys.readouterr().out


def test_a_gpu_that_fails_ends_the_report(monkeypatch, capsys):
    gpus = FakeGpus(monkeypatch, fatal=[3])
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert (gpus.cases, gpus.benches) == (3, 0)
    assert out.count("WRONG") == 1
    assert out.rstrip().splitlines()[-1].startswith("GPU 0 FAILED, nothing more can be computed in this process: RuntimeError")
    assert "Traceback" not in out and "asynchronously" not in out


def test_an_op_that_raises_on_a_gpu_that_lives_on(monkeypatch, capsys):
    gpus = FakeGpus(monkeypatch, failing=[3])
    assert doctor.main() == 1
    assert (gpus.cases, gpus.benches) == (2 * len(doctor.CASES), 2)
    assert "1 checks failed" in capsys.readouterr().out


@pytest.mark.parametrize(("bench_error", "benches", "last"), [("fatal", 1, "GPU 0 FAILED"), ("other", 2, "2 checks failed")])
def test_a_bench_that_raises(monkeypatch, capsys, bench_error, benches, last):
    gpus = FakeGpus(monkeypatch, bench_error=bench_error)
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert gpus.benches == benches
    assert "WRONG  the bench ends here: RuntimeError: CUDA error: something else\n" in out
    assert out.rstrip().splitlines()[-1].startswith(last)
    assert "Traceback" not in out and "asynchronously" not in out


# A fake _C_cuda in a folder that is searched behind the package's own.
WITH_EXTENSION = """
import sys, torch, lora_ops
lora_ops.__path__.append({folder!r})
torch.version.cuda = {cuda!r}
from lora_ops import doctor
code = doctor.main()
print("LOADED" if "lora_ops._C_cuda" in sys.modules else "not loaded", code)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("cuda", "end"), [(None, "not loaded 0"), ("13.0", "LOADED 0")])
def test_the_extension_is_loaded_only_where_torch_has_cuda(tmp_path, cuda, end):
    if importlib.util.find_spec("lora_ops._C_cuda") is None:
        (tmp_path / "_C_cuda.py").write_text("def driver_version():\n    return 0\n")
    code = WITH_EXTENSION.format(folder=str(tmp_path), cuda=cuda)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.rstrip().endswith(end), done.stdout + done.stderr
    assert ("torch has none, though the CUDA kernels are built" in done.stdout) == (cuda is None)


@pytest.mark.parametrize(
    ("name", "bytes_per_second"),
    [
        ("NVIDIA A100-SXM4-40GB", 1.555e12), ("NVIDIA A100 80GB PCIe", 1.935e12), ("NVIDIA H100 80GB HBM3", 3.35e12),
        ("NVIDIA H100 PCIe", 2.0e12), ("NVIDIA H100 NVL", 3.9e12), ("NVIDIA GeForce RTX 4090", 1.008e12),
        ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA L40", None),
        ("NVIDIA H100", None), ("NVIDIA H20", None), ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
    ],
)  # fmt: skip
def test_a_gpus_peaks_are_of_its_whole_name(name, bytes_per_second):
    assert (doctor.peaks(name) or (None, None))[1] == bytes_per_second
