"""examples/finetune.py --resume: a run that is killed ends where it would have ended, bit for bit."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from no_room import full_disk, public_folder, read_only
from test_finetune import fine_tune
from tiny_language import write_inputs

import _checkpoint  # isort: skip
import finetune  # isort: skip

DATA = np.arange(12).reshape(3, 2, 2)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("resume"))


def killed(inputs: Path, root: Path, kills: int, *options: str) -> list[dict]:
    command = [sys.executable, Path(__file__).with_name("killing.py"), kills, root]
    command += ["--model", inputs / "model", "--text", inputs / "text.txt", "--length", 32, "--r", 4, "--lr", 0.01]
    command += ["--threads", 1, "--dropout", 0.1, "--checkpoint-every", 1, *options]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(runs: list[dict], kills: int) -> None:
    assert len(runs) == kills
    assert [run for run in runs if not run["same"]] == []
    assert any(run["step"] for run in runs), "every kill came before the first checkpoint"
    assert {tuple(run["left"]) for run in runs} == {("adapter", "results.json")}


def test_two_kills(inputs: Path, tmp_path: Path) -> None:
    check(killed(inputs, tmp_path, 2, "--steps", "12", "--quant", "none"), 2)


@pytest.mark.slow
def test_twenty_kills(inputs: Path, tmp_path: Path) -> None:
    check(killed(inputs, tmp_path, 20, "--steps", "20"), 20)


@pytest.mark.slow
def test_the_script_itself(inputs: Path, tmp_path: Path) -> None:
    """Its first process alone is killed; the others end by themselves."""
    options = ("--steps", "30", "--quant", "none", "--checkpoint-every", "1")
    assert fine_tune(inputs, tmp_path / "whole", *options).returncode == 0
    command = [sys.executable, finetune.__file__, "--model", inputs / "model", "--text", inputs / "text.txt"]
    command += ["--length", 32, "--r", 4, "--lr", 0.01, "--threads", 1, "--out", tmp_path / "killed", *options]
    process = subprocess.Popen([str(word) for word in command], start_new_session=True)
    while not (tmp_path / "killed" / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 120
    while group_lives(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    done = fine_tune(inputs, tmp_path / "killed", *options, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resumed after step" in done.stdout
    whole, killed = ((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == killed


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, signal.SIG_DFL)
    except ProcessLookupError:
        return False
    return True


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def options_of(out: Path, *words: str) -> argparse.Namespace:
    return finetune.parse(["--out", str(out), *words])


def saved(out: Path, step: int = 1, *words: str) -> argparse.Namespace:
    options = options_of(out, *words)
    _checkpoint.save(options, DATA, step, [{"PEFT": {"losses": [1.5, 1e-40]}}, [3]], {"PEFT": b"state", "lora_ops": b"\0"})
    return options


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    options = saved(tmp_path)
    kept = _checkpoint.load(options_of(tmp_path, "--resume", "--checkpoint-every", "7"))
    assert kept["step"] == 1
    assert kept["progress"] == [{"PEFT": {"losses": [1.5, 1e-40]}}, [3]]
    assert kept["sides"] == {"PEFT": b"state", "lora_ops": b"\0"}
    _checkpoint.check_data(options, kept, DATA)
    _checkpoint.forget(options)
    assert _checkpoint.load(options) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "0.5"], "of a run with --lr 0.001, got 0.5"),
        (["--steps", "7"], "of a run with --steps 20, got 7"),
        (["--quant", "none"], "of a run with --quant nf4, got none"),
        (["--lora-alpha", "8"], "of a run with --lora-alpha 32, got 8.0"),
    ],
)
def test_other_options_are_refused(tmp_path: Path, words: list[str], message: str) -> None:
    saved(tmp_path)
    with pytest.raises(SystemExit, match=message):
        _checkpoint.load(options_of(tmp_path, "--resume", *words))


def test_another_text_is_refused(tmp_path: Path) -> None:
    options = saved(tmp_path)
    with pytest.raises(SystemExit, match="of a run on another text"):
        _checkpoint.check_data(options, _checkpoint.load(options), DATA + 1)


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_damage_is_named(tmp_path: Path, keep: int) -> None:
    options = saved(tmp_path)
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(SystemExit, match=r"checkpoint.pt is damaged .* without --resume the run starts anew"):
        _checkpoint.load(options)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    options = saved(tmp_path)
    with full_disk(100), pytest.raises(OSError, match=r"checkpoint.pt is not written, what was there stays: File too large"):
        saved(tmp_path, 2)
    assert _checkpoint.load(options)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_read_only_folder_keeps_the_last_checkpoint() -> None:
    with public_folder() as folder:
        options = saved(folder)
        with read_only(folder), pytest.raises(PermissionError, match=r"checkpoint.pt is not written, what was there stays"):
            saved(folder, 2)
        assert _checkpoint.load(options)["step"] == 1


def test_what_a_killed_run_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "checkpoint.pt").write_bytes(b"half")
    options = saved(tmp_path)
    assert _checkpoint.load(options)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
