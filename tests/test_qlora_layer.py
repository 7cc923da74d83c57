"""FusedLoraLinear with a weight in 4 bits: state, copies, dtypes, merging, what it refuses. test_qlora_linear.py has the numbers."""

import copy
import math

import bitsandbytes
import pytest
import torch
from compare import error
from safetensors.torch import load_file, save_file
from tiny_models import DUPLICATES, K, M, N, R, conv1d, eager, make_layer, make_x
from torch import nn

from lora_ops import FusedLoraLinear, NF4Weight, quantize_nf4

TENSORS = ["codes", "absmax", "nested_absmax", "nested_code", "offset"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_quantised_layer(dtype=torch.float32, linear=None, quant="nf4", **options):
    return make_layer(dtype, linear, quant=quant, **options)


def linear4bit(dtype=torch.float32, quant_type="nf4", **options):
    linear = bitsandbytes.nn.Linear4bit(K, N, quant_type=quant_type, compute_dtype=dtype, **options)
    linear.weight.data = torch.randn(N, K).to(dtype)
    linear.bias.data = linear.bias.data.to(dtype)
    return linear.to("cpu")  # quantises


def assert_same_weight(a, b):
    assert isinstance(a, NF4Weight) and isinstance(b, NF4Weight)
    for name in TENSORS:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None and y is None) or (x.dtype == y.dtype and torch.equal(x, y)), name
    assert (a.shape, a.blocksize, a.quant_type) == (b.shape, b.blocksize, b.quant_type)


def dense(layer, dtype):
    """The layer with its weight as a parameter: what bitsandbytes would multiply by, or in float64 the exact one."""
    other = copy.deepcopy(layer)
    weight = other.weight.dequantize(dtype)
    other.weight = nn.Parameter(weight, requires_grad=False)
    return other.double() if dtype == torch.float64 else other


def assert_computes(layer, x):
    """As near to fp64 as PEFT's arithmetic over the dequantised weight."""
    exact = eager(dense(layer, torch.float64), x.double())
    measured = error(layer(x), eager(dense(layer, x.dtype), x), exact)
    assert measured.within_bound, measured


# --- what it is made of -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [lambda dtype: nn.Linear(K, N, dtype=dtype), conv1d], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize(
    "options", [{}, {"quant": "fp4"}, {"blocksize": 128}, {"double_quant": False}, {"quant": "fp4", "blocksize": 32}], ids=str
)
def test_quantises_a_layer(make, dtype, options):
    """The weight that quantize_nf4 makes of the layer's; the layer keeps its own."""
    base = make(dtype)
    weight = base.weight if isinstance(base, nn.Linear) else base.weight.T
    layer = make_quantised_layer(dtype, base, **options)
    expected = quantize_nf4(
        weight, options.get("blocksize", 64), options.get("double_quant", True), options.get("quant", "nf4")
    )
    assert_same_weight(layer.weight, expected)
    assert layer.weight.dtype == dtype
    assert base.weight.requires_grad
    assert layer.bias is base.bias
    assert not layer.bias.requires_grad
    assert set(dict(layer.named_parameters())) == {"bias", "lora_A.default", "lora_B.default"}
    assert layer.lora_A["default"].dtype == torch.float32
    assert_computes(layer, make_x(dtype))


@pytest.mark.parametrize("quant", [None, "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_takes_over_a_linear4bit(double_quant, storage, quant):
    """Its codes and scales, bit for bit, and computes what its dequantised weight does; it stays as it is."""
    linear = linear4bit(torch.bfloat16, quant or "nf4", compress_statistics=double_quant, quant_storage=storage)
    before = {key: t.clone() for key, t in linear.state_dict().items()}
    layer = make_quantised_layer(linear=linear, quant=quant)
    state = layer.state_dict()
    assert set(state) == set(before) | {"lora_A.default", "lora_B.default"}
    for key, t in before.items():
        for same in (state[key], linear.state_dict()[key]):
            assert torch.equal(same.contiguous().view(-1).view(torch.uint8), t.contiguous().view(-1).view(torch.uint8)), key
    assert_computes(layer, make_x(torch.bfloat16))


def test_keeps_the_mode():
    assert make_quantised_layer(linear=linear4bit().eval()).training is False
    assert make_quantised_layer(linear=nn.Linear(K, N)).training is True


def test_trains_the_adapter_alone():
    layer = make_quantised_layer()
    x = make_x().requires_grad_()
    layer(x).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_A.default", "lora_B.default"}
    assert torch.equal(x.grad, torch.autograd.grad(layer(x).sum(), x)[0])


def test_dropout_acts_in_training_alone():
    layer = make_quantised_layer(lora_dropout=0.5)
    x = make_x()
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), y)
    assert not torch.equal(layer.eval()(x), y)
    assert_computes(layer, x)


