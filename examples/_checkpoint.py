"""What finetune.py keeps of a run while it trains, for --resume: one file, at any moment the old one or the new one."""

import argparse
import io
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import _quiet  # noqa: F401
import _report
import numpy as np
import torch

_FREE = ("out", "resume", "checkpoint_every")  # options that may differ


def _file(options: argparse.Namespace) -> Path:
    return options.out / "checkpoint.pt"


def _settings(options: argparse.Namespace) -> dict[str, str]:
    return {name: str(value) for name, value in vars(options).items() if name not in _FREE}


def _digest(data: np.ndarray) -> int:
    return zlib.crc32(data.tobytes())


def save(options: argparse.Namespace, data: np.ndarray, step: int, progress: Any, sides: Mapping[str, bytes]) -> None:
    """After `step` steps on data: `progress`, which JSON takes, and the state of every side."""
    file = io.BytesIO()
    torch.save(
        {
            "settings": _settings(options),
            "data": _digest(data),
            "step": step,
            "progress": json.dumps(progress),
            "sides": {name: torch.frombuffer(bytearray(state), dtype=torch.uint8) for name, state in sides.items()},
        },
        file,
    )
    _report.write(_file(options), lambda path: path.write_bytes(file.getbuffer()))


def load(options: argparse.Namespace) -> dict[str, Any] | None:
    """What the last `save` was told; None if there was none. An error if options are not those of then."""
    path = _file(options)
    if not path.exists():
        return None
    try:
        kept = torch.load(path, weights_only=True)
        settings, progress = dict(kept["settings"]), json.loads(kept["progress"])
        sides = {name: state.numpy().tobytes() for name, state in kept["sides"].items()}
    except Exception as error:
        raise SystemExit(f"--resume: {path} is damaged ({error}); without --resume the run starts anew") from error
    now = _settings(options)
    for name in sorted(settings.keys() | now.keys()):
        if settings.get(name) != now.get(name):
            option = "--" + name.replace("_", "-")
            raise SystemExit(f"--resume: {path} is of a run with {option} {settings.get(name)}, got {now.get(name)}")
    return {"data": kept["data"], "step": kept["step"], "progress": progress, "sides": sides}


def check_data(options: argparse.Namespace, checkpoint: Mapping[str, Any], data: np.ndarray) -> None:
    if checkpoint["data"] != _digest(data):
        raise SystemExit(f"--resume: {_file(options)} is of a run on another text or with another tokenizer")


def forget(options: argparse.Namespace) -> None:
    _file(options).unlink(missing_ok=True)
