"""qlora_linear's numbers against fp64 and against what a user of bitsandbytes and PEFT runs (four_bit.py, compare.py)."""

import math
from dataclasses import replace

import bitsandbytes
import pytest
import torch
from buffers import guarded
from compare import BF16, F16, F32, Dtypes, assert_median, assert_within_bound, eager_lora, error, every_dtype, run
from four_bit import (
    FEW_4BIT,
    SETTINGS,
    SHAPES_4BIT,
    errors_4bit,
    exact_results,
    fused_qlora,
    make_quantised_case,
    shape_errors_4bit,
)

from lora_ops import NF4Weight, ops, qlora_linear, qlora_ops, quantize_nf4

few_shapes = pytest.mark.parametrize("shape", FEW_4BIT, ids=str)
both_ways = pytest.mark.parametrize("backward", [False, True])


@both_ways
@every_dtype
@pytest.mark.parametrize("shape", SHAPES_4BIT, ids=str)
def test_error(shape, dtypes, backward):
    assert_within_bound(shape_errors_4bit(shape, dtypes, backward=backward))


@every_dtype
def test_median_error(dtypes):
    for names, backward in ((["y"], False), (["dx", "dA", "dB"], True)):
        assert_median((shape_errors_4bit(s, dtypes, backward=backward) for s in SHAPES_4BIT), names)


@both_ways
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@few_shapes
def test_every_kind_of_block_and_code(shape, settings, backward):
    assert_within_bound(errors_4bit(make_quantised_case(shape, Dtypes(BF16, F32), settings), backward=backward))


@both_ways
@every_dtype
@pytest.mark.parametrize("shape", FEW_4BIT[1:], ids=str)
def test_dropout(shape, dtypes, backward):
    assert_within_bound(shape_errors_4bit(shape, dtypes, backward=backward, dropout_p=0.4))


@every_dtype
@few_shapes
def test_comparison_notices_a_lost_element(shape, dtypes):
    """The tolerance can fail: a kernel that drops its last k, or dx without the last n, is out of bounds."""
    case = make_quantised_case(shape, dtypes)
    x, dy = case.x.clone(), case.dy.clone()
    x[:, -1] = dy[:, -1] = 0
    for name, backward, lost in (("y", False, replace(case, x=x)), ("dx", True, replace(case, dy=dy))):
        shortened = run(fused_qlora, lost, backward=backward)[name]
        eager, exact = run(eager_lora, case, backward=backward)[name], exact_results(case, backward=backward)[name]
        assert not error(shortened, eager, exact).within_bound, name


@pytest.mark.parametrize("settings", [(64, True, "nf4"), (32, True, "fp4"), (64, False, "nf4"), (1024, True, "nf4")], ids=str)
@pytest.mark.parametrize("M", [1, 3, 24])
def test_few_rows_over_long_ones(M, settings):
    """Rows longer than what scales are computed for at a time, with short tails, across groups of nested scales."""
    for K in (4128, 4288):
        case = make_quantised_case((M, K, 36, 8), Dtypes(BF16, F32), settings)
        assert_within_bound(errors_4bit(case, backward=False))


@pytest.mark.parametrize("place", ["absmax", "nested_absmax", "offset"])
def test_comparison_notices_a_wrong_scale(place):
    """A single block's, a group's of 256, or their mean: out of bounds."""
    case = make_quantised_case((41, 191, 33, 8), Dtypes(BF16, F32), (64, True, "nf4"))
    wrong = getattr(case.qweight, place).clone()
    wrong.view(-1)[-1] = 0
    lost = replace(case, qweight=replace(case.qweight, **{place: wrong}))
    eager, exact = run(eager_lora, case, backward=False)["y"], exact_results(case, backward=False)["y"]
    assert not error(run(fused_qlora, lost, backward=False)["y"], eager, exact).within_bound


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_is_no_less_exact_than_bitsandbytes_itself(dtype, double_quant):
    """Its Linear4bit, run, in place of four_bit.py's eager. K is a multiple of the block: elsewhere its CPU code errs."""
    case = make_quantised_case((41, 192, 64, 8), Dtypes(dtype, F32), (64, double_quant, "nf4"), bias=True)
    linear = bitsandbytes.nn.Linear4bit(192, 64, quant_type="nf4", compute_dtype=dtype)
    state = case.qweight.to_bitsandbytes()
    stats = {key.removeprefix("weight."): t for key, t in state.items() if key != "weight"}
    linear.weight = bitsandbytes.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu", module=linear)
    linear.bias = torch.nn.Parameter(case.bias, requires_grad=False)

    def peft_over_bitsandbytes(x, case, lora_A, lora_B, bias):
        """PEFT's `lora.Linear4bit.forward`: the adapter's term is rounded by itself."""
        result = linear.train()(x)
        return result + ((x.to(lora_A.dtype) @ lora_A.T @ lora_B.T) * case.scaling).to(result.dtype)

    for backward in (False, True):
        if backward:
            linear.bias = None  # its gradient is not asked for
            case = replace(case, bias=None)
        actual, eager = (run(f, case, backward=backward) for f in (fused_qlora, peft_over_bitsandbytes))
        exact = exact_results(case, backward=backward)
        assert_within_bound({name: error(actual[name], eager[name], exact[name]) for name in actual})


