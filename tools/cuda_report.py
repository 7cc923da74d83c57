"""What can be known of the CUDA kernels without a GPU: machine code, traffic by execution, and bounds from data sheets.

    python tools/cuda_report.py            writes docs/cuda_report.md, its two .csv and docs/cuda_bounds.*
    python tools/cuda_report.py --archs 80

It takes 20 minutes on two cores, and keeps what it has compiled in build/cuda_report. The tests of the ops run, too: their
launches say how much shared memory each kernel is given.

Needs nvcc, and for main loops and predicates cuobjdump and nvdisasm (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm).
Nothing here is a measurement of speed. It fails where a kernel has a predicate that ptxas got wrong.
"""

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from cuda_bounds import ROOT, bounds, figure
from cuda_code import ARCHS, CLASSES, MULTIPROCESSORS, Kernel, Usage, blocks_per_multiprocessor, disassembles, examine
from cuda_traffic import CASES, Counted, Kernels, count, fusion, label, launched, per_tensor, wavefronts
from ptx.device import Counter, Launch
from tqdm import tqdm

LOOP = [*CLASSES, "MUFU, CALL", "other", "all"]
Launches = dict[str, Launch]  # by the kernel's name


def threads(launch: Launch) -> int:
    return launch.block[0] * launch.block[1] * launch.block[2]


def resident_blocks(kernel: Kernel, launch: Launch) -> int:
    return blocks_per_multiprocessor(kernel.arch, kernel.usage.registers, threads(launch), launch.shared_bytes)


