"""examples/distributed.py as a user starts it: two processes learn what one does, and leave the same adapter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import distributed  # noqa: E402

STEPS = 10


def launch(processes: int, out: Path, *options: str) -> list[float]:
    accelerate = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--cpu",
        "--num_cpu_threads_per_process=1",
    ]
    group = [f"--num_processes={processes}", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    group += ["--main_process_port=0"] if processes > 1 else []
    script = [str(EXAMPLES / "distributed.py"), f"--steps={STEPS}", f"--out={out}", *options]
    # Without a configuration of the user's, and with the package that is tested.
    environment = os.environ | {"HF_HOME": str(out.parent), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([*accelerate, *group, *script], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"adapter: {out}" in done.stdout
    return [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", done.stdout, re.M)]


@pytest.mark.parametrize("options", [[], ["--quant=nf4"]], ids=["lora", "qlora"])
def test_one_process_learns(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # one of a process, set by whoever is first
    monkeypatch.setattr(sys, "argv", ["distributed.py", f"--steps={STEPS}", f"--out={tmp_path}", *options])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    distributed.main()
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", capsys.readouterr().out, re.M)]
    assert len(losses) == STEPS
    assert losses[-1] < 0.9 * losses[0]
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2 * 7 * 2
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--quant=nf4"]], ids=["lora", "qlora"])
def test_two_processes_are_one(options: list[str], tmp_path: Path) -> None:
    one, two = (launch(processes, tmp_path / str(processes), *options) for processes in (1, 2))
    assert len(one) == STEPS
    assert two == pytest.approx(one, rel=1e-5)
    assert one[-1] < 0.9 * one[0]
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("1", "2")]
    assert len(adapters[0]) == 2 * 7 * 2
    for name, t in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], t, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_code_of_the_page_runs_in_two_processes(tmp_path: Path) -> None:
    page = (EXAMPLES.parent / "docs" / "distributed.md").read_text()
    script = tmp_path / "page.py"
    script.write_text("\n".join(re.findall(r"```python\n(.*?)```", page, re.S)) + "\nprint('done', rank, stages)\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([*torchrun, str(script)], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(re.findall(r"done \d \d", done.stdout)) == ["done 0 2", "done 1 2"]
