"""python killing.py KILLS OUT ARGUMENTS...: does --resume end where a run that is left alone ends?

Runs examples/finetune.py with ARGUMENTS once without a disturbance, in OUT/whole. Then, KILLS times, in OUT/<n>: kills it and
all of its processes at a random moment by SIGKILL, and resumes it. Prints a line of JSON for each: when it was killed, from
which step it went on, and whether every loss, every weight and what was decoded are those of the whole run, bit for bit.

Each run is a fork of this process, which has imported everything, plots nothing and decodes little: seconds instead of half a
minute.
"""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import _run
import finetune

finetune.SAMPLE_TOKENS, finetune.DECODING_ROUNDS = 2, 1
finetune._report.plot = lambda *_: None
_run.multiprocessing = types.SimpleNamespace(get_context=lambda _: multiprocessing.get_context("fork"))


def _close(side: _run.Process) -> None:
    """Sides that were forked later hold its connection open, too: it would wait for its end for ever."""
    side.process.terminate()
    side.process.join()


_run.Process.close = _close


def start(out: Path, arguments: list[str]) -> int:
    """The process's id, which is its group's, too."""
    assert threading.active_count() == 1, "a fork beside threads may wait for their locks for ever"
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 3
        try:
            os.setsid()
            log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            status = finetune.main([*arguments, "--out", str(out)])
            sys.stdout.flush()
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(status)
    return pid


def finish(out: Path, arguments: list[str]) -> float:
    """Seconds that it took."""
    begun = time.monotonic()
    pid = start(out, arguments)
    if os.waitpid(pid, 0)[1] != 0:
        raise SystemExit(f"a run failed:\n{out.with_suffix('.log').read_text()}")
    return time.monotonic() - begun


def kill(out: Path, arguments: list[str], moment: float) -> bool:
    """Whether there was something to kill."""
    pid = start(out, arguments)
    time.sleep(moment)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1] == signal.SIGKILL


def outcome(out: Path) -> dict:
    """What must not depend on whether the run was killed."""
    weights = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    results = json.loads((out / "results.json").read_text())
    figures = ("losses", "held_out_before", "held_out_after")
    return {"weights": weights.hex(), **{name: [side[figure] for figure in figures] for name, side in results.items()}}


def main(kills: int, root: Path, arguments: list[str]) -> None:
    seconds, whole, moments = finish(root / "whole", arguments), outcome(root / "whole"), random.Random(0)
    for n in range(kills):
        out = root / str(n)
        while not kill(out, arguments, moment := moments.uniform(0, seconds)):
            shutil.rmtree(out)  # it was faster this time
        finish(out, [*arguments, "--resume"])
        resumed = [line for line in out.with_suffix(".log").read_text().splitlines() if line.startswith("resumed after step")]
        step = int(resumed[-1].split()[3]) if resumed else 0
        left = sorted(path.name for path in out.iterdir())
        print(json.dumps({"after": moment, "step": step, "same": outcome(out) == whole, "left": left}))
        shutil.rmtree(out)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
