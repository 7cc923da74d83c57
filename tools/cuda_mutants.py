"""Are the tests of the CUDA kernels any good? One instruction of a kernel's PTX is changed, and it must be noticed.

    python tools/cuda_mutants.py                writes docs/cuda_mutants.md; minutes on two cores, goes on where it was stopped
    python tools/cuda_mutants.py --kernel up --each 5 --out /tmp

A mutant runs behind the real launch code on the executor of tests/ptx, in the launches of cuda_cases.py, in a process of its own.
It is noticed if values leave the tolerance policy of tests/compare.py, if a checker reports, if the executor raises or does not
come to an end, or if a counter that the op tests assert is another one: bank conflicts, or how often tensor cores multiply.

Every kernel instance gives the same number of mutants, spread evenly over the kinds of changes: drawn from all instructions
alike, mov and mma of unrolled loops would be most of them. The draw is a function of the kernel's name.
"""

import argparse
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
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

CPU_SECONDS = 5  # of a mutant, whose launches take a fraction of one: more is an endless loop
LOG = ROOT / "build" / "cuda_mutants.jsonl"


# --- one mutant -------------------------------------------------------------------------------------------------------


def asserted(counters: Counters, entry: str) -> tuple[int, int, int]:
    """Where the tensors are aligned, the op tests also assert that sectors are ideal."""
    some = counters.matching(entry=entry)
    return some.total("wavefronts") - some.total("ideal_wavefronts"), some.mma_count, some.total("sectors") - some.total("ideal_sectors")


class Baseline(NamedTuple):
    counters: list[tuple[int, int]]  # by case
    results: list[dict[str, torch.Tensor]]
    executed: set[int]  # lines


def baseline(device: Device, source: str, entry: Entry, launches: list[Case], arch: int) -> Baseline:
    device.load_module(source, entry.text, arch)
    found = Baseline([], [], set())
    for case in launches:
        with device.run(arch=arch) as run:
            results = case.launch(run)
        if case.wrong(results):
            raise AssertionError(f"{entry.name} is wrong as it is")
        found.counters.append(asserted(run.counters, entry.name))
        found.results.append({name: t.clone() for name, t in results.items()})
        found.executed.update(c.ptx_line - 1 for c in run.counters.matching(entry=entry.name))
    if not found.executed:
        raise AssertionError(f"no case launches {entry.name}")
    return found


def outcome(device: Device, source: str, entry: Entry, text: str, launches: list[Case], known: Baseline, arch: int) -> str:
    device.load_module(source, text, arch)
    same = True
    for case, counters, before in zip(launches, known.counters, known.results, strict=True):
        results, raised = {}, ""
        try:
            with device.run(arch=arch, check=False) as run:
                results = case.launch(run)
        except (RuntimeError, AssertionError) as e:  # what launchers and the op tests' helpers raise
            raised = str(e)
        reports = run.reports
        if any("is not implemented" in r for r in reports) or "is not implemented" in raised:
            return "not PTX"
        if reports:
            return re.search(r"(memcheck|initcheck|racecheck|synccheck|executor)", " ".join(reports))[0]
        if raised:
            return "raised"
        if case.wrong(results):
            return "values"
        if asserted(run.counters, entry.name) != counters:
            return "counters"
        same = same and all(torch.equal(t.view(torch.uint8), before[name].view(torch.uint8)) for name, t in results.items())
    return "survived, same bits" if same else "survived, other bits"


def in_children(jobs: Iterable[tuple[object, Callable[[], str]]], count: int) -> Iterator[tuple[object, str]]:
    """Each job's result, from a process of its own, `count` at a time. A mutant may write anywhere and need not end."""
    running: dict[int, tuple[object, int]] = {}

    def finished() -> tuple[object, str]:
        pid, status = os.wait()
        key, pipe = running.pop(pid)
        with os.fdopen(pipe) as f:
            text = f.read()
        if os.WIFSIGNALED(status):
            text = "endless" if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL) else "crashed"
        return key, text

    for key, job in jobs:
        receive, send = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
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


