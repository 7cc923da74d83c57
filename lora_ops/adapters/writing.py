"""Files that are the old ones or the new ones, whole."""

import contextlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def write_files(files: Mapping[Path, Callable[[Path], Any]]) -> None:
    """Writes every file under another name; all take their names when the last one is written.

    Raises:
        OSError: a file cannot be written, by its name; the old ones are as they were.
    """
    written = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in files}
    try:
        for path, write in files.items():
            try:
                write(written[path])
                with open(written[path], "rb") as f:
                    os.fsync(f.fileno())
            except (OSError, SafetensorError) as error:
                raise _not_written(path, error) from error
        for path, temporary in written.items():
            os.replace(temporary, path)
    finally:
        for temporary in written.values():
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()


def _not_written(path: Path, error: OSError | SafetensorError) -> OSError:
    """safetensors has an error of its own, with the number of the operating system's in its text."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    errno = int(number[1]) if number else getattr(error, "errno", None)
    words = f"{path} is not written, and what was there stays: {os.strerror(errno) if errno else error}"
    return OSError(errno, words) if errno else OSError(words)
