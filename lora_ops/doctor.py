"""What is installed and whether it computes what it should, as text that can be pasted into an issue.

On a GPU every op is held on each of its paths against reference.py in float64 by the policy of the test suite, an error of at
most 1.5 times eager's and one ulp, and then timed, with the share of what the GPU's data sheet allows. After an error of its
own, such as an illegal address, a GPU computes nothing more in this process: the report ends there and says so.
"""

import contextlib
import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .build_info import build_info
from .cuda import dispatch, path
from .functional import lora_linear, qlora_linear
from .quant import quantize_nf4


class Case(NamedTuple):
    M: int
    K: int
    N: int
    r: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    dropout_p: float = 0.0
    quantized: bool = False

    def __str__(self) -> str:
        dtypes = " ".join(str(t).removeprefix("torch.") for t in (self.dtype, self.adapter_dtype))
        op = "qlora_linear" if self.quantized else "lora_linear"
        return f"{op} {self.M} x {self.K} x {self.N} r={self.r} {dtypes} dropout {self.dropout_p}"


_BF16, _F16, _F32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    Case(1, 1024, 768, 16, _BF16, _BF16), Case(37, 1000, 520, 8, _BF16, _F32), Case(512, 1024, 1024, 16, _BF16, _F32),
    Case(512, 1024, 1024, 16, _BF16, _BF16, 0.1), Case(300, 2048, 1536, 64, _BF16, _F32, 0.05),
    Case(129, 333, 129, 5, _BF16, _BF16), Case(64, 512, 512, 100, _F16, _F16), Case(512, 1024, 1024, 16, _F16, _F32, 0.1),
    Case(65, 333, 257, 3, _F16, _F32), Case(16, 1024, 1024, 16, _F32, _F32),
    Case(128, 1024, 512, 16, _BF16, _F32, 0.0, True), Case(4, 1024, 512, 8, _F16, _F16, 0.1, True),
]  # fmt: skip

# Dense bf16 flop/s with fp32 accumulation and bytes/s, from data sheets, by torch.cuda.get_device_name without "NVIDIA ": a
# board of the same chip with other memory, power or bus is another GPU. No share is printed for what is not listed.
PEAKS = {
    "A100-SXM4-40GB": (312e12, 1.555e12), "A100-SXM4-80GB": (312e12, 2.039e12),
    "A100-PCIE-40GB": (312e12, 1.555e12), "A100 80GB PCIe": (312e12, 1.935e12),
    "H100 80GB HBM3": (989e12, 3.35e12), "H100 PCIe": (756e12, 2.0e12), "H100 NVL": (835e12, 3.9e12),
    "H200": (989e12, 4.8e12), "H200 NVL": (836e12, 4.8e12), "B200": (2250e12, 8e12),
    "L4": (121e12, 0.3e12), "L40S": (362e12, 0.864e12), "A10": (125e12, 0.6e12), "RTX A6000": (154.8e12, 0.768e12),
    "GeForce RTX 3090": (71e12, 0.936e12), "GeForce RTX 4090": (165.2e12, 1.008e12), "GeForce RTX 5090": (209.5e12, 1.792e12),
}  # fmt: skip


def peaks(name: str) -> tuple[float, float] | None:
    return PEAKS.get(name.removeprefix("NVIDIA "))


BENCH = [(1, 4096, 4096), (512, 4096, 4096), (4096, 4096, 4096), (4096, 4096, 14336)]


# --- self-test --------------------------------------------------------------------------------------------------------


