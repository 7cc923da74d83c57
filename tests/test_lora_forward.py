"""y = x W0ᵀ + scaling · (x Aᵀ) Bᵀ + bias against fp64 and eager PyTorch (compare.py has the rule)."""

from dataclasses import replace

import pytest
import torch
from buffers import MARGIN, Poisoned, assert_nothing_behind_is_read, poisoned
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

import lora_ops
from lora_ops import _C, ops


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error(shape, dtypes):
    assert_within_bound(shape_errors(shape, dtypes, backward=False))


@every_dtype
def test_median_error(dtypes):
    assert_median((shape_errors(s, dtypes, backward=False) for s in SHAPES), ["y"])


@every_dtype
@few_shapes
def test_comparison_notices_a_lost_element(shape, dtypes):
    """The tolerance can fail: a kernel that drops its last k is out of bounds."""
    case = make_case(shape, dtypes)
    x, weight, lora_A = case.x.clone(), case.weight.clone(), case.lora_A.clone()
    x[:, -1] = weight[:, -1] = 0
    shortened = run(fused_lora, replace(case, x=x, weight=weight, lora_A=lora_A), backward=False)["y"]
    assert not error(shortened, run(eager_lora, case, backward=False)["y"], oracle(case, backward=False)["y"]).within_bound


@every_dtype
@few_shapes
def test_weight_that_is_a_transposed_view(shape, dtypes):
    assert_within_bound(shape_errors(shape, dtypes, backward=False, transposed=True))


@every_dtype
@pytest.mark.parametrize(
    "shape", [(1, 300, 33, 4), (12, 129, 65, 8), (13, 127, 31, 16), (41, 33, 129, 1), (50, 2048, 70, 4)], ids=str
)
def test_packed_weight(shape, dtypes):
    """Panels made beforehand keep the error within the bound."""
    case = make_case(shape, dtypes)
    panels = lora_ops.pack_weight(case.weight, case.x.dtype)

    def packed(x, case, lora_A, lora_B, bias):
        return lora_ops.lora_linear(x, case.weight, lora_A, lora_B, scaling=case.scaling, bias=bias, panels=panels)

    assert_within_bound(errors(case, backward=False, fused=packed))


@pytest.mark.parametrize("dtypes", [Dtypes(BF16, BF16), Dtypes(BF16, F32), Dtypes(F16, F32)], ids=str)
@pytest.mark.parametrize("shape", [(3, 129, 33, 4), (41, 127, 33, 16)], ids=str)
def test_fp32_weight_under_a_half_precision_x(shape, dtypes):
    """Autocast over an fp32 model: eager rounds the weight to x's dtype, the kernel takes it as it is."""
    case = make_case(shape, dtypes, bias=True)
    case = replace(case, weight=case.weight.float() * 1.001, bias=case.bias.float() * 1.001)

    def rounded(x, case, lora_A, lora_B, bias):
        return eager_lora(x, replace(case, weight=case.weight.to(x.dtype)), lora_A, lora_B, bias.to(x.dtype))

    e = error(
        run(fused_lora, case, backward=False)["y"],
        run(rounded, case, backward=False)["y"],
        oracle(case, backward=False)["y"],
    )
    assert_within_bound({"y": e})


def layouts(x):
    """x (M, K) as views that share no layout."""
    M, K = x.shape
    yield poisoned(x)  # rows with a stride
    yield torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
    yield x.T.contiguous().T
    yield x[:1].expand(M, K)
    yield x[:, :1].expand(M, K)


@every_dtype
@pytest.mark.parametrize("shape", [(3, 33, 17, 4), (41, 129, 33, 8)], ids=str)
def test_strided_x(shape, dtypes):
    """Views give the results of their contiguous copies, bit for bit."""
    case = make_case(shape, dtypes)
    for x in layouts(case.x):
        view, contiguous = replace(case, x=x), replace(case, x=x.contiguous())
        assert_same(
            run(fused_lora, view, backward=False), run(fused_lora, contiguous, backward=False), contiguous, backward=False
        )


