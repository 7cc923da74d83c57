"""Processes of one gloo group that stay, and run what they are told: starting one costs more than most tests.

The functions come by reference: they are those of a module that the processes can import (`distributed_runs`).
"""

import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

# The processes are forked from one that has imported everything and run nothing.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["distributed_runs"])
TIMEOUT = timedelta(minutes=10)


def _start_server() -> None:
    """With this process's search path, which it would not know otherwise and import nothing."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


class Workers:
    def __init__(self, world: int) -> None:
        self.world = world
        self._started: list[tuple[Any, Connection]] = []
        self._directory = tempfile.TemporaryDirectory(prefix="gloo-")

    def _start(self) -> None:
        _start_server()
        store = tempfile.mktemp(dir=self._directory.name)
        for rank in range(self.world):
            here, there = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(rank, self.world, store, there), daemon=True)
            process.start()
            there.close()
            self._started.append((process, here))

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(*args) in every process; the results by rank."""
        if not self._started:
            self._start()
        results: dict[int, Any] = {}
        pipes = {pipe: rank for rank, (_, pipe) in enumerate(self._started)}
        for pipe in pipes:
            pipe.send_bytes(pickle.dumps((function, args)))
        while len(results) < self.world:
            ready = wait([pipe for pipe, rank in pipes.items() if rank not in results], TIMEOUT.total_seconds())
            try:
                assert ready, f"processes {sorted(set(pipes.values()) - set(results))} do not answer"
                for pipe in ready:
                    assert pipe.poll() or self._started[pipes[pipe]][0].is_alive(), f"process {pipes[pipe]} has died"
                    done, result = pickle.loads(pipe.recv_bytes())
                    assert done, f"in process {pipes[pipe]}:\n{result}"
                    results[pipes[pipe]] = result
            except BaseException:
                self.stop()  # the others wait for one that will not come
                raise
        return [results[rank] for rank in range(self.world)]

    def stop(self) -> None:
        for process, pipe in self._started:
            process.kill()
            process.join()
            pipe.close()
        self._started = []


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    faulthandler.enable()  # where a process was when it died
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=TIMEOUT)
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the tests are over
            os._exit(0)
        try:
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
