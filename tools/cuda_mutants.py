"""Are the tests of the CUDA kernels any good? One instruction of a kernel's PTX is changed, and it must be noticed.

    python tools/cuda_mutants.py                writes docs/cuda_mutants.md; minutes on two cores
    python tools/cuda_mutants.py --kernel lora_down --each 100 --out /tmp

A mutant runs behind the real launch code on the executor of tests/ptx, in the launches of tests/cuda_cases, of which the suite
runs a third for unlike instances and fewer for the others. Each is a process of its own. It is noticed if a value is another
one, a checker reports, a counter is another one; or if the executor refuses it, or it does not come to an end.

Every kernel instance gives the same number of mutants, spread evenly over the kinds of changes: drawn from all instructions
alike, mov and mma of unrolled loops would be most of them. The draw is a function of the kernel's name.

Why the tests could not notice a survivor, or that it is a gap of theirs, is written down in cuda_mutants.tsv: .cu file, kind,
PTX without register numbers, reason.
"""

import argparse
import csv
import functools
import hashlib
import inspect
import os
import pickle
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from cuda_bounds import ROOT
from cuda_code import demangled
from ptx_mutants import Entry, Mutant, drawn, entries
from tqdm import tqdm

sys.path.insert(0, str(ROOT / "tests"))

from cuda_cases import OPS, Case, Kernel, cases
from ptx.device import Device

REASONS = Path(__file__).with_suffix(".tsv")
CACHE = ROOT / "build" / "cuda_mutants"
ARCH = 80
SURVIVED = "survived"


class Known(NamedTuple):
    """A case that is right, and the lines that it executes."""

    case: Case
    executed: set[int]  # from 1


def baseline(device: Device, kernel: Kernel, entry: Entry) -> list[Known]:
    found = []
    for case in cases(kernel, device):
        case = case._replace(exact=functools.cache(case.exact), eager=case.eager and functools.cache(case.eager))
        with device.run(ARCH) as run:
            results = case.launch(run)
        counters = run.counters.matching(entry=entry.name)
        case.check(results, counters)
        found.append(Known(case, {c.ptx_line for c in counters}))
    return found


def outcome(device: Device, kernel: Kernel, entry: Entry, text: str, known: list[Known]) -> str:
    """What notices it first."""
    device.load_module(kernel.source, text, ARCH)
    for case, _ in known:
        results, raised = {}, ""
        try:
            with device.run(ARCH, check=False) as run:
                results = case.launch(run)
        except (RuntimeError, AssertionError) as e:  # what launchers and the op tests' helpers raise
            raised = str(e)
        reports = " ".join([*run.reports, raised])
        if "is not implemented" in reports:
            raise NotImplementedError(reports)
        if reports:
            checker = re.search(r"memcheck|initcheck|racecheck|synccheck", reports)
            return checker[0] if checker else "executor"
        try:
            case._replace(counts=None).check(results, run.counters)
        except AssertionError:
            return "values"
        try:
            case.check(results, run.counters.matching(entry=entry.name))
        except AssertionError:
            return "counters"
    return SURVIVED


def in_children(
    jobs: Iterable[tuple[Mutant, Callable[[], str]]], count: int, cpu_seconds: float
) -> Iterator[tuple[Mutant, str]]:
    """Each job's result, from a process of its own, `count` at a time. A mutant may write anywhere and need not end."""
    running: dict[int, tuple[Mutant, int]] = {}

    def finished() -> tuple[Mutant, str]:
        pid, status = os.wait()
        mutant, pipe = running.pop(pid)
        with os.fdopen(pipe) as f:
            text = f.read()
        if os.WIFSIGNALED(status):
            text = "time" if os.WTERMSIG(status) == signal.SIGPROF else "crash"
        if text.startswith("broken"):
            raise RuntimeError(f"{mutant}: {text}")
        return mutant, text

    for mutant, job in jobs:
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
        running[pid] = mutant, receive
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
    def key(self) -> tuple[str, ...]:
        """What a reason is found by. Neither a name mangled with a digest of the path nor a register's number is in it."""
        text = (re.sub(r"_ZN\w+", "", re.sub(r"%([a-z]+)\d+", r"%\1", t)) for t in (self.before, self.after))
        return self.cuda_line.split(":")[0], self.kind, *text


