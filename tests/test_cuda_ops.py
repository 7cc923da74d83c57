"""The whole op on a device: lora_ops/cuda/ops.py and the bindings over the real launch code, by compare.py's policy."""

import importlib.machinery
import importlib.util

import pytest
import torch
from compare import BF16, F16, F32, Case, Dtypes, assert_within_bound, eager_lora, error, make_case, oracle
from compare import run as run_case
from four_bit import SETTINGS, exact_results, make_quantised_case
from ptx.build import GPU, REPOSITORY
from ptx.device import Device, Run
from torch import Tensor

from lora_ops import quantize_nf4, reference
from lora_ops.cuda import ops
from lora_ops.ops import matrix
from lora_ops.qlora_ops import weight_of
from lora_ops.quant import layout

pytestmark = pytest.mark.cuda

SM_COUNT = 4
DTYPES = [Dtypes(BF16, BF16), Dtypes(BF16, F32), Dtypes(F16, F32)]
SHAPES = [(1, 72, 40, 3), (70, 136, 72, 16), (33, 41, 35, 20)]


@pytest.fixture(scope="module")
def package(nvcc: str) -> Device:
    """The kernels and the extension's bindings."""
    cuda = REPOSITORY / "csrc" / "cuda"
    return Device([*sorted(cuda.glob("*.cu")), cuda / "bindings.cpp"])


