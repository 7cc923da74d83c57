"""What can be known of the CUDA kernels without a GPU: their machine code on every architecture, and bounds from data sheets.

    python tools/cuda_report.py            writes docs/cuda_report.md and docs/cuda_report.csv; minutes on two cores
    python tools/cuda_report.py --archs 80

Needs nvcc, and for the main loops cuobjdump and nvdisasm (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm). Nothing here
is a measurement of speed.
"""

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
ARCHS = (80, 86, 89, 90, 100, 120)
REGISTERS = 65536  # of an SM, on all of them
WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}  # that an SM can hold
CLASSES = {
    "HMMA": ("HMMA",),
    "LDSM": ("LDSM",),
    "LDGSTS": ("LDGSTS",),
    "LDS": ("LDS",),
    "STS": ("STS",),
    "LDG": ("LDG", "LD"),
    "branch": ("BRA", "BSSY", "BSYNC"),
}


class Usage(NamedTuple):
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int


class Row(NamedTuple):
    source: str
    kernel: str
    arch: int
    usage: Usage
    threads: int
    loop: Counter[str]  # instructions of the main loop by class; empty without a disassembler


# --- machine code -----------------------------------------------------------------------------------------------------


def resource_usage(ptxas: str) -> dict[str, Usage]:
    """By mangled name, from ptxas -v."""
    found = {}
    entry = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        re.S,
    )
    for name, stack, stores, loads, registers in entry.findall(ptxas):
        found[name] = Usage(int(registers), int(stores), int(loads), int(stack))
    return found