def same_machine_code(entry: Entry, mutant: Mutant, arch: int) -> bool:
    """Whether ptxas makes the same of both: then they are the same kernel."""
    with tempfile.TemporaryDirectory() as folder:
        code = []
        for text in (entry.text, entry.with_(mutant)):
            path = Path(folder) / "kernel.ptx"
            path.write_text(re.sub(r"^\s*\.(loc|file)\s.*$", "", text, flags=re.M).replace("//" + mutant.before, ""))
            done = subprocess.run(["ptxas", f"-arch=sm_{arch}", str(path), "-o", f"{path}.cubin"], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr)
            code.append(Path(f"{path}.cubin").read_bytes())
        return code[0] == code[1]


# --- all of them ------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    source: str
    kernel: str
    kind: str
    ptx_line: int
    cuda_line: str
    before: str
    after: str
    outcome: str
    executed: bool  # by a case, before it was changed
    same_code: bool  # ptxas makes of it what it makes of the original

    @property
    def survived(self) -> bool:
        return self.outcome.startswith("survived")


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def run_all(device: Device, only: str, each: int, jobs: int, arch: int) -> list[Row]:
    version = digest(str(device.library_path(arch)), *(p.read_text() for p in sorted((ROOT / "tools").glob("*.py"))))
    LOG.parent.mkdir(exist_ok=True)
    logged = dict(json.loads(line) for line in LOG.read_text().splitlines()) if LOG.exists() else {}
    work = []
    for source, module in device.ptx(arch).items():
        some = entries(module)
        names = demangled(e.name for e in some)
        for entry in some:
            if only in (name := names[entry.name]) or only in source:
                count = 10 * each if len(some) == 1 else each
                work.append((Kernel(source, name), entry, drawn(entry.mutants(), count, f"{source} {name}")))
    rows: list[Row] = []
    with tqdm(total=sum(len(m) for *_, m in work), unit="mutant") as bar, open(LOG, "a") as log:
        for kernel, entry, mutants in work:
            bar.set_description(kernel.source)
            keys = {m: digest(version, kernel.source, entry.text, str(m)) for m in mutants}
            missing = [m for m in mutants if keys[m] not in logged]
            if missing:
                launches = cases(kernel)
                known = baseline(device, kernel.source, entry, launches, arch)

                def job(mutant: Mutant, k=kernel, e=entry, c=launches, b=known) -> Callable[[], str]:
                    return lambda: outcome(device, k.source, e, e.with_(mutant), c, b, arch)

                for mutant, text in in_children(((m, job(m)) for m in missing), jobs):
                    logged[keys[mutant]] = [text, entry.reached(mutant.line, known.executed), False]
                    if text.startswith("survived"):
                        logged[keys[mutant]][2] = same_machine_code(entry, mutant, arch)
                    log.write(json.dumps([keys[mutant], logged[keys[mutant]]]) + "\n")
                    log.flush()
                    bar.update()
                device.load_module(kernel.source, device.ptx(arch)[kernel.source], arch)
            bar.update(len(mutants) - len(missing))
            for m in mutants:
                after = "" if m.kind == "dropped" else " ".join(m.after.split())
                at = kernel.source, kernel.name, m.kind, entry.ptx_line(m.line), entry.source(m.line)
                rows.append(Row(*at, " ".join(m.before.split()), after, *logged[keys[m]]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="", help="only those whose name or .cu file contains this")
    parser.add_argument("--each", type=int, default=12, help="mutants of each kernel instance")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    torch.set_num_threads(1)  # threads do not live on in a forked process
    rows = run_all(Device(), args.kernel, args.each, args.jobs, 80)
    with open("/tmp/survivors.txt", "w") as f:
        for r in rows:
            if r.survived and not r.same_code:
                print(r.source, r.kernel, r.kind, r.ptx_line, r.cuda_line, "|", r.before, "|", r.after, "|", r.outcome, "" if r.executed else "UNEXECUTED", file=f)
    print(Counter((r.outcome, r.executed, r.same_code) for r in rows))


if __name__ == "__main__":
    main()