@every_dtype
@pytest.mark.parametrize("shape", [(3, 65, 17, 4), (41, 192, 33, 8)], ids=str)
def test_strided_x(shape, dtypes):
    """Views give the results of their contiguous copies, bit for bit."""
    case = make_quantised_case(shape, dtypes)
    M, K = case.x.shape
    column_stride_2 = torch.stack([case.x, torch.full_like(case.x, torch.nan)], dim=-1)[..., 0]
    for x in (column_stride_2, case.x.T.contiguous().T, case.x[:1].expand(M, K), case.x[:, :1].expand(M, K)):
        actual, contiguous = (run(fused_qlora, replace(case, x=t), backward=False)["y"] for t in (x, x.contiguous()))
        assert torch.equal(actual, contiguous)


@every_dtype
def test_leading_dimensions(dtypes):
    """Give the rows of the flattened matrix, bit for bit; a vector is one row; no row gives none."""
    case = make_quantised_case((24, 96, 17, 4), dtypes)
    y = run(fused_qlora, case, backward=False)["y"]
    actual = run(fused_qlora, replace(case, x=case.x.view(2, 3, 4, 96)), backward=False)["y"]
    assert actual.shape == (2, 3, 4, 17)
    assert torch.equal(actual.view(24, 17), y)
    one = run(fused_qlora, replace(case, x=case.x[5]), backward=False)["y"]
    assert_within_bound({"y": error(one, y[5], exact_results(case, backward=False)["y"][5])})
    assert run(fused_qlora, replace(case, x=case.x[:0]), backward=False)["y"].shape == (0, 17)


def guarded_weight(weight):
    return NF4Weight(**{name: guarded(t) if isinstance(t, torch.Tensor) else t for name, t in vars(weight).items()})


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(1, 33, 17, 3), (3, 65, 31, 4), (7, 200, 33, 1), (41, 128, 31, 17)], ids=str)
def test_nothing_behind_the_weight_is_read(shape, double_quant):
    """Codes and scales end where memory does."""
    case = make_quantised_case(shape, Dtypes(BF16, F32), (32, double_quant, "nf4"))
    guards = replace(case, qweight=guarded_weight(case.qweight))
    for backward in (False, True):
        expected, actual = (run(fused_qlora, c, backward=backward) for c in (case, guards))
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
def test_infinities_and_nan(value):
    """They stay in the rows of x that hold them."""
    for dtypes, M in ((Dtypes(F32, F32), 3), (Dtypes(BF16, F32), 3), (Dtypes(BF16, BF16), 41), (Dtypes(F16, F32), 41)):
        case = make_quantised_case((M, 192, 33, 4), dtypes)
        x = case.x.clone()
        x[1, -1] = value
        y = run(fused_qlora, replace(case, x=x), backward=False)["y"]
        assert not y[1].isfinite().any()
        assert y[0].isfinite().all() and y[2:].isfinite().all()


@pytest.mark.parametrize("dtypes", [Dtypes(F32, F32), Dtypes(BF16, F32)], ids=str)
@pytest.mark.parametrize("shape", [(1, 576, 520, 8), (13, 704, 520, 8), (100, 300, 257, 16)], ids=str)
def test_result_does_not_depend_on_the_threads(shape, dtypes):
    if ops.base_on_torch(dtypes.x):
        pytest.skip("torch's own products depend on the threads")
    case = make_quantised_case(shape, dtypes, dropout_p=0.3)
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append([*run(fused_qlora, case, backward=False).values(), *run(fused_qlora, case, backward=True).values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("K", [64, 192, 385, 1000])
def test_pieces_of_the_weight(K, monkeypatch):
    """Where torch multiplies: rows from every piece, whatever its size, and none of them large."""
    monkeypatch.setattr(qlora_ops, "_PIECE", 1 << 14)
    for settings in SETTINGS:
        qweight = quantize_nf4(torch.randn(300, K), *settings)
        weight, seen = qlora_ops.weight_of(qweight), torch.zeros(300, K)
        for n, piece in weight.pieces(K, F32):
            seen[n] += piece
            assert piece.nbytes <= max(1 << 14, 4 * math.lcm(K, settings[0]))
        assert torch.equal(seen, qweight.dequantize(F32))


def test_bitsandbytes_weight_has_the_same_result():
    """However the weight came: made here, or read from bitsandbytes."""
    case = make_quantised_case((5, 192, 48, 4), Dtypes(BF16, F32), (64, True, "nf4"))
    again = NF4Weight.from_bitsandbytes(case.qweight.to_bitsandbytes("layer."), "layer.")
    args = (case.lora_A, case.lora_B)
    assert torch.equal(qlora_linear(case.x, again, *args, scaling=1.0), qlora_linear(case.x, case.qweight, *args, scaling=1.0))