def functions(sass: str) -> dict[str, list[tuple[int, str]]]:
    """Address and text of the instructions, by function, from cuobjdump -sass."""
    parts = re.split(r"^\s*Function : (\S+)\s*$", sass, flags=re.M)
    line = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.M)
    return {
        name: [(int(a, 16), text) for a, text in line.findall(body)]
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def opcode(text: str) -> str:
    return re.sub(r"^@!?\w+\s+", "", text).split()[0].split(".")[0]


def main_loop(code: list[tuple[int, str]]) -> Counter[str]:
    """The instructions between a backward branch and its target, of the innermost loop that feeds the most HMMA from LDSM."""
    loops = []
    for address, text in code:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            body = [t for a, t in code if int(target[1], 16) <= a <= address]
            if {"HMMA", "LDSM"} <= {opcode(t) for t in body}:
                loops.append((int(target[1], 16), address, body))
    innermost = [a for a in loops if not any(a is not b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    if not innermost:
        return Counter()
    body = max(innermost, key=lambda loop: sum(opcode(t) == "HMMA" for t in loop[2]))[2]
    by_opcode = Counter(opcode(t) for t in body)
    mix = Counter({name: sum(by_opcode[o] for o in names) for name, names in CLASSES.items()})
    mix["MUFU, CALL"] = by_opcode["MUFU"] + by_opcode["CALL"]  # what an integer division by a variable would leave
    mix["other"] = len(body) - sum(mix.values())
    mix["all"] = len(body)
    return mix


def tool(name: str) -> str | None:
    package = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    return shutil.which(name) or next((str(p) for p in sorted(package.glob(f"*/bin/{name}"))), None)


def demangled(names: Iterable[str]) -> dict[str, str]:
    """Names with their template arguments, without namespaces and parameters."""
    names = list(names)
    if not shutil.which("c++filt"):
        return dict(zip(names, names, strict=True))
    text = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = (re.sub(r"lora_ops::|\(anonymous namespace\)::|void |\(\w+\)(?=\d)", "", name) for name in text.splitlines())
    return dict(zip(names, short, strict=True))


def examine(source: Path, arch: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        flags = ["-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v", "-cubin"]
        done = subprocess.run(["nvcc", *flags, str(source), "-o", str(cubin)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        usage = resource_usage(done.stdout + done.stderr)
        code: dict[str, list[tuple[int, str]]] = {}
        cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
        if cuobjdump and nvdisasm:
            path = f"{Path(nvdisasm).parent}{os.pathsep}{os.environ['PATH']}"
            command = [cuobjdump, "-sass", str(cubin)]
            code = functions(subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True).stdout)
    names = demangled(usage)
    return [Row(source.name, names[n], arch, u, 128, main_loop(code.get(n, []))) for n, u in usage.items()]


def warps_by_registers(row: Row) -> int:
    """Resident on an SM if registers alone decide: they are given to warps in units of 256."""
    per_warp = -(-row.usage.registers * 32 // 256) * 256
    per_block = row.threads // 32
    return min(REGISTERS // per_warp // per_block * per_block, WARPS[row.arch])


# --- bounds from data sheets ------------------------------------------------------------------------------------------

# Dense bf16 flop/s with fp32 accumulation, and bytes/s.
GPUS = {"A100 80GB SXM": (312e12, 2.039e12), "H100 SXM": (989.4e12, 3.35e12), "RTX 4090": (165.2e12, 1.008e12)}
SHAPES = ((512, 4096, 4096), (4096, 4096, 4096), (8192, 4096, 14336), (8192, 8192, 8192))
RANK = 16


def kernels(M: int, K: int, N: int, r: int) -> dict[str, tuple[float, float]]:
    """flop and bytes of each kernel, bf16 with bf16 adapters: every tensor moves once, caches are perfect."""
    x, y, W, A, B, S = 2 * M * K, 2 * M * N, 2 * K * N, 2 * r * K, 2 * N * r, 4 * M * r
    return {
        "lora_down": (2 * M * K * r, x + A + S),
        "lora_forward": (2 * M * N * (K + r), x + W + S + B + y),
        "lora_backward_up": (4 * M * N * r, y + B + 3 * S),
        "lora_backward_dx": (2 * M * K * (N + r), y + W + S + A + x),
        "lora_backward_down": (2 * M * K * r, x + S + A),
    }


def bounds() -> list[str]:
    lines = [
        "| M x K x N | " + " | ".join(f"{gpu}, forward | backward" for gpu in GPUS) + " |",
        "|---" * (1 + 2 * len(GPUS)) + "|",
    ]
    for M, K, N in SHAPES:
        cells = []
        for flops, bandwidth in GPUS.values():
            each = {name: max(f / flops, b / bandwidth) for name, (f, b) in kernels(M, K, N, RANK).items()}
            forward = each["lora_down"] + each["lora_forward"]
            backward = sum(each.values()) - forward
            cells += [f"{forward * 1e6:.0f} µs ({forward / (2 * M * K * N / flops) - 1:+.0%})"]
            cells += [f"{backward * 1e6:.0f} µs ({backward / (2 * M * K * N / flops) - 1:+.0%})"]
        lines.append(f"| {M} x {K} x {N} | " + " | ".join(cells) + " |")
    return lines


def traffic() -> list[str]:
    """Global memory beyond the bare product's own operands and result."""
    lines = ["| M x K x N | forward: eager | here | backward: eager | here |", "|---|---|---|---|---|"]
    for M, K, N in SHAPES:
        x, y = 2 * M * K / 1e6, 2 * M * N / 1e6
        # eager: x for S; S Bᵀ written, scaled (read, written), added (two read, one written). Backward: dy scaled, dy B, dyᵀ S;
        # S's gradient times A written and added to dx; x for dA.
        lines.append(f"| {M} x {K} x {N} | {x + 6 * y:.0f} MB | {x:.0f} MB | {4 * y + 5 * x:.0f} MB | {y + x:.0f} MB |")
    return lines


# --- the report -------------------------------------------------------------------------------------------------------


def summary(rows: list[Row]) -> list[str]:
    """A line per source and architecture: the worst of its kernels."""
    lines = [
        "| source | sm | kernels | registers | warps by registers | spill bytes | stack bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    for source in sorted({r.source for r in rows}):
        for arch in sorted({r.arch for r in rows}):
            some = [r for r in rows if (r.source, r.arch) == (source, arch)]
            registers, warps = [r.usage.registers for r in some], [warps_by_registers(r) for r in some]
            spills = sum(r.usage.spill_stores + r.usage.spill_loads for r in some)
            lines.append(
                f"| {source} | {arch} | {len(some)} | {min(registers)} to {max(registers)} | {min(warps)} to {max(warps)} "
                f"| {spills} | {sum(r.usage.stack for r in some)} |"
            )
    return lines


def loops(rows: list[Row], arch: int) -> list[str]:
    names = [*CLASSES, "MUFU, CALL", "other", "all"]
    lines = [f"| kernel, sm_{arch} | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for row in rows:
        if row.arch == arch and row.loop:
            lines.append(f"| `{row.kernel}` | " + " | ".join(str(row.loop[n]) for n in names) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", type=int, nargs="+", default=ARCHS)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    if not shutil.which("nvcc"):
        sys.exit("nvcc was not found")
    if not (tool("cuobjdump") and tool("nvdisasm")):
        print("cuobjdump or nvdisasm was not found: NO MAIN LOOPS in the report", file=sys.stderr)
    jobs = [(source, arch) for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) for arch in args.archs]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = tqdm(pool.map(lambda job: examine(*job), jobs), total=len(jobs), unit="file", desc="compiling")
        rows = [row for some in done for row in some]
    rows.sort(key=lambda r: (r.source, r.kernel, r.arch))

    args.out.mkdir(exist_ok=True)
    names = [*CLASSES, "MUFU, CALL", "other", "all"]
    with open(args.out / "cuda_report.csv", "w", newline="") as f:
        table = csv.writer(f, lineterminator="\n")
        table.writerow(["source", "kernel", "sm", *Usage._fields, "warps_by_registers", *(f"loop_{n}" for n in names)])
        for r in rows:
            table.writerow(
                [r.source, r.kernel, r.arch, *r.usage, warps_by_registers(r), *(r.loop[n] if r.loop else "" for n in names)]
            )
    about = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release [\d.]+", about)
    text = f"""# CUDA kernels: machine code and bounds

Written by `tools/cuda_report.py`, nvcc {version[0] if version else ""}. **No GPU was involved, and nothing here is a
measurement of time.** Every kernel on every architecture: [cuda_report.csv](cuda_report.csv).

## Registers and spills

Blocks have 128 threads. Warps by registers: what an SM can hold if registers alone decide.

{chr(10).join(summary(rows))}

## Main loops

Instructions of the innermost loop that feeds the most HMMA from LDSM. MUFU and CALL are what an integer division by a variable
would leave.

{chr(10).join(loops(rows, args.archs[0]))}

## Bounds

Sum over the kernels of the larger of flop / peak and bytes / bandwidth, from data sheets, bf16, r = {RANK}, every tensor moved
once; in brackets, how much that is beyond the bare product at peak. **Bounds, not measurements**: no kernel reaches a data
sheet's peak.

{chr(10).join(bounds())}

## Traffic that fusion removes

Global memory beyond the base product's own operands and result, r-wide tensors left out.

{chr(10).join(traffic())}
"""
    (args.out / "cuda_report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
