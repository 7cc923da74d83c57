"""What type checkers are told: the extension's stub is the extension, and a strict program that uses the package passes."""

import ast
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora_ops
from lora_ops import _C

PACKAGE = Path(lora_ops.__file__).parent

PROGRAM = """
from pathlib import Path

import torch
from torch import Tensor, nn

import lora_ops
from lora_ops import LoraConfig, NF4Weight
from lora_ops.optim import loraplus_groups


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = lora_ops.FusedLoraLinear(16, 32, r=4, lora_alpha=8, lora_dropout=0.05)
        self.second = lora_ops.FusedLoraLinear.from_linear(nn.Linear(32, 8), r=2, quant="nf4")

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.first(x)
        y: Tensor = self.second(torch.relu(h))
        return y


def step(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    qweight: NF4Weight = lora_ops.quantize_nf4(weight)
    y: Tensor = lora_ops.lora_linear(x, weight, A, B, scaling=2.0, dropout_p=0.1, training=True)
    z: Tensor = lora_ops.qlora_linear(x, qweight, A, B, scaling=2.0)
    return y + z + nn.functional.linear(x, qweight.dequantize())


def many(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    bank = lora_ops.AdapterBank()
    bank.add("one", A, B, scaling=1.0)
    return lora_ops.multi_lora_linear(x, weight, bank, ["one", None])


def tune(model: Network, folder: Path) -> Network:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa")
    plain: nn.Sequential = lora_ops.add_lora(nn.Sequential(nn.Linear(4, 4)), config)
    lora_ops.save_adapter(plain, folder)
    torch.optim.AdamW(lora_ops.lora_parameters(plain), lr=1e-3).step()
    torch.optim.AdamW(loraplus_groups(plain, lr=1e-4, ratio=16)).step()
    method = lora_ops.methods.adalora(plain, target_r=2, total_steps=10, initial=1, final=2)
    method.on_step(1)
    lora_ops.merge_lora(plain)
    with lora_ops.disable_adapter(plain):
        plain(torch.ones(1, 4))
    isa: str = lora_ops.build_info()["isa"]
    print(isa, lora_ops.__version__)
    return model
"""
WRONG = """
import lora_ops

layer = lora_ops.FusedLoraLinear("16", 32)
layer.merge(into=None)
"""


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


def test_the_stub_names_what_the_extension_has() -> None:
    stub = ast.parse((PACKAGE / "_C.pyi").read_text())
    functions = {node.name: len(node.args.posonlyargs) for node in stub.body if isinstance(node, ast.FunctionDef)}
    values = {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    public = {name for name in dir(_C) if not name.startswith("_")}
    assert functions.keys() | values == public
    for name, count in functions.items():
        # What pybind11 writes: lora_forward(arg0: int, arg1: ...) -> None
        assert len(re.findall(r"\barg\d+: ", inspect.getdoc(getattr(_C, name)) or "")) == count, name


def mypy(path: Path, program: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """silent: errors within the package are not the program's, as where it is installed."""
    path.write_text(program)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--config-file=",
        f"--cache-dir={cache}",
        str(path),
    ]
    return subprocess.run(command, cwd=path.parent, capture_output=True, text=True, env={"MYPYPATH": str(PACKAGE.parent)})


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed (make lint installs it)")
def test_a_strict_program_passes_and_a_wrong_one_does_not(tmp_path: Path) -> None:
    done = mypy(tmp_path / "program.py", PROGRAM, tmp_path / "cache")
    assert done.returncode == 0, done.stdout + done.stderr
    done = mypy(tmp_path / "wrong.py", WRONG, tmp_path / "cache")
    assert done.returncode == 1 and "Found 2 errors" in done.stdout, done.stdout + done.stderr