class Result(NamedTuple):
    rows: list[Row]
    population: dict[str, int]  # of each kind, how many mutants there are where the launches come by
    instructions: int
    executed: int


def run_kernel(device: Device, kernel: Kernel, entry: Entry, each: int, jobs: int) -> Result:
    start = time.process_time()
    known = baseline(device, kernel, entry)
    cpu_seconds = 0.3 + 3 * (time.process_time() - start)  # more is an endless loop
    executed = set().union(*(k.executed for k in known))
    mutants = {kind: [m for m in some if m.line + 1 in executed] for kind, some in entry.mutants().items()}
    chosen = drawn(mutants, each, f"{kernel.source} {kernel.name}")

    def job(mutant: Mutant) -> Callable[[], str]:
        some = [k for k in known if mutant.line + 1 in k.executed]  # elsewhere it is not run
        return lambda: outcome(device, kernel, entry, entry.with_(mutant), some)

    rows = []
    for m, text in in_children(((m, job(m)) for m in chosen), jobs, cpu_seconds):
        after = "" if m.kind == "dropped" else " ".join(m.after.split())
        rows.append(Row(kernel, m.kind, entry.ptx_line(m.line), entry.source(m.line), " ".join(m.before.split()), after, text))
    population = {kind: len(some) for kind, some in mutants.items() if some}
    return Result(rows, population, len(entry.instructions()), sum(line + 1 in executed for line in entry.instructions()))


