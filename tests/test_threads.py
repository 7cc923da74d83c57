"""Threads: no result depends on how many there are, or on what others do; forks go on; signals are heard."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lora_ops
from lora_ops import LoraConfig, NF4Weight

HERE = Path(__file__).parent
M, K, N, r = 200, 320, 288, 17
F32, BF16 = torch.float32, torch.bfloat16


def normal(*size: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def trained(layer: nn.Module, x: Tensor, *also: Tensor) -> list[Tensor]:
    """What comes out of a layer, and the gradients of whatever trains."""
    leaves = [p for p in layer.parameters() if p.requires_grad]
    leaves += [t.requires_grad_() for t in (x, *also) if t.is_floating_point()]
    torch.manual_seed(0)
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, leaves, normal(*y.shape, dtype=y.dtype, seed=1))]


class Calls(nn.Module):
    """A function of x with parameters."""

    def __init__(self, fn: Callable[..., Tensor], *tensors: Tensor) -> None:
        super().__init__()
        self.fn, self.tensors = fn, nn.ParameterList(nn.Parameter(t) for t in tensors)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x, *self.tensors)


def factors(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return normal(r, K, dtype=dtype, seed=2) / 16, normal(N, r, dtype=dtype, seed=3) / 4


def linear(x_dtype: torch.dtype, dtype: torch.dtype, quantised: bool = False) -> list[Tensor]:
    weight = normal(N, K, seed=4) / 16
    given = lora_ops.quantize_nf4(weight) if quantised else weight.to(x_dtype)
    op = lora_ops.qlora_linear if quantised else lora_ops.lora_linear

    def call(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        return op(x, given, A, B, scaling=0.5, bias=bias, dropout_p=0.1, training=True)

    bias = normal(N).to(x_dtype)
    return trained(Calls(call, *factors(dtype), bias), normal(M, K, dtype=x_dtype))


def general(dtype: torch.dtype, quantised: bool) -> list[Tensor]:
    factor = {"gate": normal(M, r, seed=5), "core": normal(r, r, seed=6), "out_scale": normal(N, seed=7)}
    leaves = [t.requires_grad_() for t in factor.values()]
    weight = normal(N, K, seed=4) / 16
    given = lora_ops.quantize_nf4(weight) if quantised else weight.to(dtype)
    op = lora_ops.qlora_linear if quantised else lora_ops.lora_linear
    call = Calls(lambda x, A, B: op(x, given, A, B, scaling=0.5, dropout_p=0.1, training=True, **factor), *factors(F32))
    return trained(call, normal(M, K, dtype=dtype), *leaves)


def mixed(dtype: torch.dtype, quantised: bool) -> list[Tensor]:
    ranks, weight = (3, 17, 64), normal(N, K, seed=4) / 16
    given = lora_ops.quantize_nf4(weight) if quantised else weight.to(dtype)
    ids = torch.arange(M) % 4 - 1

    def call(x: Tensor, *tensors: Tensor) -> Tensor:
        bank = lora_ops.AdapterBank()
        for i in range(3):
            bank.add(str(i), tensors[2 * i], tensors[2 * i + 1], 0.5)
        return lora_ops.multi_lora_linear(x, given, bank, ids, dropout_p=0.1, training=True)

    adapters = [t for i, s in enumerate(ranks) for t in (normal(s, K, seed=10 + i) / 16, normal(N, s, seed=20 + i) / 4)]
    return trained(Calls(call, *adapters), normal(M, K, dtype=dtype))


def layer(make: Callable[[], nn.Module], x: Tensor, **options) -> list[Tensor]:
    torch.manual_seed(0)
    config = LoraConfig(r=r, target_modules=["0"], init_lora_weights=False, **options)
    return trained(lora_ops.add_lora(nn.Sequential(make()), config), x)


def quantised(N: int, K: int, **options) -> list[Tensor]:
    weight = lora_ops.quantize_nf4(normal(N, K), **options)
    tensors = [weight.codes, weight.absmax, weight.nested_absmax, weight.offset, weight.dequantize(), weight.dequantize(BF16)]
    again = NF4Weight.from_bitsandbytes(weight.to_bitsandbytes())
    return [t for t in (*tensors, again.codes, *weight.to_bitsandbytes().values()) if t is not None]


OPS: dict[str, Callable[[], list[Tensor]]] = {
    "fp32": lambda: linear(F32, F32),
    "bf16": lambda: linear(BF16, BF16),
    "bf16, fp32 adapters": lambda: linear(BF16, F32),
    "fp16": lambda: linear(torch.float16, torch.float16),
    "4-bit": lambda: linear(BF16, F32, quantised=True),
    "4-bit, fp32": lambda: linear(F32, F32, quantised=True),
    "general": lambda: general(F32, False),
    "general, bf16": lambda: general(BF16, False),
    "general, 4-bit": lambda: general(BF16, True),
    "mixed batch": lambda: mixed(F32, False),
    "mixed batch, bf16": lambda: mixed(BF16, False),
    "mixed batch, 4-bit": lambda: mixed(BF16, True),
    "panels": lambda: [lora_ops.pack_weight(normal(N, K), F32), lora_ops.pack_weight(normal(N, K, dtype=BF16), BF16)],
    "layer": lambda: layer(lambda: nn.Linear(K, N), normal(M, K), lora_dropout=0.1),
    "dora": lambda: layer(lambda: nn.Linear(K, N), normal(M, K), use_dora=True),
    "embedding": lambda: layer(lambda: nn.Embedding(1000, N), torch.arange(M * 20) % 1000),
    "convolution": lambda: layer(lambda: nn.Conv2d(5, N, 8, 8), normal(2, 5, 80, 80)),
    "nf4": lambda: quantised(300, 1001),
    "fp4, plain scales": lambda: quantised(300, 1001, double_quant=False, quant_type="fp4", blocksize=128),
    "nf4, more scales than torch sums on one thread": lambda: quantised(1100, 1001, blocksize=32),
}


@pytest.mark.parametrize("name", OPS)
def test_bits_depend_on_no_number_of_threads(name: str) -> None:
    """Nor on which of several runs it is."""
    torch.set_num_threads(1)
    expected = OPS[name]()
    for threads in (1, 2, 3, 4, 7):
        torch.set_num_threads(threads)
        for actual, wanted in zip(OPS[name](), expected, strict=True):
            assert actual.dtype == wanted.dtype
            assert torch.equal(actual, wanted), f"with {threads} threads"


def fine_tuned(seed: int, quant: str | None, steps: int = 15) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
    for p in model.parameters():
        p.data.normal_(std=0.1, generator=g)
    lora_ops.add_lora(model, LoraConfig(r=8, target_modules="all-linear"), quant=quant)
    for p in lora_ops.lora_parameters(model):
        p.data.normal_(std=0.1, generator=g)
    optimizer = torch.optim.AdamW(lora_ops.lora_parameters(model), lr=1e-2)
    for _ in range(steps):
        model(torch.randn(128, 64, generator=g)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in lora_ops.lora_parameters(model)]


def test_two_python_threads_train_two_models() -> None:
    """At once, as one after the other: bit for bit."""
    runs = [(0, None), (1, "nf4"), (2, None)]
    alone = [fine_tuned(*run) for run in runs]
    together: dict[int, list[Tensor]] = {}

    def train(i: int) -> None:
        torch.set_num_threads(1 + i % 2)
        together[i] = fine_tuned(*runs[i])

    threads = [threading.Thread(target=train, args=(i,)) for i in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expected in enumerate(alone):
        assert all(map(torch.equal, together[i], expected))


def run_script(code: str, **variables: str) -> str:
    """What a script prints."""
    head = f"import os, signal, sys, threading, torch, lora_ops\nsys.path.insert(0, {str(HERE)!r})\n"
    head += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs are deaf to it
    command, environment = [sys.executable, "-c", head + code], os.environ | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_fork_after_kernels_have_run() -> None:
    """libgomp's threads are not in the child, and a team that waits for them would wait for ever. torch's own operators do."""
    printed = run_script(
        "from test_threads import mixed, linear, F32, BF16\n"
        "from lora_ops import _C, quantize_nf4\n"
        "torch.set_num_threads(2)\n"
        "x, w, A, B = (torch.randn(*s) for s in ((200, 320), (288, 320), (8, 320), (288, 8)))\n"
        "def call():\n"
        "    q = quantize_nf4(w)\n"
        "    y = lora_ops.lora_linear(x, w, A, B, scaling=1.0), lora_ops.qlora_linear(x, q, A, B, scaling=1.0)\n"
        "    return b''.join(t.numpy().tobytes() for t in (*y, q.codes, q.dequantize()))\n"
        "before = call()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(300)\n"
        "    same = all(call() == before for _ in range(3))\n"
        "    grandchild = os.fork()\n"
        "    if grandchild == 0:\n"
        "        os._exit(0 if call() == before else 3)\n"
        "    os._exit(0 if same and os.waitpid(grandchild, 0)[1] == 0 else 4)\n"
        "print(os.waitpid(child, 0)[1], call() == before)\n",
        OMP_NUM_THREADS="2",
    )
    assert printed == "0 True\n"


class Adapted(torch.utils.data.Dataset):
    """Examples that a kernel makes, in the DataLoader's worker."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.layer = lora_ops.FusedLoraLinear(320, 288, r=8, init_lora_weights=False)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Tensor:
        torch.set_num_threads(2)  # the loader's workers have one
        with torch.no_grad():
            return self.layer(torch.full((64, 320), i / 8))


