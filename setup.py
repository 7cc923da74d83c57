"""Builds lora_ops._C with ninja: every source file compiles alone, in parallel, for the baseline ISA (csrc/cpu/*.cpp raise
theirs by themselves). Needs a C++17 compiler and pybind11; torch is not needed and not linked.

Where there is nvcc, lora_ops._C_cuda too: no GPU and no CUDA torch is needed, the CUDA runtime is linked statically.

    LORA_OPS_CUDA=0|1|auto     leave it out, demand it, or build it where nvcc is found and able to (the default)
    LORA_OPS_CUDA_ARCHS=80;90  architectures, instead of all that nvcc knows of 80, 86, 89, 90, 100 and 120
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
X86_ONLY = {"avx2.cpp", "avx512.cpp", "avx512_bf16.cpp", "amx.cpp"}
CUDA_ARCHS = (80, 86, 89, 90, 100, 120)


def sources() -> list[Path]:
    x86 = sysconfig.get_platform().endswith(("x86_64", "amd64"))
    found = sorted(CSRC.glob("*.cpp")) + sorted((CSRC / "cpu").glob("*.cpp"))
    return [f for f in found if x86 or f.name not in X86_ONLY]


def cuda_sources() -> list[Path]:
    return [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "cuda" / "bindings.cpp"]


def compiler_version(cxx: str) -> str:
    return subprocess.run([*shlex.split(cxx), "--version"], capture_output=True, text=True).stdout


def find_nvcc() -> str | None:
    """CUDA_HOME's, the one on PATH, /usr/local/cuda's, or the one of the pip packages (nvidia-cuda-nvcc and companions)."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    places += [str(p.parent.parent) for p in sorted(packages.glob("*/bin/nvcc"), reverse=True)]
    in_places = [str(Path(p) / "bin" / "nvcc") for p in places if p and (Path(p) / "bin" / "nvcc").exists()]
    named = in_places[:1] if os.environ.get("CUDA_HOME") else []
    return next(iter([*named, *filter(None, [shutil.which("nvcc")]), *in_places]), None)


def wanted_nvcc() -> str | None:
    """nvcc, if the CUDA kernels are to be built."""
    choice = os.environ.get("LORA_OPS_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f'LORA_OPS_CUDA is "{choice}"; it may be 0, 1 or auto')
    nvcc = find_nvcc() if choice != "0" else None
    if choice == "1" and nvcc is None:
        raise SystemExit("LORA_OPS_CUDA is 1, but nvcc was found neither in CUDA_HOME nor on PATH nor among the pip packages")
    return nvcc


def cuda_archs(nvcc: str) -> list[int]:
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = {int(arch) for arch in re.findall(r"compute_(\d+)\b", listed)}
    named = os.environ.get("LORA_OPS_CUDA_ARCHS")
    if named is None:
        return [arch for arch in CUDA_ARCHS if arch in known]
    archs = sorted({int(arch) for arch in re.findall(r"\d+", named)})
    if not archs or not set(archs) <= known or archs[0] < 80:
        raise SystemExit(f'LORA_OPS_CUDA_ARCHS is "{named}"; this nvcc knows {sorted(a for a in known if a >= 80)}')
    return archs


def quote(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(output: Path, rules: list[str], sources: list[Path]) -> str:
    """Each source by the rule that its suffix names (cpp, cu), and all of them by the rule link."""
    objects = [quote(source.relative_to(CSRC).with_suffix(".o")) for source in sources]
    lines = [*rules]
    for source, made in zip(sources, objects, strict=True):
        lines.append(f"build {made}: {source.suffix[1:]} {quote(source)}")
    lines.append(f"build {quote(output)}: link {' '.join(objects)}")
    lines.append(f"default {quote(output)}")
    return "\n".join(lines) + "\n"


def rule(name: str, command: list[str], compiles: bool = True) -> list[str]:
    depfile = ["  depfile = $out.d", "  deps = gcc"] if compiles else []
    return [f"rule {name}", f"  command = {' '.join(command)}", *depfile]


def python_includes() -> list[str]:
    return ["-isystem", shlex.quote(sysconfig.get_paths()["include"]), "-isystem", shlex.quote(pybind11.get_include())]


def cpu_rules() -> list[str]:
    cxx = os.environ.get("CXX", "g++")
    flags = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
    if "clang" not in compiler_version(cxx):
        # GCC's own AVX-512 headers trip these two (GCC bug 105593).
        flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    flags += [*python_includes(), os.environ.get("CXXFLAGS", "")]
    # -s: symbols are of no use in a wheel. libgomp stays dynamic: torch's wheel brings libgomp.so.1 and the pool is shared.
    strip = [] if "-g" in shlex.split(os.environ.get("CXXFLAGS", "")) else ["-s"]
    link = ["-shared", "-fopenmp", *strip, os.environ.get("LDFLAGS", "")]
    if sys.platform == "darwin":
        link += ["-undefined", "dynamic_lookup"]
    return [
        *rule("cpp", [cxx, "-MMD -MF $out.d", *flags, "-c $in -o $out"]),
        *rule("link", [cxx, "$in", *link, "-o $out"], compiles=False),
    ]


def cuda_rules(nvcc: str) -> list[str]:
    archs = cuda_archs(nvcc)
    # The newest architecture's PTX beside the machine code: what comes after it translates that.
    targets = [f"-gencode arch=compute_{a},code=sm_{a}" for a in archs]
    targets += [f"-gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
    # As torch compiles: no implicit conversions and operators of half types.
    no_operators = [
        f"-D__CUDA_NO_{what}__" for what in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS")
    ]
    common = [shlex.quote(nvcc), "-std=c++17", "-O3", "-Xcompiler -fPIC,-fvisibility=hidden", "-MD -MF $out.d"]
    return [
        *rule("cu", [*common, *no_operators, *targets, "-c $in -o $out"]),
        *rule("cpp", [*common, *python_includes(), "-c $in -o $out"]),
        *rule("link", [shlex.quote(nvcc), "-shared", "-cudart static", "-Xlinker -s", "$in", "-o $out"], compiles=False),
    ]


class BuildWithNinja(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        work = Path(self.build_temp).resolve() / ext.name
        work.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(ninja_file(output, ext.rules, [ROOT / s for s in ext.sources]))
        if subprocess.run([sys.executable, "-m", "ninja", "-C", str(work)]).returncode != 0:
            raise CompileError(
                f"{ext.name} could not be built" + (", and is left out (LORA_OPS_CUDA=0)" if ext.optional else "")
            )


def extension(name: str, sources: list[Path], rules: list[str]) -> Extension:
    made = Extension(name, sources=[str(f.relative_to(ROOT)) for f in sources])
    made.rules = rules
    return made


def extensions() -> list[Extension]:
    nvcc = wanted_nvcc()
    made = [extension("lora_ops._C", sources(), cpu_rules())]
    if nvcc is not None:
        made.append(extension("lora_ops._C_cuda", cuda_sources(), cuda_rules(nvcc)))
        made[-1].optional = os.environ.get("LORA_OPS_CUDA") != "1"
    return made


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildWithNinja})
