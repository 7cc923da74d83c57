"""Builds lora_ops._C with ninja: every source file compiles alone, in parallel, for the baseline ISA (csrc/cpu/*.cpp raise
theirs by themselves). Needs a C++17 compiler and pybind11; torch is not needed and not linked.
"""

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
X86_ONLY = {"avx2.cpp", "avx512.cpp", "avx512_bf16.cpp", "amx.cpp"}


def sources() -> list[Path]:
    x86 = sysconfig.get_platform().endswith(("x86_64", "amd64"))
    found = sorted((ROOT / "csrc").glob("*.cpp")) + sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    return [f for f in found if x86 or f.name not in X86_ONLY]


def compiler_version(cxx: str) -> str:
    return subprocess.run([*shlex.split(cxx), "--version"], capture_output=True, text=True).stdout


def ninja_file(output: Path) -> str:
    cxx = os.environ.get("CXX", "g++")
    flags = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
    if "clang" not in compiler_version(cxx):
        # GCC's own AVX-512 headers trip these two (GCC bug 105593).
        flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    flags += ["-isystem", sysconfig.get_paths()["include"], "-isystem", pybind11.get_include()]
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    # -s: symbols are of no use in a wheel. libgomp stays dynamic: torch's wheel brings libgomp.so.1 and the pool is shared.
    link = ["-shared", "-fopenmp", "-s", *shlex.split(os.environ.get("LDFLAGS", ""))]
    if sys.platform == "darwin":
        link += ["-undefined", "dynamic_lookup"]

    def quote(path: Path | str) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        f"cxx = {cxx}",
        f"cflags = {shlex.join(flags)}",
        f"ldflags = {shlex.join(link)}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $cflags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $in $ldflags -o $out",
    ]
    objects = []
    for source in sources():
        objects.append(quote(source.relative_to(ROOT / "csrc").with_suffix(".o")))
        lines.append(f"build {objects[-1]}: compile {quote(source)}")
    lines.append(f"build {quote(output)}: link {' '.join(objects)}")
    lines.append(f"default {quote(output)}")
    return "\n".join(lines) + "\n"


class BuildWithNinja(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(ninja_file(output))
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(work)], check=True)


setup(
    ext_modules=[Extension("lora_ops._C", sources=[str(f.relative_to(ROOT)) for f in sources()])],
    cmdclass={"build_ext": BuildWithNinja},
)
