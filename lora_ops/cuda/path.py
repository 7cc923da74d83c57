"""Which path a product takes on this GPU: decided by timing both, once.

    fused   our kernel multiplies by W0 and adds the low-rank term in the same accumulators
    split   torch (cuBLAS) multiplies by W0, our kernels add the low-rank term; a 4-bit W0 is decoded as a whole for that

The choice is kept per GPU, op, shape (M by powers of two) and dtypes: in memory, and in cuda_paths.json in the cache folder
(LORA_OPS_CACHE, or lora_ops in XDG_CACHE_HOME or ~/.cache). LORA_OPS_CUDA_PATH=fused|split|auto forces one.
"""

import contextlib
import functools
import json
import os
import statistics
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._version import __version__

PATHS = ("fused", "split")
VARIABLE = "LORA_OPS_CUDA_PATH"
_FORMAT = 1
_FEW_ROWS = 64  # up to here, reading W0 is what takes time, and one kernel less is one launch less


def forced() -> str | None:
    """What LORA_OPS_CUDA_PATH says; None for auto."""
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in (*PATHS, "auto"):
        raise ValueError(f'{VARIABLE} is "{choice}"; it may be fused, split or auto')
    return None if choice == "auto" else choice


def cache_file() -> Path:
    folder = os.environ.get("LORA_OPS_CACHE")
    if folder is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = str(Path(base) / "lora_ops")
    return Path(folder) / "cuda_paths.json"


def bucket(M: int) -> int:
    """The power of two at or above M."""
    return 1 << (M - 1).bit_length()


class Choices:
    """The paths chosen on one machine. `clock` runs a function and returns the seconds of one run of it."""

    def __init__(self, clock: Callable[[Callable[[], object]], float], machine: str, file: Path | None):
        self._clock, self._machine, self._file = clock, machine, file
        self._lock = threading.Lock()
        self._known: dict[str, str] = self._read()
        self.decided: dict[Any, str] = {}  # of this process, by what is at hand before there is a key

    def _contents(self) -> dict[str, dict[str, str]]:
        """Of the file, by machine. Raises ValueError where any of it is not what this version writes."""
        if self._file is None or not self._file.exists():
            return {}
        content = json.loads(self._file.read_text())
        by_machine = content.get("paths") if isinstance(content, dict) and content.get("format") == _FORMAT else None
        if not isinstance(by_machine, dict) or not all(
            isinstance(known, dict) and set(known.values()) <= set(PATHS) for known in by_machine.values()
        ):
            raise ValueError("it is not what this version writes")
        return by_machine

    def _read(self) -> dict[str, str]:
        """What another version wrote, or damage, is as good as no file."""
        try:
            return self._contents().get(self._machine, {})
        except (OSError, ValueError, TypeError) as e:
            warnings.warn(f"{self._file} is ignored: {e}", stacklevel=3)
            return {}

    def _write(self) -> None:
        """Beside what other machines and processes wrote; where the folder cannot be written, every process times anew."""
        if self._file is None:
            return
        by_machine: dict[str, dict[str, str]] = {}
        with contextlib.suppress(OSError, ValueError, TypeError):
            by_machine = self._contents()
        by_machine[self._machine] = {**by_machine.get(self._machine, {}), **self._known}
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._file.parent, suffix=".tmp")
            try:
                with os.fdopen(handle, "w") as f:
                    json.dump({"format": _FORMAT, "paths": by_machine}, f, indent=1, sort_keys=True)
                os.replace(name, self._file)
            except OSError:
                os.unlink(name)

    def choose(self, key: str, M: int, run: Callable[[str], object], may_time: bool = True) -> str:
        """The path of `key`: as forced, as known, or the faster one of run("fused") and run("split"), each timed now.

        Where there may be no timing (`may_time`): fused up to 64 rows, else split, and nothing is remembered.
        """
        path = forced() or self._known.get(key)
        if path is not None:
            return path
        if not may_time:
            return "fused" if M <= _FEW_ROWS else "split"
        with self._lock:
            if key not in self._known:
                self._known[key] = self._faster(run)
                self._write()
            return self._known[key]

    def _faster(self, run: Callable[[str], object]) -> str:
        """A path that fails, as for want of memory, is not taken; if both do, the error is the caller's."""
        seconds: dict[str, float] = {}
        errors: list[Exception] = []
        for path in PATHS:
            try:
                seconds[path] = self._clock(functools.partial(run, path))
            except RuntimeError as e:
                errors.append(e)
        if not seconds:
            raise errors[0]
        return min(seconds, key=seconds.__getitem__)

    def known(self) -> dict[str, str]:
        return dict(self._known)


def cuda_clock(run: Callable[[], object], runs: int = 5) -> float:
    """Median seconds of `runs` runs on the current stream, by events, after one run that is not counted."""
    run()
    times = []
    for _ in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


@functools.cache
def choices(device: torch.device, driver: int) -> Choices:
    """Of a GPU. Another driver, torch or version of this package times again."""
    name = torch.cuda.get_device_name(device)
    return Choices(cuda_clock, f"{name}, driver {driver}, torch {torch.__version__}, lora_ops {__version__}", cache_file())


def choose(known: Choices, op: str, x: Tensor, shape: tuple[int, int], lora_A: Tensor, run: Callable[..., object]) -> bool:
    """Whether torch multiplies by W0, for x (..., K or N), W0 (N, K), lora_A (r, K); run(split=...) is timed.

    Nothing is timed while a CUDA graph is captured.
    """
    M = x.numel() // x.shape[-1]
    what = op, bucket(M), *shape, lora_A.shape[0], x.dtype, lora_A.dtype
    path = forced() or known.decided.get(what)
    if path is None:
        N, K = shape
        dtypes = " ".join(str(t.dtype).removeprefix("torch.") for t in (x, lora_A))
        key = f"{op} M={bucket(M)} N={N} K={K} r={lora_A.shape[0]} {dtypes}"
        may_time = not torch.cuda.is_current_stream_capturing()
        path = known.choose(key, M, lambda path: run(split=path == "split"), may_time)
        if may_time:
            known.decided[what] = path
    return path == "split"