def run_all(device: Device, only: str, each: int, jobs: int) -> dict[Kernel, Result]:
    """`each` mutants of every instance, more where a source has few. What has been run is kept in build/cuda_mutants."""
    work = []
    for source, module in device.ptx(ARCH).items():
        some = entries(module)
        names = demangled(e.name for e in some)
        count = max(each, 80 // len(some))
        for e in some:
            kernel = Kernel(source, names[e.name])
            if only in f"{source} {kernel.name}" and "<Half" not in kernel.name:
                work.append((kernel, e, count))
    results = {}
    for kernel, entry, count in (bar := tqdm(work, unit="kernel")):
        bar.set_description(kernel.source)
        made_in = (inspect.getsource(inspect.getmodule(of)) for of in (Case, OPS[kernel.source]))
        kept = CACHE / hashlib.sha256("".join([entry.text, *made_in, str(count)]).encode()).hexdigest()
        if not kept.exists():
            device.load_module(kernel.source, entry.text, ARCH)
            result = run_kernel(device, kernel, entry, count, jobs)
            device.load_module(kernel.source, device.ptx(ARCH)[kernel.source], ARCH)
            CACHE.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(pickle.dumps(result))
        results[kernel] = pickle.loads(kept.read_bytes())
    return results


# --- the report -------------------------------------------------------------------------------------------------------

COLUMNS = ("values", "memcheck", "initcheck", "racecheck", "synccheck", "counters", "executor", "crash", "time", SURVIVED)


def table(rows: list[Row], by: str, of: Callable[[Row], str]) -> list[str]:
    lines = [f"| {by} | mutants | {' | '.join(COLUMNS)} | noticed |", "|---" * (3 + len(COLUMNS)) + "|"]
    for name in [*sorted({of(r) for r in rows}), "**all**"]:
        found = Counter(r.outcome for r in rows if name in (of(r), "**all**"))
        cells = " | ".join(str(found[c] or "") for c in COLUMNS)
        lines.append(f"| {name} | {found.total()} | {cells} | {1 - found[SURVIVED] / found.total():.1%} |")
    return lines


def share_of_all(results: Iterable[Result]) -> tuple[float, int]:
    """What share of all mutants is noticed, estimated from the sample: each kind of an instance for as many as there are."""
    noticed, count = 0.0, 0
    for r in results:
        for kind, size in r.population.items():
            outcomes = [row.outcome != SURVIVED for row in r.rows if row.kind == kind]
            noticed += size * sum(outcomes) / len(outcomes)
            count += size
    return noticed / count, count


def reasons() -> dict[tuple[str, ...], str]:
    with open(REASONS, newline="") as f:
        return {tuple(row[:-1]): row[-1] for row in csv.reader(f, delimiter="\t", quoting=csv.QUOTE_NONE)}


def report(results: dict[Kernel, Result], why: dict[tuple[str, ...], str]) -> str:
    rows = [row for result in results.values() for row in result.rows]
    survivors = sorted((r for r in rows if r.outcome == SURVIVED), key=lambda r: (why.get(r.key, ""), r.kernel, r.ptx_line))
    instructions, executed = (sum(getattr(r, what) for r in results.values()) for what in ("instructions", "executed"))
    share, count = share_of_all(results.values())
    of_sample = 1 - len(survivors) / len(rows)
    lines = []
    for reason in dict.fromkeys(why.get(r.key, "NOT EXPLAINED") for r in survivors):
        lines += [
            "",
            f"**{reason}**",
            "",
            "| kernel | PTX line | .cu line | kind | before | after |",
            "|---|---|---|---|---|---|",
        ]
        for r in survivors:
            if why.get(r.key, "NOT EXPLAINED") == reason:
                text = (re.sub(r"_ZN\w+_param_0", "param", t) for t in (r.before, r.after))
                before, after = (f"`{t}`" if t else "" for t in text)
                name = f"{r.kernel.source}: `{r.kernel.name}`"
                lines.append(f"| {name} | {r.ptx_line} | {r.cuda_line} | {r.kind} | {before} | {after} |")
    return f"""# CUDA kernels: mutants

Written by `tools/cuda_mutants.py`. One instruction of a kernel's PTX (compute_{ARCH}) is changed, and the launches of
`tests/cuda_cases`, some of which the suite runs, must notice: {len(rows)} mutants of {len(results)} kernel instances, of which
**{of_sample:.1%}** are noticed. Survivors that are explained below count as survivors; nearly all of them are changes after
which the kernel does the same as before.

The sample is drawn evenly over the kinds of changes, so that rare ones are in it: most instructions of an unrolled loop are mov
and mma. If each kind of an instance counts for as many mutants as there are of it, {count} in all, {share:.1%} are noticed.

Mutants are drawn from what the launches execute: {executed} of {instructions} instructions, in every
instance of every kernel but those in fp16, which are their bf16 siblings with other types. The rest is paths that no launcher
reaches, and in the forms that share gemm.cuh with `lora_forward` and `lora_backward_dx`, paths that are looked at there. Not
drawn, since nothing could notice: cache hints; numbers, operators and registers for which a register's zero bits or known value
prove that the result is the same; waits of kernels that copy nothing by cp.async.

What notices a mutant is what does so first. `executor`: it is refused. `time`: it does not end.

{chr(10).join(table(rows, "source", lambda r: r.kernel.source))}

{chr(10).join(table(rows, "kind of change", lambda r: r.kind))}

## Survivors
{chr(10).join(lines)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="", help="only those whose .cu file and name contain this")
    parser.add_argument("--each", type=int, default=16, help="mutants of each kernel instance")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    torch.set_num_threads(1)  # threads do not live on in a forked process
    results = run_all(Device(), args.kernel, args.each, args.jobs)
    why = reasons()
    (args.out / "cuda_mutants.md").write_text(report(results, why))
    rows = [row for result in results.values() for row in result.rows]
    print("\n".join(table(rows, "source", lambda r: r.kernel.source)))
    unexplained = [row for row in rows if row.outcome == SURVIVED and row.key not in why]
    for row in unexplained:
        print(f"{row.kernel.source} {row.kernel.name} PTX line {row.ptx_line}", *row.key, sep="\t")
    if unexplained:
        sys.exit(f"{len(unexplained)} survivors are not explained in {REASONS.name}")


if __name__ == "__main__":
    main()
