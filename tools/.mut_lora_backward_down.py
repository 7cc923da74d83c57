"""Are the tests of the CUDA kernels any good? One instruction of a kernel's PTX is changed, and it must be noticed.

    python tools/cuda_mutants.py                writes docs/cuda_mutants.md; minutes on two cores
    python tools/cuda_mutants.py --kernel lora_down --each 100 --out /tmp

A mutant runs behind the real launch code on the executor of tests/ptx, in the launches of cuda_cases.py, in a process of its own.
It is noticed if values leave the tolerance policy of tests/compare.py, if a checker reports, if the executor refuses it or does
not come to an end, or if a counter that the op tests assert is another one.

Every kernel instance gives the same number of mutants, spread evenly over the kinds of changes: drawn from all instructions
alike, mov and mma of unrolled loops would be most of them. The draw is a function of the kernel's name.
"""

import argparse
import os
import re
import signal
import time
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from cuda_cases import Case, Kernel, cases
from cuda_report import ROOT, demangled
from ptx.device import Counters, Device
from ptx_mutants import Entry, Mutant, drawn, entries
from tqdm import tqdm


def asserted(counters: Counters, entry: str) -> tuple[int | bool, ...]:
    """What the op tests say of a launch of whole tiles."""
    some = counters.matching(entry=entry)
    copies = some.matching("cp.async")
    ideal = (c.total("sectors") == c.total("ideal_sectors") for c in (copies, some.matching("st.global"), some))
    decoded = some.matching("ld.shared.f32").total("executions")
    return not some.bank_conflicts, some.mma_count, copies.total("global_bytes"), decoded, *ideal


class Known(NamedTuple):
    """A case, and what comes of it as it is."""

    case: Case
    counters: tuple[int | bool, ...]
    results: dict[str, torch.Tensor]
    executed: set[int]  # lines


def baseline(device: Device, kernel: Kernel, entry: Entry) -> list[Known]:
    found = []
    for case in cases(kernel, device):
        with device.run() as run:
            results = case.launch(run)
        if case.wrong(results):
            raise AssertionError(f"{kernel.name} is wrong as it is")
        results = {name: t.clone() for name, t in results.items()}
        executed = {c.ptx_line for c in run.counters.matching(entry=entry.name)}
        found.append(Known(case, asserted(run.counters, entry.name), results, executed))
    return found


def outcome(device: Device, source: str, entry: Entry, text: str, known: list[Known]) -> str:
    device.load_module(source, text)
    same = True
    for case, counters, before, _ in known:
        results, raised = {}, ""
        try:
            with device.run(check=False) as run:
                results = case.launch(run)
        except (RuntimeError, AssertionError) as e:  # what launchers and the op tests' helpers raise
            raised = str(e)
        reports = run.reports
        if any("is not implemented" in r for r in [*reports, raised]):
            raise NotImplementedError(" ".join([*reports, raised]))
        if reports:
            return re.search(r"memcheck|initcheck|racecheck|synccheck|executor", " ".join(reports))[0]
        if raised:
            return "executor"
        if case.wrong(results):
            return "values"
        if case.counted and asserted(run.counters, entry.name) != counters:
            return "counters"
        same = same and all(torch.equal(t.view(torch.uint8), before[name].view(torch.uint8)) for name, t in results.items())
    return "survived, same bits" if same else "survived, other bits"


def in_children(jobs: Iterable[tuple[Mutant, Callable[[], str]]], count: int, cpu_seconds: float) -> Iterator[tuple[Mutant, str]]:
    """Each job's result, from a process of its own, `count` at a time. A mutant may write anywhere and need not end."""
    running: dict[int, tuple[Mutant, int]] = {}

    def finished() -> tuple[Mutant, str]:
        pid, status = os.wait()
        key, pipe = running.pop(pid)
        with os.fdopen(pipe) as f:
            text = f.read()
        if os.WIFSIGNALED(status):
            text = "time" if os.WTERMSIG(status) == signal.SIGPROF else "crash"
        if text.startswith("broken"):
            raise RuntimeError(f"{key}: {text}")
        return key, text

    for key, job in jobs:
        receive, send = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
                os.write(send, job().encode())
            except BaseException as e:
                os.write(send, f"broken: {e!r}".encode())
            finally:
                os._exit(0)
        os.close(send)
        running[pid] = key, receive
        if len(running) == count:
            yield finished()
    while running:
        yield finished()


class Row(NamedTuple):
    kernel: Kernel
    kind: str
    ptx_line: int
    cuda_line: str
    before: str
    after: str
    outcome: str

    @property
    def survived(self) -> bool:
        return self.outcome.startswith("survived")


def run_kernel(device: Device, kernel: Kernel, entry: Entry, each: int, jobs: int) -> list[Row]:
    start = time.process_time()
    known = baseline(device, kernel, entry)
    cpu_seconds = 0.3 + 3 * (time.process_time() - start)  # more is an endless loop
    executed = set().union(*(k.executed for k in known))
    possible = {kind: [m for m in some if entry.reached(m.line, executed)] for kind, some in entry.mutants().items()}
    mutants = drawn(possible, each, f"{kernel.source} {kernel.name}")
    text = {m: entry.with_(m) for m in mutants}

    def job(mutant: Mutant) -> Callable[[], str]:
        some = [k for k in known if entry.reached(mutant.line, k.executed)]  # elsewhere it is not run
        return lambda: outcome(device, kernel.source, entry, text[mutant], some)

    rows = []
    for m, result in in_children(((m, job(m)) for m in mutants), jobs, cpu_seconds):
        after = "" if m.kind == "dropped" else " ".join(m.after.split())
        at = m.kind, entry.ptx_line(m.line), entry.source(m.line)
        rows.append(Row(kernel, *at, " ".join(m.before.split()), after, result))
    return rows


def run_all(device: Device, only: str, each: int, jobs: int) -> list[Row]:
    rows: list[Row] = []
    work = []
    for source, module in device.ptx().items():
        names = demangled(e.name for e in entries(module))
        work += [(Kernel(source, names[e.name]), e) for e in entries(module)]
    work = [(kernel, entry) for kernel, entry in work if only in f"{kernel.source} {kernel.name}"]
    for kernel, entry in tqdm(work, unit="kernel"):
        device.load_module(kernel.source, entry.text)
        rows += run_kernel(device, kernel, entry, each, jobs)
        device.load_module(kernel.source, device.ptx()[kernel.source])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="", help="only those whose .cu file and name contain this")
    parser.add_argument("--each", type=int, default=20, help="mutants of each kernel instance")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    torch.set_num_threads(1)  # threads do not live on in a forked process
    cuda = ROOT / "csrc" / "cuda"
    device = Device([*sorted(cuda.glob("*.cu")), cuda / "bindings.cpp"])
    rows = run_all(device, args.kernel, args.each, args.jobs)
    with open("/tmp/mut_surv_lora_backward_down.txt", "w") as f:
        for r in rows:
            if r.survived:
                print(r.kernel.source, r.kernel.name, "|", r.kind, r.ptx_line, r.cuda_line, "|", r.before, "|", r.after, "|", r.outcome, file=f)
    print(Counter(r.outcome for r in rows))


if __name__ == "__main__":
    main()