@every_dtype
def test_leading_dimensions(dtypes):
    """Give the rows of the flattened matrix, bit for bit; a vector is one row."""
    case = make_case((24, 33, 17, 4), dtypes)
    y = run(fused_lora, case, backward=False)["y"]
    for x in (case.x.view(2, 3, 4, 33), case.x.view(4, 6, 33).transpose(0, 1), case.x.view(24, 1, 33)):
        actual = run(fused_lora, replace(case, x=x), backward=False)["y"]
        rows = run(fused_lora, replace(case, x=x.reshape(24, 33)), backward=False)["y"]
        assert actual.shape == (*x.shape[:-1], 17)
        assert torch.equal(actual.view(24, 17), rows)
    one = run(fused_lora, replace(case, x=case.x[5]), backward=False)["y"]
    assert one.shape == (17,)
    assert_within_bound({"y": error(one, y[5], oracle(case, backward=False)["y"][5])})


@pytest.mark.parametrize("shape", [(0, 5, 3, 2), (3, 0, 5, 2), (3, 5, 0, 2), (0, 0, 0, 1)], ids=str)
def test_dimensions_of_zero(shape):
    """Give eager's result exactly."""
    case = make_case(shape, Dtypes(F32, F32), bias=True)
    actual, eager = (run(f, case, backward=False)["y"] for f in (fused_lora, eager_lora))
    assert torch.equal(actual, eager)


@every_dtype
@pytest.mark.parametrize("shape", [*FEW, (14, 32, 32, 16), (40, 31, 33, 3), (42, 64, 31, 33), (57, 1, 1, 1)], ids=str)
def test_nothing_outside_the_buffers_is_used_or_written(shape, dtypes):
    """Inputs lie in NaN, and so do outputs: y is finite, and what surrounds it stays NaN."""
    M, K, N, r = shape
    case = make_case(shape, dtypes, bias=True)
    x, weight, transposed = poisoned(case.x), poisoned(case.weight), poisoned(case.weight.T).T
    lora_A, lora_B, bias = poisoned(case.lora_A), poisoned(case.lora_B), poisoned(case.bias[None])[0]
    for w in (weight, transposed):
        for dropout in ((0, 0, 1.0), (7, 30000, 2.0)):
            y, S = Poisoned(M, N, case.x.dtype), torch.full((M * r + 2 * MARGIN,), torch.nan)
            _C.lora_forward(
                M, K, N, r, *map(ops.matrix, (x, w)), 0, *map(ops.matrix, (lora_A, lora_B, bias)), case.scaling,
                *dropout, ops.matrix(y.inside), S[MARGIN:].data_ptr(), 1, None,
            )  # fmt: skip
            assert y.is_intact()
            assert S[MARGIN:-MARGIN].isfinite().all()
            assert S[:MARGIN].isnan().all() and S[-MARGIN:].isnan().all()


@every_dtype
@pytest.mark.parametrize("shape", [(1, 33, 17, 3), (13, 31, 33, 1), (41, 65, 31, 17), (45, 129, 15, 33)], ids=str)
def test_nothing_behind_the_buffers_is_read(shape, dtypes):
    assert_nothing_behind_is_read(make_case(shape, dtypes, bias=True, dropout_p=0.25), backward=False)


@every_dtype
@pytest.mark.parametrize("shape", [(3, 33, 17, 4), (41, 129, 33, 8)], ids=str)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_infinities_and_nan(value, shape, dtypes):
    """They go where eager's go: the rows of x that hold them, and no other."""
    case = make_case(shape, dtypes)
    x = case.x.clone()
    x[1, 0] = x[2, -1] = value
    y = run(fused_lora, replace(case, x=x), backward=False)["y"]
    assert not y[1:3].isfinite().any()
    assert y[0].isfinite().all() and y[3:].isfinite().all()
    assert_within_bound(errors(replace(case, x=x), backward=False))


@pytest.mark.parametrize("dtypes", [Dtypes(F32, F32), Dtypes(BF16, F32)], ids=str)
@pytest.mark.parametrize("shape", [(13, 700, 520, 8), (100, 300, 257, 16), (640, 5000, 33, 8)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_result_does_not_depend_on_the_threads(shape, dtypes, dropout_p):
    if ops.base_on_torch(dtypes.x):
        pytest.skip("torch's own products depend on the threads")
    case = make_case(shape, dtypes, dropout_p=dropout_p)
    ys = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        ys.append(run(fused_lora, case, backward=False)["y"])
    assert all(torch.equal(ys[0], y) for y in ys[1:])