def results(case: Case, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """y, dx, dA, dB and dbias of the op, of eager PyTorch, and of reference.py in float64."""
    M, K, N, r = case[:4]
    g = torch.Generator().manual_seed(sum(case[:4]))

    def normal(*size: int, std: float, dtype: torch.dtype) -> Tensor:
        return (torch.randn(size, generator=g) * std).to(dtype).to(device)

    x, dy = normal(M, K, std=1, dtype=case.dtype), normal(M, N, std=1, dtype=case.dtype)
    W, bias = normal(N, K, std=K**-0.5, dtype=case.dtype), normal(N, std=1, dtype=case.dtype)
    A, B = normal(r, K, std=K**-0.5, dtype=case.adapter_dtype), normal(N, r, std=r**-0.5, dtype=case.adapter_dtype)
    scaling, p = 0.5, case.dropout_p
    exact_W = W
    if case.quantized:
        qweight = quantize_nf4(W)
        W, exact_W = qweight.dequantize(case.dtype), qweight.dequantize(torch.float64)
    torch.manual_seed(0)
    seed = torch.randint(0, 2**62, (), dtype=torch.int64, device=device) if p else None  # as lora_linear draws it

    def fused(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(0)
        if case.quantized:
            return qlora_linear(x, qweight, A, B, scaling=scaling, bias=bias, dropout_p=p, training=True)
        return lora_linear(x, W, A, B, scaling=scaling, bias=bias, dropout_p=p, training=True)

    def eager(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        h = x.to(A.dtype)
        if seed is not None:
            h = h * (reference.dropout_keep(seed, p, M, K).to(h.dtype) / (1 - p))
        y = F.linear(x, W, bias)
        return (y + F.linear(F.linear(h, A), B) * scaling).to(y.dtype)

    def run(lora: Callable[..., Tensor]) -> dict[str, Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, A, B, bias)]
        y = lora(*leaves)
        return dict(zip(("y", "dx", "dA", "dB", "dbias"), (y.detach(), *torch.autograd.grad(y, leaves, dy)), strict=True))

    wx, wW, wA, wB = (t.double() for t in (x, exact_W, A, B))
    y, S = reference.lora_forward(wx, wW, wA, wB, bias.double(), scaling, p, seed)
    gradients = reference.lora_backward(dy.double(), wx, wW, wA, wB, S, scaling, p, seed)
    exact = dict(zip(("y", "dx", "dA", "dB", "dbias"), (y, *gradients), strict=True))
    return run(fused), run(eager), exact  # type: ignore[return-value]


def failures(actual: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> list[str]:
    """The results that are further from the exact ones than 1.5 times eager's are, and one ulp."""
    found = []
    for name, result in actual.items():
        yardstick, right = eager[name], exact[name]
        if (result.dtype, result.shape) != (yardstick.dtype, yardstick.shape):
            found.append(f"{name} is {tuple(result.shape)} {result.dtype}, not {tuple(yardstick.shape)} {yardstick.dtype}")
            continue
        largest = right.abs().max().item()
        ulp = torch.finfo(result.dtype).eps * 2.0 ** (math.frexp(largest)[1] - 1)
        error, eagers = ((t.double() - right).abs().max().item() for t in (result, yardstick))
        if not error <= 1.5 * eagers + ulp:  # a NaN fails
            found.append(f"{name} is off by {error:.3g}, eager by {eagers:.3g}, ulp {ulp:.3g}")
    return found


class GpuFailed(Exception):  # noqa: N818
    """The GPU reported an error after which nothing runs on it in this process."""


def said(e: Exception) -> str:
    """torch adds advice about debugging below the first line."""
    return f"{type(e).__name__}: {e}".splitlines()[0]


def check_alive(device: torch.device) -> None:
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as e:
            raise GpuFailed(said(e)) from None


@contextlib.contextmanager
def forced_path(chosen: str) -> Iterator[None]:
    before = os.environ.get(path.VARIABLE)
    os.environ[path.VARIABLE] = chosen
    try:
        yield
    finally:
        if before is None:
            del os.environ[path.VARIABLE]
        else:
            os.environ[path.VARIABLE] = before


def self_test(
    device: torch.device, cases: list[Case], paths: Sequence[str] = ("auto",)
) -> Iterator[tuple[Case, str, list[str]]]:
    """Each case on each path with what is wrong with it. An op that raises is wrong, too.

    GpuFailed follows where the GPU is lost by that.
    """
    for case in cases:
        for chosen in paths:
            error = None
            with forced_path(chosen):
                try:
                    problems = failures(*results(case, device))
                except Exception as e:
                    error, problems = e, [said(e)]
            yield case, chosen, problems
            if error is not None:
                check_alive(device)


# --- bench ------------------------------------------------------------------------------------------------------------


def known(device: torch.device) -> dict[str, str]:
    """The paths chosen so far."""
    return dispatch.known_paths(device.index).known() if dispatch.extension() is not None else {}


def bench(device: torch.device) -> Iterator[str]:
    """Lines of a table: bf16, fp32 adapters, r = 16, forward and forward + backward."""
    peak = peaks(torch.cuda.get_device_name(device))
    yield "  M x K x N             pass   F.linear   eager LoRA   lora_ops   path    of the roofline"
    for M, K, N in BENCH:
        x = torch.randn(M, K, device=device, dtype=_BF16)
        W, dy = torch.randn(N, K, device=device, dtype=_BF16), torch.randn(M, N, device=device, dtype=_BF16)
        A = torch.randn(16, K, device=device).requires_grad_()
        B = torch.randn(N, 16, device=device).requires_grad_()
        sides: dict[str, Callable[[Tensor], Tensor]] = {
            "F.linear": lambda x, W=W: F.linear(x, W),  # type: ignore[misc]
            "eager": lambda x, W=W, A=A, B=B: F.linear(x, W) + (F.linear(F.linear(x.float(), A), B) * 2.0).to(_BF16),  # type: ignore[misc]
            "lora_ops": lambda x, W=W, A=A, B=B: lora_linear(x, W, A, B, scaling=2.0),  # type: ignore[misc]
        }
        for backward in (False, True):
            times = {}
            for side, run in sides.items():

                def once(
                    run: Callable[[Tensor], Tensor] = run, x: Tensor = x, dy: Tensor = dy, backward: bool = backward
                ) -> None:
                    if backward:
                        run(x.detach().requires_grad_()).backward(dy)
                    else:
                        with torch.no_grad():
                            run(x)

                times[side] = path.cuda_clock(once, runs=20)
            share = ""
            if peak is not None:
                flops, size = 2.0 * M * K * N, 2.0 * (M * K + N * K + M * N)
                share = f"{(2 if backward else 1) * max(flops / peak[0], size / peak[1]) / times['lora_ops']:.0%}"
            chosen = {p for k, p in known(device).items() if f"M={path.bucket(M)} N={N} K={K} " in k}
            cells = "   ".join(f"{times[side] * 1e3:7.3f} ms" for side in sides)
            label = "f+b" if backward else "f  "
            yield f"  {f'{M} x {K} x {N}':20}  {label}  {cells}   {'/'.join(sorted(chosen)):12}  {share}"


# --- the report -------------------------------------------------------------------------------------------------------


def about() -> Iterator[str]:
    info = build_info()
    yield f"lora_ops {info['version']}, torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield f"CPU kernels: {info['isa']} (supported: {', '.join(info['isas_supported'])}), {info['compiler']}"
    if torch.version.cuda is None:
        yield "CUDA: this torch has none" + (", though the CUDA kernels are built" if info["cuda"] else "")
        return
    yield f"torch's CUDA: {torch.version.cuda}"
    if not info["cuda"]:
        yield "CUDA kernels: not built (LORA_OPS_CUDA=1 pip install . demands them)"
    elif dispatch.extension() is None:
        yield "CUDA kernels: built, but they do not load"
    else:
        version = dispatch.extension().driver_version()
        driver = f"a driver for CUDA {version // 1000}.{version % 1000 // 10}" if version else "no driver"
        yield f"CUDA kernels: {dispatch.extension().__file__}, {driver}"
    yield f"LORA_OPS_CUDA_PATH: {path.forced() or 'auto'}, choices are kept in {path.cache_file()}"


def examine(device: torch.device) -> int:
    """Prints what there is to say of a GPU, and returns how many checks failed."""
    wrong = 0
    paths = path.PATHS if dispatch.extension() is not None else ("auto",)
    try:
        for case, chosen, problems in self_test(device, CASES, paths):
            print(f"  {'WRONG' if problems else 'ok   '}  {chosen:5}  {case}")
            for problem in problems:
                print(f"         {problem}")
            wrong += bool(problems)
        for line in bench(device):
            print(line, flush=True)
    except GpuFailed:
        raise
    except Exception as e:  # of the bench
        wrong += 1
        print(f"  WRONG  the bench ends here: {said(e)}")
        check_alive(device)
    for key, chosen in sorted(known(device).items()):
        print(f"  path: {key}: {chosen}")
    return wrong


def main() -> int:
    """Prints the report. 1 if a check failed."""
    for line in about():
        print(line)
    if not torch.cuda.is_available():
        print("no GPU was found: CPU tensors run the CPU kernels, nothing was tested")
        return 0
    wrong = 0
    for i in range(torch.cuda.device_count()):
        device = torch.device("cuda", i)
        properties = torch.cuda.get_device_properties(device)
        print(f"\nGPU {i}: {properties.name}, sm_{properties.major}{properties.minor}, {properties.multi_processor_count} SMs")
        try:
            with torch.cuda.device(device):
                wrong += examine(device)
        except GpuFailed as e:
            print(f"\nGPU {i} FAILED, nothing more can be computed in this process: {e}")
            return 1
    print(f"\n{wrong} checks failed" if wrong else "\nall checks passed")
    return int(wrong > 0)
