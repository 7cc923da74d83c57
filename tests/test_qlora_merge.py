"""FusedLoraLinear with a weight in 4 bits: merging, within the format or to a dense weight, and what it refuses."""

import math

import bitsandbytes
import pytest
import torch
from compare import error
from quantised_layers import assert_same_weight, linear4bit, make_quantised_layer
from tiny_models import DTYPES, K, M, N, R, make_layer, make_x
from torch import nn

from lora_ops import FusedLoraLinear, quantize_nf4

# --- merging ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def exact_merged(layer):
    name = layer.active_adapter
    delta = layer.scaling[name] * (layer.lora_B[name].double() @ layer.lora_A[name].double())
    return layer.weight.dequantize(torch.float64) + delta


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"quant": "fp4", "blocksize": 128, "double_quant": False}], ids=str)
def test_merge_and_unmerge(dtype, options):
    """Merged, the weight is in the format that it was in, with the error that quantising costs; then the codes are back."""
    layer = make_quantised_layer(dtype, lora_alpha=20, **options)
    x = make_x(dtype)
    before, unmerged_y, exact = layer.weight.clone(), layer(x), exact_merged(layer)
    rounded = layer.weight.dequantize(torch.float32) + layer.delta_weight()

    layer.merge()
    assert layer.merged
    assert layer.merge_error == pytest.approx(
        ((layer.weight.dequantize(torch.float64) - exact).norm() / exact.norm()).item(), rel=1e-4
    )
    assert 0.05 < layer.merge_error < 0.2
    assert_same_weight(
        layer.weight, quantize_nf4(rounded, before.blocksize, before.nested_absmax is not None, before.quant_type)
    )
    assert layer.weight.dtype == dtype
    wide = nn.functional.linear(x.double(), layer.weight.dequantize(torch.float64), layer.bias.double())
    assert error(layer(x), nn.functional.linear(x, layer.weight.dequantize(dtype), layer.bias), wide).within_bound

    layer.unmerge()
    assert (layer.merged, layer.merge_error) == (False, None)
    assert_same_weight(layer.weight, before)
    assert torch.equal(layer(x), unmerged_y)


def test_merge_error_of_a_large_layer():
    """Within what NF4 in blocks of 64 costs a Gaussian weight, 0.092: an interval too narrow for one code too few."""
    linear = nn.Linear(512, 512, bias=False)
    nn.init.normal_(linear.weight, std=0.02)
    layer = FusedLoraLinear.from_linear(linear, 8, init_lora_weights=False, quant="nf4", lora_alpha=16)
    layer.merge()
    assert 0.090 < layer.merge_error < 0.094


@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_merge_to_a_dense_weight(to):
    """Rounded once: no further from the exact one than that; and back to the codes."""
    layer = make_quantised_layer(lora_alpha=20)
    x, before, exact = make_x(to), layer.weight.clone(), exact_merged(layer)
    layer.merge(to=to)
    assert layer.merged
    assert layer.merge_error is None
    assert isinstance(layer.weight, nn.Parameter)
    assert not layer.weight.requires_grad
    assert layer.weight.dtype == to
    rounding = torch.finfo(to).eps / 2 * exact.abs() + 1e-6  # the sum itself is in fp32
    assert ((layer.weight.double() - exact).abs() <= rounding).all()
    assert sorted(layer.state_dict()) == ["bias", "lora_A.default", "lora_B.default", "weight"]
    layer.bias.data = layer.bias.data.to(to)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer.unmerge()
    assert_same_weight(layer.weight, before)
    assert "weight" not in dict(layer.named_parameters())


def test_dense_layers_merge_to_another_dtype_too():
    layer = make_layer(torch.float32)
    W0 = layer.weight
    layer.merge(to=torch.bfloat16)
    assert torch.equal(layer.weight, (W0 + layer.delta_weight()).bfloat16())
    assert layer.merge_error is None
    layer.unmerge()
    assert layer.weight is W0


