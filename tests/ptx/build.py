"""Compiles sources into build/ptx, again only where a source or a header of it has changed.

A .cu file is compiled once: the object has its host code, and the PTX that nvcc made on the way is what the executor runs, so
both name their kernels alike.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = REPOSITORY / "build" / "ptx"
HERE = Path(__file__).resolve().parent

NVCC = shutil.which("nvcc")

# Kernels run on the GPU that there is, and not on the executor: what their PTX cannot show, the compiler's last step.
GPU = os.environ.get("LORA_OPS_TEST_GPU") == "1"

# -fwrapv: PTX integers wrap. No contraction: a mul and an add are rounded twice.
_HOST_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-Wall", "-Wextra"),
    *("-fwrapv", "-fno-strict-aliasing", "-ffp-contract=off"),
]
_CUDA_FLAGS = [
    *("-std=c++17", "-O3", "-lineinfo", "-cudart", "none", "-Xcompiler", "-fPIC"),
    *("-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__"),
    *("-D__CUDA_NO_HALF2_OPERATORS__", "-D__CUDA_NO_BFLOAT16_CONVERSIONS__"),
]


# A .cpp among the sources has bindings.
_PYTHON_INCLUDES = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _run(command: Sequence[str | Path], cwd: Path) -> None:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def _dependencies(makefile: Path) -> list[str]:
    words = makefile.read_text().split(":", 1)[1].replace("\\\n", " ").split()
    return sorted({str(Path(w).resolve()) for w in words})


def _fresh(made: Path) -> bool:
    try:
        dependencies = json.loads((made / "dependencies.json").read_text())
        return all(_digest(Path(p).read_bytes()) == digest for p, digest in dependencies.items())
    except (OSError, ValueError):
        return False


def _compile(source: Path, command: list[str]) -> Path:
    """The folder with what the command makes of the source: object, and PTX of a .cu."""
    made = CACHE / f"{source.stem}-{_digest(str(source).encode(), *(c.encode() for c in command))}"
    if _fresh(made):
        return made
    CACHE.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=CACHE))
    try:
        _run([*command, "-c", source, "-o", "object.o", "-MD", "-MF", "object.d"], work)
        kept = {"object.o", f"{source.stem}.ptx"}
        dependencies = {p: _digest(Path(p).read_bytes()) for p in _dependencies(work / "object.d")}
        (work / "dependencies.json").write_text(json.dumps(dependencies))
        for path in work.iterdir():
            if path.name not in {*kept, "dependencies.json"}:
                path.unlink()
        shutil.rmtree(made, ignore_errors=True)
        os.replace(work, made)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return made


def build(sources: Sequence[Path], arch: int, flags: Sequence[str] = ()) -> tuple[Path, dict[str, str]]:
    """A shared library of the sources' host code on top of the executor or a GPU, and the PTX of each .cu by its file name."""
    executor = sorted(p for p in HERE.glob("*.cpp") if p.name not in ("fake_cudart.cpp", "gpu.cpp"))
    commands = {} if GPU else {p: ["g++", *_HOST_FLAGS] for p in executor}
    if sources:
        if NVCC is None:
            raise RuntimeError("nvcc not found")
        host = [NVCC, "-std=c++17", "-O2", "-Xcompiler", "-fPIC"]
        commands[HERE / ("gpu.cpp" if GPU else "fake_cudart.cpp")] = host
        target = "sm_{}{}".format(*torch.cuda.get_device_capability()) if GPU else f"compute_{arch}"
        for source in sources:
            cuda = [NVCC, *_CUDA_FLAGS, f"-arch={target}", "--keep"]
            commands[source] = [*cuda, *flags] if source.suffix == ".cu" else [*host, *_PYTHON_INCLUDES]
    with ThreadPoolExecutor(os.cpu_count() if GPU else 2) as pool:
        made = list(pool.map(_compile, commands, commands.values()))
    objects = [folder / "object.o" for folder in made]
    library = CACHE / f"device-{_digest(*(o.read_bytes() for o in objects))}.so"
    if not library.exists():
        # -Bsymbolic: a CUDA runtime that the process has loaded stays out of it.
        linked = library.with_suffix(f".{os.getpid()}")
        linker = [NVCC, "-cudart", "static", "-Xlinker", "-Bsymbolic"] if GPU else ["g++", "-Wl,-Bsymbolic"]
        _run([*linker, "-shared", *objects, "-o", linked], CACHE)
        os.replace(linked, library)
    ptx = {s.name: (m / f"{s.stem}.ptx").read_text() for s, m in zip(commands, made, strict=True) if s.suffix == ".cu"}
    return library, ptx
