"""Which path a product takes on this GPU: decided by timing both, once.

    fused   our kernel multiplies by W0 and adds the low-rank term in the same accumulators
    split   torch (cuBLAS) multiplies by W0, our kernels add the low-rank term

The choice is kept per GPU, op, shape (M by powers of two) and dtype: in memory, and in cuda_paths.json in the cache folder
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

import torch
from torch import Tensor

from .._version import __version__

PATHS = ("fused", "split")
_FORMAT = 1
_RUNS = 5
_FEW_ROWS = 64  # up to here, reading W0 is what takes time, and one kernel less is one launch less


def forced() -> str | None:
    """What LORA_OPS_CUDA_PATH says; None for auto."""
    choice = os.environ.get("LORA_OPS_CUDA_PATH", "auto")
    if choice not in (*PATHS, "auto"):
        raise ValueError(f'LORA_OPS_CUDA_PATH is "{choice}"; it may be fused, split or auto')
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

    def _read(self) -> dict[str, str]:
        """All of the file or nothing: what another version wrote, or damage, is as good as no file."""
        if self._file is None or not self._file.exists():
            return {}
        try:
            content = json.loads(self._file.read_text())
            known = content["paths"].get(self._machine, {})
            if content["format"] != _FORMAT or not all(
                isinstance(key, str) and path in PATHS for paths in content["paths"].values() for key, path in paths.items()
            ):
                raise ValueError("unknown contents")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            warnings.warn(f"{self._file} is ignored: {e!r}", stacklevel=2)
            return {}
        return dict(known)

    def _write(self) -> None:
        """Beside what other machines and processes have written; a folder that cannot be written costs a timing per process."""
        if self._file is None:
            return
        others: dict[str, dict[str, str]] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(self._file.read_text())
            others = dict(content["paths"]) if content["format"] == _FORMAT else {}
        others[self._machine] = {**others.get(self._machine, {}), **self._known}
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._file.parent, suffix=".tmp")
            try:
                with os.fdopen(handle, "w") as f:
                    json.dump({"format": _FORMAT, "paths": others}, f, indent=1, sort_keys=True)
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
                seconds = {path: self._clock(functools.partial(run, path)) for path in PATHS}
                self._known[key] = min(PATHS, key=seconds.__getitem__)
                self._write()
            return self._known[key]

    def known(self) -> dict[str, str]:
        return dict(self._known)


def cuda_clock(run: Callable[[], object]) -> float:
    """Median seconds of a few runs on the current stream, by events, after one run that is not counted."""
    run()
    times = []
    for _ in range(_RUNS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


@functools.cache
def choices(device: torch.device) -> Choices:
    """Of a GPU. Another driver, CUDA or version of this package times again."""
    name = torch.cuda.get_device_name(device)
    return Choices(cuda_clock, f"{name}, CUDA {torch.version.cuda}, lora_ops {__version__}", cache_file())


def choose(op: str, x: Tensor, weight: Tensor, run: Callable[..., object]) -> bool:
    """Whether torch multiplies by W0, for x (..., K or N) and weight (N, K); run(split=...) is what is timed.

    Nothing is timed while a CUDA graph is captured.
    """
    M = x.numel() // x.shape[-1]
    N, K = weight.shape
    key = f"{op} M={bucket(M)} N={N} K={K} {str(x.dtype).removeprefix('torch.')}"
    may_time = not torch.cuda.is_current_stream_capturing()
    return choices(x.device).choose(key, M, lambda path: run(split=path == "split"), may_time) == "split"
