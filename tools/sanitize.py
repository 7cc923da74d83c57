"""The CPU kernels under sanitizers: builds the extension with each, and runs the operators' tests on it.

    python tools/sanitize.py                   everything, an hour of one core
    python tools/sanitize.py address           out of bounds, use after free, undefined behaviour: on every ISA of this machine
    python tools/sanitize.py thread            data races: every kernel on four threads, however small the product
    python tools/sanitize.py thread -- -k multi     what comes after -- goes to pytest

Builds go to build/sanitize/. Needs g++ with libasan, libubsan and libtsan. Under ThreadSanitizer the extension is built without
OpenMP: libgomp is not instrumented, so that every one of its barriers would be missed and every result behind one reported. A
team of plain threads (csrc/cpu/threads.h) stands in its place; all else is the same code.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent.resolve()
BUILDS = ROOT / "build" / "sanitize"
COMMON = "-O1 -g -fno-omit-frame-pointer"
COMPILE = {
    "address": f"{COMMON} -fsanitize=address,undefined -fno-sanitize-recover=undefined",
    "thread": f"{COMMON} -fsanitize=thread -fno-openmp -Wno-unknown-pragmas -DLORA_OPS_MULTIPLY_ADDS_PER_THREAD=1",
}
LINK = {"address": "-fsanitize=address,undefined", "thread": "-fsanitize=thread"}
LIBRARIES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
# Leaks: Python ends with much that it never frees; tests/test_leaks.py counts what calls leave behind.
OPTIONS = {
    "address": {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1", "UBSAN_OPTIONS": "print_stacktrace=1"},
    "thread": {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:exitcode=66:history_size=4"},
}
OPERATORS = [
    "test_lora_forward.py", "test_lora_backward.py", "test_qlora_linear.py", "test_multi_lora.py", "test_general_operator.py",
]  # fmt: skip
TESTS = {
    "address": [
        *OPERATORS, "test_dropout.py", "test_tensor_calls.py", "test_lifetimes.py", "test_prepack.py", "test_nf4_format.py",
        "test_nonfinite.py", "test_leaks.py", "test_fuzz.py",
    ],
    "thread": [*OPERATORS, "test_prepack.py", "test_nf4_format.py", "test_threads.py"],
}  # fmt: skip
DESELECTED = {
    # Panels, masks and PEFT's layers say nothing of memory, and bitsandbytes' own code is not what is looked at.
    "address": "not bitsandbytes and not peft",
    # A forked process has no place in what ThreadSanitizer keeps of threads.
    "thread": "not bitsandbytes and not peft and not fork and not interrupt",
}


def build(kind: str) -> Path:
    """A folder with the package in it, whose extension is instrumented."""
    folder = BUILDS / kind
    environment = os.environ | {"LORA_OPS_CUDA": "0", "CXXFLAGS": COMPILE[kind], "LDFLAGS": LINK[kind]}
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(folder), "--build-temp", str(BUILDS / f"{kind}-objects")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    for path in (ROOT / "lora_ops").iterdir():
        there = folder / "lora_ops" / path.name
        if path.name.startswith("_C.cpython") or path.name == "__pycache__" or there.exists():
            continue
        there.symlink_to(path)
    return folder


def environment_of(kind: str, isa: str) -> dict[str, str]:
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in LIBRARIES[kind]
    ]
    threads = "4" if kind == "thread" else "1"
    return os.environ | OPTIONS[kind] | {
        "LD_PRELOAD": " ".join(libraries), "LORA_OPS_CPU_ISA": isa, "LORA_OPS_CPU_BASE": "kernel", "OMP_NUM_THREADS": threads,
    }  # fmt: skip


def run(kind: str, isa: str, folder: Path, arguments: list[str]) -> bool:
    """Whether the tests pass and nothing is reported."""
    tests = [str(ROOT / "tests" / name) for name in TESTS[kind]]
    command = [sys.executable, "-m", "pytest", "-x", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    command += ["-p", "no:cacheprovider", "-p", "no:faulthandler", "-k", DESELECTED[kind], "-m", "not slow and not cuda"]
    if kind == "thread" and shutil.which("setarch"):  # it knows no addresses as random as some kernels make them
        command = ["setarch", "--addr-no-randomize", *command]
    # In its folder: python -m puts that before everything else in sys.path.
    done = subprocess.run([*command, *tests, *arguments], cwd=folder, env=environment_of(kind, isa))
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", choices=["address", "thread"])
    parser.add_argument("--isa", help="one of them, instead of all")
    parser.add_argument("arguments", nargs="*", help="of pytest")
    chosen = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import lora_ops

    # Threads are the same code on every ISA: the widest will do.
    every = [chosen.isa] if chosen.isa else lora_ops.build_info()["isas_supported"]
    steps = [("address", isa) for isa in every] + [("thread", every[0])]
    steps = [step for step in steps if chosen.kind in (None, step[0])]
    folders = {kind: build(kind) for kind in tqdm(dict(steps), desc="build")}
    with tqdm(steps, desc="tests") as bar:
        for kind, isa in bar:
            bar.set_postfix_str(f"{kind}, {isa}")
            if not run(kind, isa, folders[kind], chosen.arguments):
                raise SystemExit(f"{kind} sanitizer, {isa}: failed, see above")
    print("no reports")


if __name__ == "__main__":
    main()