def test_forked_workers_of_a_data_loader() -> None:
    printed = run_script(
        "from test_threads import Adapted\n"
        "torch.set_num_threads(2)\n"
        "data = Adapted()\n"
        "here = [data[i].numpy().tobytes() for i in range(8)]\n"
        "loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2, timeout=300,\n"
        "    multiprocessing_context='fork')\n"
        "print([t.numpy().tobytes() for t in loader] == here)\n",
        OMP_NUM_THREADS="2",
    )
    assert printed == "True\n"


LONG = (  # minutes, on generic kernels; pages of y that nothing is written to take no memory
    "x, w = torch.randn(1, 4096).expand(1 << 16, 4096), torch.randn(4096, 4096)\n"
    "A, B = torch.randn(8, 4096, requires_grad=True), torch.randn(4096, 8, requires_grad=True)\n"
)


@pytest.mark.parametrize("call", ["forward", "backward"])
@pytest.mark.parametrize("threads", [1, 2])
def test_interrupt_ends_a_long_kernel(call: str, threads: int) -> None:
    """As KeyboardInterrupt, out of the kernel; and the next one is right."""
    backward = (
        "y = torch.ones(()).expand(1 << 16, 4096)\n"
        "work = lambda: torch.ops.lora_ops.lora_backward(y, x, w, A.detach(), B.detach(), torch.zeros(1 << 16, 8), None, "
        "1.0, 0.0, True, True, True, False)\n"
    )
    forward = "work = lambda: lora_ops.lora_linear(x, w, A, B, scaling=1.0)\n"
    printed = run_script(
        f"torch.set_num_threads({threads})\n" + LONG + (backward if call == "backward" else forward) +
        "threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        "try:\n"
        "    work()\n"
        "    print('finished')\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
        "from test_threads import linear, F32\n"
        "print(len(linear(F32, F32)))\n",
        LORA_OPS_CPU_ISA="generic", LORA_OPS_CPU_BASE="kernel",
    )  # fmt: skip
    assert printed == "interrupted\n5\n"


