"""FusedLoraLinear with a weight in 4 bits: how it is made, its state, copies, dtypes. test_qlora_linear.py has the numbers."""

import math

import bitsandbytes
import pytest
import torch
from compiled import assert_compiled_layer_is_eager
from quantised_layers import assert_computes, assert_same_weight, linear4bit, make_quantised_layer
from safetensors.torch import load_file, save_file
from tiny_models import DTYPES, DUPLICATES, K, N, conv1d, make_layer, make_x
from torch import nn

from lora_ops import NF4Weight, quantize_nf4

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


@pytest.mark.usefixtures("no_compiled_code")
def test_compile_and_export():
    layer, x = make_quantised_layer(lora_dropout=0.3), make_x()
    assert_compiled_layer_is_eager(layer, x)
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
    with pytest.raises(RuntimeError, match=r'Missing key.* in state_dict: "weight", "bias"'):
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
    layer.to_empty(device="cpu")  # numbers of any kind: for this test, none that a scale may be
    layer.weight.offset.fill_(torch.nan)
    layer.to("cpu").load_state_dict(source.state_dict())
    x = make_x()
    assert torch.equal(layer(x), source(x))


def test_repr():
    assert "lora_dropout=0.0, quant='fp4', blocksize=128\n" in repr(make_quantised_layer(quant="fp4", blocksize=128))