def extension(package: Device, arch: int = 80):
    path = str(package.library_path(arch))
    loader = importlib.machinery.ExtensionFileLoader("_C_cuda", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C_cuda", loader, origin=path))
    loader.exec_module(module)
    return module


def registered(run: Run, case: Case) -> tuple[Tensor | None, ...]:
    """The op's inputs as the device has them, never written to."""
    tensors = (case.x, case.weight, case.lora_A, case.lora_B, case.bias, case.seed)
    return tuple(None if t is None else run.register(t.clone(), readonly=True) for t in tensors)


@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_forward_and_backward(package, dtypes, shape, dropout_p, split):
    case = make_case(shape, dtypes, bias=True, dropout_p=dropout_p)
    module = extension(package)
    with package.run() as run:
        target = ops.Target(module, SM_COUNT, 0)
        x, weight, A, B, bias, seed = registered(run, case)
        y, S = ops.forward(target, x, weight, A, B, bias, seed, case.scaling, dropout_p, split)
        dy = run.register(case.dy.clone(), readonly=True)
        gradients = ops.backward(target, dy, x, weight, A, B, S, seed, case.scaling, dropout_p, True, True, True, True, split)
    actual = {"y": y, **dict(zip(("dx", "dA", "dB", "dbias"), gradients, strict=True))}
    actual["dbias"] = actual["dbias"].to(case.x.dtype)  # fp32 until it is a gradient of bias
    for backward in (False, True):
        eager, exact = run_case(eager_lora, case, backward=backward), oracle(case, backward=backward)
        assert_within_bound({name: error(actual[name], eager[name], exact[name]) for name in eager})


@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
@pytest.mark.parametrize("shape", [(1, 128, 40, 3), (70, 256, 72, 16), (33, 192, 48, 20), (9, 65, 40, 4)], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_4bit_forward_and_backward(package, dtypes, shape, split):
    """Shapes that are decoded inside the product, and shapes that are decoded as a whole."""
    case = make_quantised_case(shape, dtypes, bias=True, dropout_p=0.3)
    module = extension(package)
    with package.run() as run:
        target = ops.Target(module, SM_COUNT, 0)
        x, _, A, B, bias, seed = registered(run, case)
        weight = weight_of(case.qweight)
        for t in weight[:5]:
            if t is not None:
                run.register(t, readonly=True)
        y, S = ops.forward(target, x, weight, A, B, bias, seed, case.scaling, case.dropout_p, split)
        dy = run.register(case.dy.clone(), readonly=True)
        settings = (case.scaling, case.dropout_p, True, True, True, True, split)
        gradients = ops.backward(target, dy, x, weight, A, B, S, seed, *settings)
    if not GPU:
        kernels = {name for c in run.counters for name in ("gemm_4bit", "dequantize") if name in c.entry}
        assert kernels == ({"dequantize"} if split or shape[1] % 128 else {"gemm_4bit"})
    actual = {"y": y, **dict(zip(("dx", "dA", "dB", "dbias"), gradients, strict=True))}
    actual["dbias"] = actual["dbias"].to(case.x.dtype)  # fp32 until it is a gradient of bias
    for backward in (False, True):
        eager, exact = run_case(eager_lora, case, backward=backward), exact_results(case, backward=backward)
        assert_within_bound({name: error(actual[name], eager[name], exact[name]) for name in eager})


@pytest.mark.parametrize("needed", range(16), ids=lambda n: f"{n:04b}")
def test_only_what_is_needed_is_computed(package, needed):
    """And is the same as with everything else, bit for bit."""
    case = make_case((20, 40, 24, 5), Dtypes(BF16, F32), bias=True, dropout_p=0.25)
    need = [bool(needed >> i & 1) for i in range(4)]
    module = extension(package)
    with package.run() as run:
        target = ops.Target(module, SM_COUNT, 0)
        x, weight, A, B, _, seed = registered(run, case)
        dy = run.register(case.dy.clone(), readonly=True)
        S = run.register(torch.randn(20, 5), readonly=True)
        rest = (case.scaling, case.dropout_p)
        full = ops.backward(target, dy, x, weight, A, B, S, seed, *rest, True, True, True, True, False)
        some = ops.backward(target, dy, x if need[1] else None, weight, A, B, S if need[2] else None, seed, *rest, *need, False)
    for wanted, one, all_of_them in zip(need, some, full, strict=True):
        assert torch.equal(one, all_of_them) if wanted else one is None


def test_transposed_and_fp32_weights_and_strided_x(package):
    """A view of stride (1, N), as Conv1D has; a weight that autocast left in fp32; rows with a stride; leading dimensions."""
    case = make_case((18, 48, 40, 4), Dtypes(BF16, BF16), bias=True)
    wide = torch.zeros(18, 64, dtype=BF16)
    wide[:, :48] = case.x
    module = extension(package)
    with package.run() as run:
        target = ops.Target(module, SM_COUNT, 0)
        x, weight, A, B, bias, _ = registered(run, case)
        run.register(wide)
        args = (A, B, bias, None, case.scaling, 0.0, False)
        y, _ = ops.forward(target, x, weight, *args)
        transposed, _ = ops.forward(target, x, weight.T.contiguous().T, *args)
        fp32, _ = ops.forward(target, x, weight.float(), *args)
        strided, _ = ops.forward(target, wide[:, :48].view(3, 6, 48), weight, *args)
    assert torch.equal(y, transposed) and torch.equal(y, fp32) and torch.equal(y, strided.view(18, 40))


def test_the_mask_is_the_references(package):
    """x = 1 and A = unit rows: S is the mask of the first columns."""
    M, K, p = 9, 300, 0.5
    seed = torch.tensor(1234567890123)
    module = extension(package)
    with package.run() as run:
        run.register(seed)
        x, A = torch.ones(M, K, dtype=BF16), torch.eye(100, K, dtype=BF16)
        weight, B = torch.zeros(8, K, dtype=BF16), torch.zeros(8, 100, dtype=BF16)
        _, S = ops.forward(ops.Target(module, SM_COUNT, 0), x, weight, A, B, None, seed, 1.0, p, False)
    assert torch.equal(S, 2.0 * reference.dropout_keep(seed, p, M, K)[:, :100])


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_quantize_and_dequantize_are_the_cpus_bit_for_bit(package, dtype):
    module = extension(package)
    for K, (blocksize, double_quant, quant_type) in zip((1, 65, 128, 300, 384, 31), SETTINGS, strict=True):
        weight = torch.randn(7, K).to(dtype)
        qweight = quantize_nf4(weight, blocksize, double_quant, quant_type)
        with package.run() as run:
            target = ops.Target(module, SM_COUNT, 0)
            for t in (weight, *weight_of(qweight)[:5]):
                if t is not None:
                    run.register(t, readonly=True)
            codes, absmax = ops.quantize(target, weight, blocksize, quant_type)
            actual = ops.dequantize(target, weight_of(qweight), K, dtype)
        assert torch.equal(actual, qweight.dequantize(dtype))
        assert torch.equal(codes, qweight.codes) and torch.equal(absmax, layout.quantize(weight, blocksize, quant_type)[1])


def test_what_a_launcher_refuses_is_an_error(package):
    module = extension(package)
    with package.run() as run:
        rows = run.register(torch.zeros(4, 4))
        matrix = (rows.data_ptr(), 4, 1, 0)
        with pytest.raises(ValueError, match="bf16 or fp16"):
            module.lora_forward(4, 4, 4, 4, matrix, matrix, matrix, None, matrix, rows.data_ptr(), 1.0, 0)


def test_what_has_a_kernel():
    weight = torch.zeros(3, 5)
    assert ops.has_kernel(torch.zeros(2, 5, dtype=BF16), weight) and ops.has_kernel(torch.zeros(5, dtype=F16), weight)
    for x in (torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.float64), torch.zeros(0, 5, dtype=BF16)):
        assert not ops.has_kernel(x, weight)
    assert not ops.has_kernel(torch.zeros(2, 5, dtype=BF16), torch.zeros(0, 5))


def test_general_forms(package):
    """Gates and scales of ones, layers in one launch, and segments that all have one adapter change nothing, bit for bit."""
    case = make_case((70, 128, 72, 8), Dtypes(BF16, BF16), bias=True, dropout_p=0.25)
    (M, K), N, r = case.x.shape, 72, 8
    module = extension(package)
    with package.run() as run:
        x, weight, A, B, bias, seed = registered(run, case)
        dy, scaling = run.register(case.dy.clone(), readonly=True), case.scaling
        mask, no_mask = (seed.data_ptr(), reference.dropout_threshold(0.25), 1 / 0.75), (0, 0, 1.0)
        S = [torch.empty(M, r) for _ in range(2)]
        y = [torch.empty(M, N, dtype=BF16) for _ in range(5)]
        dx = [torch.empty(M, K, dtype=BF16) for _ in range(4)]
        first_row = torch.tensor([0, 1, 1, 40, M], dtype=torch.int32)
        adapter = [A.data_ptr(), B.data_ptr(), r | int(torch.ones(()).view(torch.int32)) << 32]
        adapters = torch.tensor(adapter * 4)
        segments = (4, first_row.data_ptr(), adapters.data_ptr(), True)

        down = (M, K, r, matrix(x), matrix(A), mask)
        module.lora_down(*down, S[0].data_ptr(), 1, None, 0)  # one multiprocessor: no workspace
        module.lora_down_segments((*down, S[1].data_ptr(), 1), segments, None, 0)

        def forward(y, gate=None, m=None):
            return (M, K, N, r, *map(matrix, (x, weight, B, bias, y, S[0])), scaling, gate, m)

        plain = tuple(map(matrix, (x, weight, B, bias, y[0])))
        module.lora_forward(M, K, N, r, *plain, S[0].data_ptr(), scaling, 0)
        ones, m = torch.ones(r), torch.ones(1, N)
        module.lora_forward_group([forward(y[1], (ones.data_ptr(), 0, 1, 0)), forward(y[2], m=matrix(m))], 0)
        module.lora_forward_group([forward(y[3])], 0)
        module.lora_forward_segments(forward(y[4]), segments, 0)

        def backward(dx, dy, weight, mask):
            return (M, K, N, r, *map(matrix, (dy, weight, A)), dx, matrix(S[0]), mask, None)

        module.lora_backward_dx(M, K, N, r, *map(matrix, (dy, weight, A, dx[0])), S[0].data_ptr(), mask, 0)
        module.lora_backward_dx_segments(backward(matrix(dx[1]), dy, weight, mask), segments, 0)
        zeros = torch.zeros_like(dy)
        module.lora_backward_dx_group([backward(matrix(dx[2]), dy, weight, mask), backward(None, zeros, weight, no_mask)], 0)
        module.lora_backward_dx_group([backward(matrix(dx[3]), dy, weight, mask)], 0)
    for results in (S, y, dx):
        for other in results[1:]:
            assert torch.equal(results[0], other)