def test_interrupt_by_a_handler_that_goes_on() -> None:
    """It may call a kernel itself; the one that it came in upon is none the wiser."""
    printed = run_script(
        "torch.set_num_threads(2)\n"
        "x, w, A, B = (torch.randn(*s) for s in ((3000, 1024), (1024, 1024), (8, 1024), (1024, 8)))\n"
        "small = lambda: lora_ops.lora_linear(x[:50], w, A, B, scaling=1.0)\n"
        "call = lambda: lora_ops.lora_linear(x, w, A, B, scaling=1.0)\n"
        "expected, inside, heard = call(), small(), []\n"
        "def handler(*_):\n"
        "    heard.append((torch.equal(small(), inside), sys._getframe(1).f_code.co_name))\n"
        "    signal.setitimer(signal.ITIMER_REAL, 0.05)\n"
        "signal.signal(signal.SIGALRM, handler)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.05)\n"
        "same = True\n"
        "while len(heard) < 5:\n"
        "    same = same and torch.equal(call(), expected)\n"
        "signal.signal(signal.SIGALRM, signal.SIG_IGN)\n"
        "print(same, all(ok for ok, _ in heard), any('forward' in name for _, name in heard))\n",
        LORA_OPS_CPU_ISA="generic", LORA_OPS_CPU_BASE="kernel",
    )  # fmt: skip
    assert printed == "True True True\n"
