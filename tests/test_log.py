"""LORA_OPS_LOG: what every layer says of its path, and that it costs nothing when it is off."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora_ops
from lora_ops import log, ops, qlora_ops

HERE = Path(__file__).parent

MODEL = """
import torch
from torch import nn
import lora_ops
from lora_ops import LoraConfig

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    def forward(self, x):
        return self.block(x)

x, config = torch.randn(3, 64), LoraConfig(r=4, target_modules="all-linear")
"""


def lines(script: str, **variables: str) -> list[str]:
    ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), "LORA_OPS_LOG": "info", "LORA_OPS_CPU_BASE": "kernel"}
    environment = {**os.environ, **ours, **variables}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MODEL + script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("lora_ops:")]


KERNELS = f"fused kernels ({lora_ops.build_info()['isa']})"


def test_layers_say_it_once_by_their_names():
    said = lines("""
model = lora_ops.add_lora(Net(), config)
for _ in range(3):
    model(x).sum().backward()
lora_ops.merge_lora(model)
model(x)
lora_ops.unmerge_lora(model)
model.double()(x.double())
lora_ops.FusedLoraConv2d(4, 6, 3, 3, padding=1)(torch.randn(1, 4, 5, 5))
""")
    fused = "lora_forward: " + KERNELS + ", tensors as they come, without the dispatcher"
    slow = "lora_forward: reference.py, since x is torch.float64, without the dispatcher"
    merged = "the weight alone, since it is merged"
    expected = [f"lora_ops: block.{i}: {path}" for path in (fused, merged, slow) for i in (0, 2)]
    assert said[:-1] == expected
    assert said[-1].startswith("lora_ops: FusedLoraConv2d: torch's convolutions, since this one is no matrix product")


def test_modes_compiled_graphs_and_transforms():
    said = lines("""
model = lora_ops.add_lora(Net(), config, quant="nf4")
torch.compile(model, backend="aot_eager", fullgraph=True)(x)
W, A, B = torch.randn(5, 64), torch.randn(2, 64), torch.randn(5, 2)
with torch.no_grad():
    lora_ops.lora_linear(x, W, A, B, scaling=1.0, gate=torch.ones(2))
    torch.func.vmap(lambda x: lora_ops.lora_linear(x, W, A, B, scaling=1.0))(x)
    bank = lora_ops.AdapterBank()
    bank.add("a", A, B, 1.0)
    lora_ops.multi_lora_linear(x, W, bank, ["a", None, "a"])
""")
    by_address = KERNELS + ", by addresses"
    assert said == [
        f"lora_ops: OptimizedModule: qlora_forward: {by_address}, through the dispatcher",
        f"lora_ops: lora_general_forward: {by_address}, without the dispatcher",
        "lora_ops: lora_forward: reference.py, since a transform of torch.func is at work, without the dispatcher",
        f"lora_ops: multi_lora_forward: {KERNELS}, tensors as they come, without the dispatcher",
    ]


def test_torch_s_base_product():
    script = "lora_ops.add_lora(Net(), config)(x)\nlora_ops.add_lora(Net(), config, quant='nf4')(x)"
    said = lines(script, LORA_OPS_CPU_BASE="torch")
    base = f"torch multiplies by W0, since LORA_OPS_CPU_BASE is torch; {KERNELS}, by addresses, without the dispatcher"
    assert said == [f"lora_ops: block.{i}: {op}: {base}" for op in ("lora_forward", "qlora_forward") for i in (0, 2)]


def test_patched_peft_layers():
    said = lines("""
import peft
from lora_ops.integrations.peft import patch
model = patch(peft.get_peft_model(Net(), peft.LoraConfig(r=4, target_modules=["block.0"])))
model(x)
model.merge_adapter()
model(x)
model.unmerge_adapter()
model.double()(x.double())
""")
    layer = "lora_ops: base_model.model.block.0: "
    assert said == [
        layer + f"lora_forward: {KERNELS}, tensors as they come, without the dispatcher",
        layer + "PEFT's forward, since its adapters are merged",
        layer + "PEFT's forward, since its base weight is torch.float64",
    ]


def test_cuda_paths():
    """Where a GPU would be, there is none: the choice is made, and its kernel is not called."""
    said = lines("""
import contextlib, types
from lora_ops.cuda import dispatch
dispatch.has_kernel, dispatch.target, dispatch.known_paths = (lambda *_: True), (lambda _: None), (lambda _: None)
dispatch.ops = types.SimpleNamespace(forward=lambda *_, split: (split, None))
dispatch._current = contextlib.nullcontext
call = dispatch.log.watched("lora_forward", dispatch.lora_forward, dispatch.log.DISPATCHED)
for split in (False, True):
    dispatch.choose = lambda *_: split
    args = x, torch.randn(64, 64), torch.randn(2, 64), torch.randn(64, 2), None, None, None, 1.0, 0.0
    assert call(*args)[0] == split
""", LORA_OPS_CUDA_PATH="auto")  # fmt: skip
    why = "since it was timed on this GPU, or goes by the rows where it cannot be, through the dispatcher"
    assert said == [
        f"lora_ops: lora_forward: CUDA kernels, fused, {why}",
        f"lora_ops: lora_forward: CUDA kernels, split: cuBLAS multiplies by W0, the kernels do the rest, {why}",
    ]


def test_what_the_user_has_set_up_is_what_shows():
    said = lines(
        "import logging\nlogging.basicConfig(format='lora_ops: mine %(message)s')\nlora_ops.add_lora(Net(), config)(x)"
    )
    assert [line.split(":")[1] for line in said] == [" mine block.0", " mine block.2"]


def test_an_unknown_value_is_an_error():
    command = [sys.executable, "-c", "import lora_ops"]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "LORA_OPS_LOG": "debug"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert 'ValueError: LORA_OPS_LOG is "debug"; it may be info or off' in done.stderr


@pytest.mark.skipif(log.ON, reason="this very suite was told to log")
def test_off_wraps_nothing_and_registers_nothing():
    assert ops.lora_forward.direct[False][0] is ops._lora_forward_cpu
    assert qlora_ops.OPERATOR.direct[False][0] is qlora_ops._forward_of_checked
    assert log._enter not in torch.nn.modules.module._global_forward_pre_hooks.values()
    assert log._leave not in torch.nn.modules.module._global_forward_hooks.values()
    assert not any(isinstance(handler, log.logging.StreamHandler) for handler in log.logger.handlers)
