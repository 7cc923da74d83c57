"""PEFT's own test suite, with its layers and with ours in their place: the same tests must pass.

    make conformance     downloads the source of the installed PEFT and runs the LoRA part of its test_custom_models.py twice

Tests are PEFT's (Apache-2.0), fetched into build/peft and not part of this repository. They run without the network:
test_custom_models.py makes its models on the spot; for files that load models of the hub, set HF_HOME to a cache that has them.
As a pytest plugin (-p peft_conformance) this file puts the fused layers, dense and 4-bit, in PEFT's places, and counts their
calls.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ET
from collections import Counter
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "peft"
COUNT = "LORA_OPS_CONFORMANCE_COUNT"  # the file that the plugin leaves its count of fused calls in
LORA = "LoraConfig and not TinyLora and not VBLoRA and not UniLora and not RandLora"

Outcomes = dict[str, str]


def pytest_configure(config) -> None:  # type: ignore[no-untyped-def]
    """The plugin."""
    count = os.environ.get(COUNT)
    if count is None:
        return
    from peft.tuners.lora import bnb, layer

    from lora_ops.integrations.peft import layers, layers_4bit, other_layers

    calls: Counter[str] = Counter()

    def counted(forward):  # type: ignore[no-untyped-def]
        def call(module, *args):  # type: ignore[no-untyped-def]
            calls[f"{type(module).__name__} {forward.__name__}"] += 1
            return forward(module, *args)

        return call

    layers.fused_forward, layers.mixed_forward = counted(layers.fused_forward), counted(layers.mixed_forward)
    for name in ("conv_forward", "embedding_forward"):
        setattr(other_layers, name, counted(getattr(other_layers, name)))
    layer.Linear, bnb.Linear4bit = layers.FusedLinear, layers_4bit.FusedLinear4bit
    for name in ("Embedding", "Conv1d", "Conv2d", "Conv3d"):
        setattr(layer, name, getattr(other_layers, f"Fused{name}"))
    config.add_cleanup(lambda: Path(count).write_text(json.dumps(calls)))


def source() -> Path:
    """The tests of the PEFT that is installed."""
    name = f"peft-{version('peft')}"
    if not (BUILD / name / "tests").is_dir():
        BUILD.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", name.replace("-", "=="), "--no-deps", "--no-binary", "peft"]
        subprocess.run([*command, "-d", str(BUILD)], check=True)
        with tarfile.open(BUILD / f"{name}.tar.gz") as archive:
            archive.extractall(BUILD, filter="data")
        (BUILD / name / "tests" / "__init__.py").touch()
    return BUILD / name


def run(tests: Path, file: str, select: str, fused: bool) -> tuple[Outcomes, dict[str, int]]:
    """Of every test its outcome, and how many fused calls were made, of which kinds."""
    side = "fused" if fused else "stock"
    results, count = (BUILD / f"{Path(file).stem}_{side}.{kind}" for kind in ("xml", "count"))
    environment = {"HF_HOME": str(BUILD / "hub")} | os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")])} | ({COUNT: str(count)} if fused else {})
    for written in (results, count):
        written.unlink(missing_ok=True)
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", f"--junitxml={results}"]
    command = [sys.executable, "-m", "pytest", f"tests/{file}", "-k", select, *options, "-p", "peft_conformance"]
    with open(results.with_suffix(".log"), "w") as log:
        subprocess.run(command, cwd=tests, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if not results.exists():
        sys.exit(f"{side}: pytest did not get to its end; see {results.with_suffix('.log')}")
    outcomes = {}
    for case in ET.parse(results).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = kinds.pop() if kinds else "passed"
    return outcomes, json.loads(count.read_text()) if fused else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", default="test_custom_models.py")
    parser.add_argument("--select", default=LORA, help="pytest's -k")
    args = parser.parse_args()
    tests = source()
    stock, _ = run(tests, args.file, args.select, fused=False)
    fused, calls = run(tests, args.file, args.select, fused=True)
    for side, outcomes in (("stock", stock), ("fused", fused)):
        print(f"{side}: {', '.join(f'{n} {kind}' for kind, n in Counter(outcomes.values()).most_common())}")
    print(f"{sum(calls.values())} fused calls{''.join(f', {n} of {kind}' for kind, n in calls.items())}")
    differ = sorted(name for name in stock.keys() | fused.keys() if stock.get(name) != fused.get(name))
    for name in differ:
        print(f"{name}: {stock.get(name, 'absent')}, fused {fused.get(name, 'absent')}")
    if differ or not calls or "passed" not in stock.values():
        sys.exit(1)


if __name__ == "__main__":
    main()
