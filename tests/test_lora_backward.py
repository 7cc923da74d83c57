"""dx, dA, dB and dbias against fp64 and eager PyTorch's autograd (compare.py has the rule)."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from buffers import Poisoned, assert_nothing_behind_is_read, poisoned
from compare import (
    BF16,
    F16,
    F32,
    FEW,
    SHAPES,
    Dtypes,
    assert_median,
    assert_same,
    assert_within_bound,
    eager_lora,
    error,
    errors,
    every_dtype,
    few_shapes,
    fused_lora,
    make_case,
    oracle,
    run,
    shape_errors,
)  # fmt: skip

from lora_ops import _C, ops


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@few_shapes
def test_oracle_is_the_derivative_of_eager(shape, dropout_p):
    """The oracle's formulas against autograd, both in fp64."""
    case = make_case(shape, Dtypes(torch.float64, torch.float64), bias=True, dropout_p=dropout_p)
    for name, grad in run(eager_lora, case, backward=True).items():
        torch.testing.assert_close(oracle(case, backward=True)[name], grad, rtol=1e-12, atol=1e-12)


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error(shape, dtypes):
    assert_within_bound(shape_errors(shape, dtypes, backward=True))


@every_dtype
def test_median_error(dtypes):
    assert_median((shape_errors(s, dtypes, backward=True) for s in SHAPES), ["dx", "dA", "dB"])


@every_dtype
@few_shapes
def test_comparison_notices_a_lost_element(shape, dtypes):
    """The tolerance can fail: dx without the last n, dA, dB and dbias without the last row are out of bounds."""
    case = make_case(shape, dtypes, bias=True)
    eager, exact = run(eager_lora, case, backward=True), oracle(case, backward=True)
    no_column, no_row = case.dy.clone(), case.dy.clone()
    no_column[:, -1] = no_row[-1] = 0
    for names, dy in ((["dx"], no_column), (["dA", "dB", "dbias"], no_row)):
        shortened = run(fused_lora, replace(case, dy=dy), backward=True)
        for name in names:
            assert not error(shortened[name], eager[name], exact[name]).within_bound, name


@every_dtype
@few_shapes
def test_weight_that_is_a_transposed_view(shape, dtypes):
    assert_within_bound(shape_errors(shape, dtypes, backward=True, transposed=True))


@pytest.mark.parametrize("dtypes", [Dtypes(BF16, BF16), Dtypes(BF16, F32), Dtypes(F16, F32)], ids=str)
@pytest.mark.parametrize("shape", [(3, 129, 33, 4), (41, 127, 33, 16)], ids=str)
def test_fp32_weight_under_a_half_precision_x(shape, dtypes):
    """Autocast over an fp32 model: eager rounds the weight to x's dtype, the kernel takes it as it is."""
    case = make_case(shape, dtypes, bias=True)
    case = replace(case, weight=case.weight.float() * 1.001)
    actual = run(fused_lora, case, backward=True)
    eager = run(eager_lora, replace(case, weight=case.weight.to(case.x.dtype)), backward=True)
    exact = oracle(case, backward=True)
    assert_within_bound({name: error(actual[name], eager[name], exact[name]) for name in actual})


@every_dtype
def test_strided_x_and_dy(dtypes):
    """Views give the gradients of their contiguous copies, bit for bit."""
    case = make_case((41, 33, 65, 8), dtypes, bias=True)
    views = (
        poisoned,  # rows with a stride
        lambda t: torch.stack([t, torch.full_like(t, torch.nan)], dim=-1)[..., 0],
        lambda t: t.T.contiguous().T,
        lambda t: t[:1].expand(t.shape),
        lambda t: t[:1, :1].expand(t.shape),
    )
    for view in views:
        x, dy = view(case.x), view(case.dy)
        contiguous = replace(case, x=x.contiguous(), dy=dy.contiguous())
        actual = run(fused_lora, replace(case, x=x, dy=dy), backward=True)
        assert_same(actual, run(fused_lora, contiguous, backward=True), contiguous, backward=True)


@every_dtype
def test_leading_dimensions(dtypes):
    """Give the gradients of the flattened matrices, bit for bit; a vector is one row."""
    case = make_case((24, 33, 17, 4), dtypes, bias=True)
    flat = run(fused_lora, case, backward=True)
    for lead in ((2, 3, 4), (24, 1)):
        shaped = replace(case, x=case.x.view(*lead, 33), dy=case.dy.view(*lead, 17))
        actual = run(fused_lora, shaped, backward=True)
        assert actual["dx"].shape == (*lead, 33)
        for name in actual:
            assert torch.equal(actual[name].reshape(flat[name].shape), flat[name]), name
    vector = replace(case, x=case.x[0], dy=case.dy[0])
    row = replace(case, x=case.x[:1], dy=case.dy[:1])
    one, expected = run(fused_lora, vector, backward=True), run(fused_lora, row, backward=True)
    assert one["dx"].shape == (33,)
    assert all(torch.equal(one[name].reshape(expected[name].shape), expected[name]) for name in one)


@pytest.mark.parametrize("shape", [(0, 5, 3, 2), (3, 0, 5, 2), (3, 5, 0, 2), (0, 0, 0, 1)], ids=str)
def test_dimensions_of_zero(shape):
    """Give eager's gradients exactly."""
    case = make_case(shape, Dtypes(F32, F32), bias=True)
    run(fused_lora, make_case((41, 33, 17, 4), Dtypes(F32, F32)), backward=True)  # kernels' memory is not zero by chance
    actual, eager = run(fused_lora, case, backward=True), run(eager_lora, case, backward=True)
    for name in eager:
        assert torch.equal(actual[name], eager[name]), name


