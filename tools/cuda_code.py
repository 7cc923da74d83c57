"""Machine code of the CUDA kernels: registers, spills, main loops, wrong predicates, and how many blocks an SM holds."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "cuda_report"
ARCHS = (80, 86, 89, 90, 100, 120)
CLASSES = {
    "HMMA": ("HMMA",),
    "LDSM": ("LDSM",),
    "LDGSTS": ("LDGSTS",),
    "LDS": ("LDS",),
    "STS": ("STS",),
    "LDG": ("LDG", "LD"),
    "branch": ("BRA", "BSSY", "BSYNC"),
}


class Multiprocessor(NamedTuple):
    """CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""

    warps: int
    blocks: int
    shared_bytes: int


MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164 * 1024),
    86: Multiprocessor(48, 16, 100 * 1024),
    89: Multiprocessor(48, 24, 100 * 1024),
    90: Multiprocessor(64, 32, 228 * 1024),
    100: Multiprocessor(64, 32, 228 * 1024),
    120: Multiprocessor(48, 24, 100 * 1024),
}
REGISTERS, REGISTER_UNIT = 65536, 256  # of every multiprocessor; given to warps in units
PARTITIONS = 4  # of a multiprocessor, each with its warps and registers
SHARED_UNIT, SHARED_RESERVED = 128, 1024  # bytes; what a block takes beside its own


class Usage(NamedTuple):
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int


class Kernel(NamedTuple):
    source: str
    name: str
    arch: int
    usage: Usage
    loop: Counter[str]  # instructions of the main loop by class; empty without a disassembler
    wrong_predicates: int | None  # None without a disassembler


def blocks_per_multiprocessor(arch: int, registers: int, threads: int, shared_bytes: int) -> int:
    sm = MULTIPROCESSORS[arch]
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // PARTITIONS // per_warp * PARTITIONS // warps
    by_shared = sm.shared_bytes // (-(-(shared_bytes + SHARED_RESERVED) // SHARED_UNIT) * SHARED_UNIT)
    return min(sm.blocks, sm.warps // warps, by_registers, by_shared)


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


def wrong_predicates(code: list[tuple[int, str]]) -> list[str]:
    """Instructions that do not do what the PTX says. Of max(0, min(a, 8)) == 8, ptxas 13.0 makes one instruction for sm_90,

        VIMNMX.RELU R0, P0, P0, R1, 0x8, PT

    and takes the comparison from its predicates. Where a is negative an H100 sets them as if the result were 8, and it is 0.
    Where they are PT or left out, nothing is taken from them. The way around it is to compare a itself."""
    written = re.compile(r"\bU?VIMNMX\S*\.RELU\S*\s+\w+,\s*(?!U?PT,\s*U?PT,)U?P\w+,\s*U?P\w+,")
    return [text for _, text in code if written.search(text)]


def tool(name: str) -> str | None:
    package = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    return shutil.which(name) or next((str(p) for p in sorted(package.glob(f"*/bin/{name}"))), None)


def disassembles() -> bool:
    return bool(tool("cuobjdump") and tool("nvdisasm"))


def demangled(names: Iterable[str]) -> dict[str, str]:
    """Names with their template arguments, without namespaces and parameters."""
    names = list(names)
    if not shutil.which("c++filt"):
        return dict(zip(names, names, strict=True))
    text = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = (re.sub(r"lora_ops::|\(anonymous namespace\)::|void |\(\w+\)(?=\d)", "", name) for name in text.splitlines())
    return dict(zip(names, short, strict=True))


def disassembly(cubin: Path) -> dict[str, list[tuple[int, str]]]:
    """By cuobjdump and nvdisasm, which there must be."""
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    if not (cuobjdump and nvdisasm):
        raise RuntimeError("cuobjdump or nvdisasm was not found (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)")
    path = f"{Path(nvdisasm).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run([cuobjdump, "-sass", str(cubin)], env={**os.environ, "PATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return functions(done.stdout)


def examine(source: Path, arch: int) -> list[Kernel]:
    """The kernels of a .cu file, compiled as setup.py does; again only where it, or what it includes, has changed."""
    kept = CACHE / f"{source.stem}-{arch}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(kept.read_text())
        if known["disassembled"] == disassembles() and known["inputs"] == digests(known["inputs"]):
            return [Kernel(s, n, a, Usage(*usage), Counter(loop), wrong) for s, n, a, usage, loop, wrong in known["kernels"]]
    with tempfile.TemporaryDirectory() as folder:
        cubin, makefile = Path(folder) / "kernels.cubin", Path(folder) / "kernels.d"
        flags = ["-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v", "-cubin"]
        command = ["nvcc", *flags, str(source), "-o", str(cubin), "-MD", "-MF", str(makefile)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        usage = resource_usage(done.stdout + done.stderr)
        code = disassembly(cubin) if disassembles() else None
        inputs = makefile.read_text().split(":", 1)[1].replace("\\\n", " ").split()
    names = demangled(usage)
    kernels = []
    for name, used in usage.items():
        known = (main_loop(code[name]), len(wrong_predicates(code[name]))) if code is not None else (Counter(), None)
        kernels.append(Kernel(source.name, names[name], arch, used, *known))
    CACHE.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"inputs": digests(inputs), "disassembled": code is not None, "kernels": kernels}))
    return kernels


def digests(paths: Iterable[str]) -> dict[str, str]:
    """By paths from the repository's root."""
    files = ((ROOT / p).resolve() for p in paths)
    return {os.path.relpath(p, ROOT): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