def resident_warps(kernel: Kernel, launch: Launch) -> int:
    return resident_blocks(kernel, launch) * -(-threads(launch) // 32)


def span(numbers: list[int]) -> str:
    return "" if not numbers else str(min(numbers)) if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"


def summary(kernels: list[Kernel], launches: Launches) -> list[str]:
    """A line per source and architecture."""
    lines = [
        "| source | sm | kernels | registers | shared KB | blocks per SM | warps per SM | spill bytes | stack bytes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for source in sorted({k.source for k in kernels}):
        for arch in sorted({k.arch for k in kernels}):
            some = [k for k in kernels if (k.source, k.arch) == (source, arch)]
            known = [(k, launches[k.name]) for k in some if k.name in launches]
            shared = span([launch.shared_bytes // 1024 for _, launch in known])
            blocks = span([resident_blocks(*both) for both in known])
            warps = span([resident_warps(*both) for both in known])
            spills = sum(k.usage.spill_stores + k.usage.spill_loads for k in some)
            lines.append(
                f"| {source} | {arch} | {len(some)} | {span([k.usage.registers for k in some])} | {shared} | {blocks} "
                f"| {warps and f'{warps} of {MULTIPROCESSORS[arch].warps}'} | {spills} | {sum(k.usage.stack for k in some)} |"
            )
    return lines


def loops(kernels: list[Kernel], arch: int) -> list[str]:
    """Without those for which there is one of bf16 in Half's place."""
    lines = [f"| kernel, sm_{arch} | " + " | ".join(LOOP) + " |", "|---" * (1 + len(LOOP)) + "|"]
    names = {k.name for k in kernels}
    for k in kernels:
        twin = k.name.replace("Half", "Bf16")
        if k.arch == arch and k.loop and (twin == k.name or twin not in names):
            lines.append(f"| `{k.name}` | " + " | ".join(str(k.loop[n]) for n in LOOP) + " |")
    return lines


def write_csv(folder: Path, kernels: list[Kernel], launches: Launches, counted: list[Counted]) -> None:
    with open(folder / "cuda_report.csv", "w", newline="") as f:
        table = csv.writer(f, lineterminator="\n")
        launch_columns = ["threads", "shared_bytes", "blocks_per_sm", "warps_per_sm"]
        columns = ["source", "kernel", "sm", *Usage._fields, "wrong_predicates", *launch_columns]
        table.writerow([*columns, *(f"loop_{n}" for n in LOOP)])
        for k in kernels:
            launch = launches.get(k.name)
            of_launch = (
                [threads(launch), launch.shared_bytes, resident_blocks(k, launch), resident_warps(k, launch)]
                if launch
                else [""] * 4
            )
            loop = [k.loop[n] if k.loop else "" for n in LOOP]
            table.writerow([k.source, k.name, k.arch, *k.usage, k.wrong_predicates, *of_launch, *loop])
    with open(folder / "cuda_report_counters.csv", "w", newline="") as f:
        table = csv.writer(f, lineterminator="\n")
        numbers = Counter._fields[4:]
        table.writerow(["pass", "M", "K", "N", "r", "weight", "adapters", "kernel", "source", "opcode", *numbers])
        for c in counted:
            which = ["backward" if c.backward else "forward", *c.shape, "nf4" if c.quantized else "bfloat16"]
            which.append(str(c.adapter).removeprefix("torch."))
            sums: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0] * len(numbers))
            for i in c.counters:
                if i.wavefronts or i.sectors or i.opcode.startswith("mma."):
                    key = label(i.entry, c.backward), i.source, i.opcode
                    sums[key] = [a + b for a, b in zip(sums[key], i[4:], strict=True)]
            for key, values in sums.items():
                table.writerow([*which, *key, *values])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", type=int, nargs="+", default=ARCHS)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    if not shutil.which("nvcc"):
        sys.exit("nvcc was not found")
    if not disassembles():
        print("cuobjdump or nvdisasm was not found: NO MAIN LOOPS AND NO PREDICATES in the report", file=sys.stderr)
    launches = launched()
    device = Kernels()
    counted = [
        count(device, shape, adapter, backward, quantized)
        for shape, backward, quantized in CASES
        for adapter in (torch.bfloat16, torch.float32)
    ]
    jobs = [(source, arch) for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) for arch in args.archs]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = tqdm(pool.map(lambda job: examine(*job), jobs), total=len(jobs), unit="file", desc="compiling")
        kernels = sorted((k for some in done for k in some), key=lambda k: k[:3])
    never = sorted({k.name for k in kernels} - set(launches))
    if never:
        print("NO TEST LAUNCHED", *never, sep="\n  ", file=sys.stderr)

    args.out.mkdir(exist_ok=True)
    write_csv(args.out, kernels, launches, counted)
    figure(args.out)
    about = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release [\d.]+", about)
    text = f"""# CUDA kernels: machine code, traffic and bounds

Written by `tools/cuda_report.py`, nvcc {version[0] if version else ""}. **No GPU was involved, and nothing here is a
measurement of time.** Every kernel on every architecture: [cuda_report.csv](cuda_report.csv); counters by line of source:
[cuda_report_counters.csv](cuda_report_counters.csv).

## Bounds

![bounds, not measurements](cuda_bounds.png)

Sum over the kernels of the larger of flop / peak and bytes / bandwidth, from data sheets, bf16, r = 16, every operand of a
kernel moved once; in brackets, how much that is beyond the bare product's bound, and the same for eager LoRA's kernels.
**Bounds, not measurements**: no kernel reaches a data sheet's peak.

{chr(10).join(bounds())}

## Traffic that fusion removes

Bytes of global memory. Here: what each launch touched at least once when it was executed, partial sums included (split as for
an A100). Eager: what autograd runs for a bf16 layer under PEFT, each operation reading and writing its operands once, which is
the least that it can do; a weight in 4 bits is written in 16 before it is multiplied. No dropout, which would add a mask to
eager's and nothing here.

{chr(10).join(fusion(counted))}

## Traffic of the tiles

Bytes that the kernels' accesses moved of each tensor, in multiples of the tensor, as if there were no cache. x is read once per
column of tiles and W0 once per row of tiles; the low-rank factors once per row or column of warps; results are written once.

{chr(10).join(per_tensor([c for c in counted if c.adapter == torch.float32]))}

## Wavefronts and sectors

Executed / the fewest possible, with fp32 adapters: wavefronts of shared memory, more of which would be bank conflicts, and
32-byte sectors of global memory.

{chr(10).join(wavefronts([c for c in counted if c.adapter == torch.float32]))}

## Registers, shared memory, occupancy

Ranges over the kernels of a file. Shared memory as the launch code asks for it; blocks and warps that a multiprocessor holds,
by registers, shared memory (1 KB more for each block) and its own limits.

{chr(10).join(summary(kernels, launches))}

## Main loops

Instructions of the innermost loop that feeds the most HMMA from LDSM. MUFU and CALL are what an integer division by a variable
would leave. Those of fp16 are in the CSV.

{chr(10).join(loops(kernels, args.archs[0]))}
"""
    (args.out / "cuda_report.md").write_text(text)
    wrong = [f"{k.source} {k.name} sm_{k.arch}" for k in kernels if k.wrong_predicates]
    if wrong:
        sys.exit("\n  ".join(["WRONG PREDICATES, see wrong_predicates in tools/cuda_code.py:", *wrong]))


if __name__ == "__main__":
    main()