@every_dtype
@pytest.mark.parametrize("shape", [*FEW, (14, 32, 32, 16), (40, 31, 33, 3), (42, 64, 31, 33), (57, 1, 1, 1)], ids=str)
def test_nothing_outside_the_buffers_is_used_or_written(shape, dtypes):
    """Inputs lie in NaN, and so do outputs: gradients are finite, and what surrounds them stays NaN."""
    M, K, N, r = shape
    case = make_case(shape, dtypes, bias=True)
    dy, x, lora_A, lora_B = (poisoned(t) for t in (case.dy, case.x, case.lora_A, case.lora_B))
    S = (case.x.float() @ case.lora_A.float().T).contiguous()
    for weight in (poisoned(case.weight), poisoned(case.weight.T).T):
        for dropout in ((0, 0, 1.0), (7, 30000, 2.0)):
            dx, dA = Poisoned(M, K, case.x.dtype), Poisoned(r, K, case.lora_A.dtype)
            dB, dbias = Poisoned(N, r, case.lora_B.dtype), Poisoned(1, N, case.x.dtype)
            _C.lora_backward(
                M, K, N, r, *map(ops.matrix, (dy, x, weight, lora_A, lora_B)), S.data_ptr(), case.scaling, *dropout,
                *map(ops.matrix, (dx.inside, dA.inside, dB.inside, dbias.inside[0])), 1, None,
            )  # fmt: skip
            for name, buffer in {"dx": dx, "dA": dA, "dB": dB, "dbias": dbias}.items():
                assert buffer.is_intact(), name


@every_dtype
@pytest.mark.parametrize("shape", [(1, 33, 17, 3), (13, 31, 33, 1), (41, 65, 31, 17), (45, 129, 15, 33)], ids=str)
def test_nothing_behind_the_buffers_is_read(shape, dtypes):
    assert_nothing_behind_is_read(make_case(shape, dtypes, bias=True, dropout_p=0.25), backward=True)


@every_dtype
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_infinities_and_nan(value, dtypes):
    """An x that is not finite spoils its columns of dA and all of dB; a dy that is not, its row of dx."""
    case = make_case((41, 129, 33, 8), dtypes, bias=True)
    x, dy = case.x.clone(), case.dy.clone()
    x[1, 0] = x[2, -1] = value
    assert_within_bound(errors(replace(case, x=x), backward=True))
    dA = run(fused_lora, replace(case, x=x), backward=True)["dA"]
    assert dA[:, 1:-1].isfinite().all() and not dA[:, [0, -1]].isfinite().any()
    dy[3, 5] = value
    dx = run(fused_lora, replace(case, dy=dy), backward=True)["dx"]
    assert dx[:3].isfinite().all() and dx[4:].isfinite().all() and not dx[3].isfinite().any()
    assert_within_bound(errors(replace(case, dy=dy), backward=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", [Dtypes(F32, F32), Dtypes(BF16, BF16), Dtypes(F16, F32)], ids=str)
def test_only_what_requires_grad_is_computed(dtypes, dropout_p):
    """Every subset of {x, A, B, bias}: its gradients are the full set's, bit for bit, and there are no others."""
    case = make_case((41, 33, 65, 8), dtypes, bias=True, dropout_p=dropout_p)
    full = run(fused_lora, case, backward=True)
    inputs = {"dx": case.x, "dA": case.lora_A, "dB": case.lora_B, "dbias": case.bias}
    for subset in product((False, True), repeat=4):
        if not any(subset):
            continue
        leaves = [t.detach().requires_grad_(need) for t, need in zip(inputs.values(), subset, strict=True)]
        x, lora_A, lora_B, bias = leaves
        fused_lora(x, case, lora_A, lora_B, bias).backward(case.dy)
        for name, leaf, need in zip(inputs, leaves, subset, strict=True):
            assert torch.equal(leaf.grad, full[name]) if need else leaf.grad is None, (subset, name)


def test_operator_returns_empty_tensors_for_what_is_not_needed():
    case = make_case((41, 33, 65, 8), Dtypes(F32, F32))
    S = case.x @ case.lora_A.T
    for need in product((False, True), repeat=4):
        grads = torch.ops.lora_ops.lora_backward(
            case.dy, case.x if need[1] else None, case.weight, case.lora_A, case.lora_B, S if need[2] else None, None,
            case.scaling, 0.0, *need,
        )  # fmt: skip
        shapes = [(41, 33), (8, 33), (65, 8), (65,)]
        assert [g.shape for g in grads] == [torch.Size(s if n else (0,)) for s, n in zip(shapes, need, strict=True)]


def test_no_gradient_runs_no_backward():
    case = make_case((3, 33, 17, 4), Dtypes(F32, F32))
    assert not fused_lora(case.x, case, case.lora_A, case.lora_B, case.bias).requires_grad


@pytest.mark.parametrize("dtypes", [Dtypes(F32, F32), Dtypes(BF16, F32)], ids=str)
@pytest.mark.parametrize("shape", [(13, 700, 520, 8), (100, 300, 257, 16), (640, 33, 5000, 8)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_result_does_not_depend_on_the_threads(shape, dtypes, dropout_p):
    if ops.base_on_torch(dtypes.x):
        pytest.skip("torch's own products depend on the threads")
    case = make_case(shape, dtypes, bias=True, dropout_p=dropout_p)
    runs = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        runs.append(run(fused_lora, case, backward=True))
    for name in runs[0]:
        assert all(torch.equal(runs[0][name], other[name]) for other in runs[1:]), name