def test_merged_layers_draw_no_dropout_and_give_no_gradient_to_the_adapter():
    layer = make_quantised_layer(lora_dropout=0.5)
    layer.merge()
    x, before = make_x().requires_grad_(), torch.get_rng_state()
    layer(x).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert layer.lora_A["default"].grad is layer.lora_B["default"].grad is None
    exact = layer.weight.dequantize(torch.float64).sum(0).expand(M, K)
    eager = torch.ones_like(layer(x)) @ layer.weight.dequantize(x.dtype)
    measured = error(x.grad, eager, exact)
    assert measured.within_bound, measured


def test_merged_layer_moves_with_both_weights():
    layer = make_quantised_layer()
    before = layer.weight.clone()
    layer.merge()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    layer.unmerge()
    assert_same_weight(layer.weight, before)
    assert layer.weight.dtype == torch.bfloat16


def test_a_zero_weight_merges_without_error():
    linear = nn.Linear(K, N)
    nn.init.zeros_(linear.weight)
    layer = FusedLoraLinear.from_linear(linear, R, quant="nf4")
    layer.merge()
    assert layer.merge_error == 0.0


@pytest.mark.parametrize(("to", "at"), [(None, 3e38), (torch.float16, 1e6)])
def test_a_merged_weight_must_be_finite(to, at):
    layer = make_quantised_layer()
    before = layer.weight.clone()
    with torch.no_grad():
        layer.lora_B["default"][3, 0] = at
        layer.lora_A["default"][0] = 1
    with pytest.raises(ValueError, match="not finite; nothing was changed"):
        layer.merge(to=to)
    assert not layer.merged
    assert_same_weight(layer.weight, before)


def test_merge_refuses():
    layer = make_quantised_layer()
    with pytest.raises(TypeError, match=r"to must be float32, bfloat16, float16, float64 or None, got torch.int8"):
        layer.merge(to=torch.int8)
    layer.merge()
    with pytest.raises(RuntimeError, match='adapter "default" is merged already'):
        layer.merge()
    layer.unmerge()
    with pytest.raises(RuntimeError, match="nothing is merged"):
        layer.unmerge()


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("linear", "options", "kind", "message"),
    [
        (None, {"quant": "int4"}, ValueError, 'quant must be "nf4", "fp4" or None, got \'int4\''),
        (None, {"quant": True}, ValueError, 'quant must be "nf4", "fp4" or None, got True'),
        (None, {"quant": "nf4", "blocksize": 48}, ValueError, "blocksize must be one of 32, .* got 48"),
        (None, {"quant": "nf4", "prepack": True}, ValueError, "prepack must be False for a weight in 4 bits"),
        (linear4bit, {"prepack": True}, ValueError, "prepack must be False for a weight in 4 bits"),
        (linear4bit, {"quant": "fp4"}, ValueError, "quant must be None or the layer's own 'nf4'.* got 'fp4'"),
        (lambda: nn.Linear(K, N, dtype=torch.float64), {"quant": "nf4"}, TypeError, "float16, got torch.float64"),
        (lambda: bitsandbytes.nn.Linear4bit(K, N), {}, TypeError, "Linear4bit that is quantised, got Linear4bit"),
        (lambda: bitsandbytes.nn.Linear8bitLt(K, N), {"quant": "nf4"}, TypeError, "got Linear8bitLt"),
    ],
)
def test_bad_arguments(linear, options, kind, message):
    linear = linear() if linear else nn.Linear(K, N)
    frozen = [p.requires_grad for p in linear.parameters()]
    with pytest.raises(kind, match=message):
        FusedLoraLinear.from_linear(linear, **options)
    assert [p.requires_grad for p in linear.parameters()] == frozen


def test_weights_that_are_not_finite():
    linear = nn.Linear(K, N)
    linear.weight.data[2, 3] = math.inf
    with pytest.raises(ValueError, match=r"weight must be finite, got inf at \(2, 3\)"):
        FusedLoraLinear.from_linear(linear, quant="nf4")
    assert linear.weight.requires_grad and linear.bias.requires_grad


def test_a_linear4bit_that_bitsandbytes_repacked():
    linear = linear4bit(torch.bfloat16)
    linear.weight.quant_state.packing_format_for_cpu = True  # as a forward pass in eval mode leaves it, where AVX-512 has bf16
    with pytest.raises(ValueError, match="packing_format_for_cpu"):
        FusedLoraLinear.from_linear(linear)