def test_compile_and_export():
    layer = make_quantised_layer(lora_dropout=0.3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, results = make_x(), []
    for module in (layer, compiled):
        layer.zero_grad()
        torch.manual_seed(1)
        y = module(x)
        y.square().sum().backward()
        results.append([y.detach(), layer.lora_A["default"].grad, layer.lora_B["default"].grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    torch.compiler.reset()

    program = torch.export.export(layer.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    assert torch.equal(program.module()(x[:7]), layer(x[:7]))
    assert "lora_ops.qlora_forward" in program.graph_module.code


# --- state dict -------------------------------------------------------------------------------------------------------

STATE = "weight.quant_state.bitsandbytes__nf4"
NESTED = ["weight.nested_absmax", "weight.nested_quant_map"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
def test_state_dict(bias, double_quant, tmp_path):
    """Has bitsandbytes' keys, goes through safetensors, and whatever layer loads it computes the same."""
    layer = make_quantised_layer(linear=nn.Linear(K, N, bias=bias), double_quant=double_quant)
    state = layer.state_dict()
    keys = ["weight", "weight.absmax", "weight.quant_map", STATE, "lora_A.default", "lora_B.default"]
    assert sorted(state) == sorted([*keys, *(NESTED if double_quant else []), *(["bias"] if bias else [])])
    save_file(state, tmp_path / "layer.safetensors")
    x = make_x()
    for loaded in (state, load_file(tmp_path / "layer.safetensors")):
        for options in ({"quant": "nf4"}, {"quant": "fp4", "blocksize": 256, "double_quant": not double_quant}):
            other = make_quantised_layer(linear=nn.Linear(K, N, bias=bias), **options)
            other.load_state_dict(loaded)
            assert_same_weight(other.weight, layer.weight)
            assert torch.equal(other(x), layer(x))


def test_bitsandbytes_loads_the_state_dict():
    layer = make_quantised_layer(torch.bfloat16)
    state = layer.state_dict()
    stats = {key.removeprefix("weight."): t for key, t in state.items() if key.startswith("weight.")}
    param = bitsandbytes.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu")
    assert_same_weight(NF4Weight.from_params4bit(param), layer.weight)


def test_a_linear4bit_state_dict_is_loaded():
    linear, layer = linear4bit(), make_quantised_layer()
    missing, unexpected = layer.load_state_dict(linear.state_dict(), strict=False)
    assert (missing, unexpected) == (["lora_A.default", "lora_B.default"], [])
    assert_same_weight(layer.weight, NF4Weight.from_params4bit(linear.weight))
    assert torch.equal(layer.bias, linear.bias)


def test_a_state_dict_without_the_weight():
    layer, other = make_quantised_layer(), make_quantised_layer()
    adapter = {key: t for key, t in other.state_dict().items() if "lora_" in key}
    assert set(layer.load_state_dict(adapter, strict=False).missing_keys) == {"weight", "bias"}
    assert torch.equal(layer.lora_B["default"], other.lora_B["default"])
    with pytest.raises(RuntimeError, match='Missing key.* in state_dict: "weight", "bias"'):
        layer.load_state_dict(adapter)


def test_loading_keeps_dtype_unless_it_assigns():
    state = make_quantised_layer(torch.bfloat16).state_dict()
    layer = make_quantised_layer(torch.float32)
    layer.load_state_dict(state)
    assert layer.weight.dtype == layer.bias.dtype == torch.float32
    layer.load_state_dict(state, assign=True)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16


def without(key):
    return lambda state: state.pop(key)


def put(key, value):
    return lambda state: state.update({key: value})


DAMAGE = [
    *((without(key), KeyError, key) for key in ("weight", "weight.absmax", "weight.quant_map", STATE, *NESTED)),
    (put("weight", torch.zeros(7, 1, dtype=torch.uint8)), ValueError, "weight: the packed codes .* got 7"),
    (put("weight", torch.randn(N, K)), ValueError, "weight: the packed codes"),
    (put("weight.absmax", torch.zeros(29, dtype=torch.uint8)), ValueError, "weight: absmax .* got \\(29,\\)"),
    (put("weight.nested_absmax", torch.tensor([math.nan])), ValueError, "weight: nested_absmax must be finite, got nan"),
    (put(STATE, torch.zeros(3, dtype=torch.uint8)), ValueError, "quant_state is no JSON"),
    (
        lambda state: state.update(make_layer(linear=nn.Linear(K, N + 1), quant="nf4").state_dict()),
        ValueError,
        rf"weight must have shape \({N}, {K}\), got \({N + 1}, {K}\)",
    ),
]


@pytest.mark.parametrize(("damage", "kind", "message"), DAMAGE)
@pytest.mark.parametrize("strict", [True, False])
def test_a_damaged_state_changes_nothing(damage, kind, message, strict):
    """The key is named, and neither weight, bias nor adapter has been loaded."""
    layer, state = make_quantised_layer(), make_quantised_layer().state_dict()
    before = {key: t.clone() for key, t in layer.state_dict().items()}
    damage(state)
    with pytest.raises(kind, match=message):
        layer.load_state_dict(state, strict=strict)
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[key]) for key, t in before.items())


# --- copies, dtypes, devices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", DUPLICATES)
@pytest.mark.parametrize("merge", [None, {}, {"to": torch.bfloat16}], ids=str)
def test_duplicates(duplicate, merge):
    """A copy computes the same, merged or not, and shares no memory."""
    layer = make_quantised_layer(lora_alpha=3)
    x = make_x()
    unmerged_y = layer(x)
    if merge is not None:
        layer.merge(**merge)
    other = duplicate(layer)
    assert (other.merged, other.merge_error) == (layer.merged, layer.merge_error)
    if merge:
        layer, other = layer.to(torch.float32), other.to(torch.float32)
    y = layer(x)
    assert torch.equal(other(x), y)
    with torch.no_grad():
        (layer.weight.codes if isinstance(layer.weight, NF4Weight) else layer.weight).zero_()
        layer.lora_B["default"].zero_()
    assert torch.equal(other(x), y), "the copy shares memory with the layer"
    if merge is not None:
        other.unmerge()
        assert torch.equal(other(x), unmerged_y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_to_dtype(dtype, double_quant):
    """Casts bias and adapter. Codes and scales stay what they are; a float64 4-bit weight there is none."""
    layer = make_quantised_layer(double_quant=double_quant)
    before = layer.weight.clone()
    layer.to(dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert_same_weight(layer.weight, before)
    assert layer.weight.dtype == (torch.float32 if dtype == torch.float64 else dtype)
    assert_computes(layer, make_x(dtype))


def test_meta_device_and_back():
    layer, source = make_quantised_layer(), make_quantised_layer()
    layer.to("meta")
    assert layer.weight.device.type == layer.weight.offset.device.type == "meta"
    assert_computes(source, make_x())
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = make_x()
    assert torch.equal(layer(x), source(x))


def test_repr():
    layer = make_quantised_layer(quant="fp4", blocksize=128)
    assert f"weight=NF4Weight(shape=({N}, {K}), dtype=torch.float32, blocksize=128, quant_type='fp4'" in repr(layer)


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
    torch.testing.assert_close(x.grad.double(), exact, rtol=1e-5, atol=1e-4)


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
    with pytest.raises(TypeError, match="to must be float32, bfloat16, float16, float64 or None, got torch.int8"):
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
