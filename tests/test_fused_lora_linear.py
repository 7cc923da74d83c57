"""The module: state, copies, dtypes, merging, kept panels. The operator itself has tests of its own."""

import copy
import math

import pytest
import torch
from compare import error
from tiny_models import DTYPES, DUPLICATES, K, N, R, assert_computes, conv1d, eager, make_layer, make_x
from torch import nn

import lora_ops
from lora_ops import FusedLoraLinear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [lambda dtype: nn.Linear(K, N, dtype=dtype), conv1d], ids=["Linear", "Conv1D"])
def test_wraps_a_layer_and_shares_its_weight(make, dtype):
    base = make(dtype)
    x = make_x(dtype)
    with torch.no_grad():
        before = base(x)
    layer = FusedLoraLinear.from_linear(base, R)
    assert layer.weight.shape == (N, K)
    assert layer.weight.data_ptr() == base.weight.data_ptr()
    assert layer.bias is base.bias
    assert not layer.weight.requires_grad
    assert not layer.bias.requires_grad
    wide = copy.deepcopy(base).double()
    assert error(layer(x), before, wide(x.double())).within_bound  # B = 0: W0 alone
    assert_computes(make_layer(dtype, base), x)


def test_keeps_the_mode():
    assert FusedLoraLinear.from_linear(nn.Linear(K, N).eval()).training is False
    assert FusedLoraLinear.from_linear(nn.Linear(K, N)).training is True


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict(bias):
    """Its keys and shapes, and that another layer that loads it computes the same."""
    layer = make_layer(linear=nn.Linear(K, N, bias=bias))
    keys = ["weight", "lora_A.default", "lora_B.default", *(["bias"] if bias else [])]
    state = layer.state_dict()
    assert sorted(state) == sorted(keys)
    assert state["lora_A.default"].shape == (R, K)
    assert state["lora_B.default"].shape == (N, R)

    other = FusedLoraLinear(K, N, R, bias=bias)
    assert other.load_state_dict(state) is not None
    x = make_x()
    assert torch.equal(other(x), layer(x))


def test_state_dict_of_a_conv1d():
    """Holds the weight as Conv1D does, (K, N), and loads it, copied or assigned."""
    conv = conv1d()
    layer = make_layer(linear=conv)
    assert torch.equal(layer.state_dict()["weight"], conv.weight)
    other = make_layer(linear=conv1d())
    other.load_state_dict(layer.state_dict())
    x = make_x()
    assert torch.equal(other(x), layer(x))
    layer.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(other(x), layer(x))


def test_state_dict_of_a_named_adapter():
    assert "lora_A.de" in make_layer(adapter_name="de").state_dict()


def test_state_dict_loads_the_base_layer():
    base = nn.Linear(K, N)
    layer = FusedLoraLinear(K, N, R)
    missing, unexpected = layer.load_state_dict(base.state_dict(), strict=False)
    assert missing == ["lora_A.default", "lora_B.default"]
    assert unexpected == []
    assert torch.equal(layer.weight, base.weight)


@pytest.mark.parametrize("duplicate", DUPLICATES)
@pytest.mark.parametrize("linear", [None, conv1d], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("prepack", [False, True])
def test_duplicates(duplicate, linear, merged, prepack):
    """A copy computes the same, merged or not, and shares no memory."""
    layer = make_layer(linear=linear and linear(), lora_alpha=3, use_rslora=True, prepack=prepack)
    x = make_x()
    unmerged_y = layer(x)
    if merged:
        layer.merge()
    other = duplicate(layer)
    assert other.merged == merged
    assert other.scaling == layer.scaling == {"default": 3 / math.sqrt(R)}
    y = layer(x)
    assert torch.equal(other(x), y)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_B["default"].zero_()
    assert torch.equal(other(x), y), "the copy shares memory with the layer"
    if merged:
        other.unmerge()
        assert torch.equal(other(x), unmerged_y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("linear", [None, conv1d], ids=["Linear", "Conv1D"])
def test_to_dtype(dtype, linear):
    """A cast layer computes in its new dtype; panels kept before are of no use any more."""
    layer = make_layer(linear=linear and linear(), prepack=True)
    layer(make_x())
    layer.to(dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert_computes(layer, make_x(dtype))


def test_adapters_default_to_peft_dtype():
    expected = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}
    for dtype, adapter_dtype in expected.items():
        assert make_layer(dtype).lora_A["default"].dtype == adapter_dtype
        assert make_layer(dtype).lora_B["default"].dtype == adapter_dtype
    layer = make_layer(torch.bfloat16, adapter_dtype=torch.bfloat16)
    assert layer.lora_A["default"].dtype == torch.bfloat16
    assert_computes(layer, make_x(torch.bfloat16))


def test_initialisation():
    """A within ±1/sqrt(K) or of standard deviation 1/r, filling its range; B zero unless asked otherwise."""
    K, r = 512, 64
    uniform = FusedLoraLinear(K, N, r).lora_A["default"]
    assert 0.99 / math.sqrt(K) < uniform.abs().max() <= 1 / math.sqrt(K)
    gaussian = FusedLoraLinear(K, N, r, init_lora_weights="gaussian").lora_A["default"]
    deviation_of_estimate = 1 / math.sqrt(2 * K * r)
    assert abs(gaussian.std() * r - 1) < 5 * deviation_of_estimate
    for init, zero in ((True, True), ("gaussian", True), (False, False)):
        B = FusedLoraLinear(K, N, r, init_lora_weights=init).lora_B["default"]
        assert (B.count_nonzero() == 0) == zero


def test_rslora_keeps_the_first_step_of_any_rank():
    """What one SGD step on B adds to the output: as large for r = 1024 as for 4, and 256 times smaller with lora_alpha / r."""

    def ratio(use_rslora: bool) -> float:
        sizes = []
        for r in (4, 1024):
            torch.manual_seed(0)
            layer = FusedLoraLinear(256, 8, r, lora_alpha=8, use_rslora=use_rslora)
            assert layer.scaling["default"] == (8 / math.sqrt(r) if use_rslora else 8 / r)
            before, x, g = [], torch.randn(64, 256), torch.randn(64, 8)
            for row, upstream in zip(x[:, None], g[:, None], strict=True):
                layer.zero_grad()
                layer(row).backward(upstream)
                step = layer.scaling["default"] * (row @ layer.lora_A["default"].T @ layer.lora_B["default"].grad.T)
                before.append(step.norm())
            sizes.append(torch.stack(before).mean())
        return (sizes[0] / sizes[1]).item()

    assert 0.6 < ratio(True) < 1.7
    assert 150 < ratio(False) < 400


def test_same_seed_same_adapter():
    torch.manual_seed(3)
    A = FusedLoraLinear(K, N, R).lora_A["default"]
    torch.manual_seed(3)
    assert torch.equal(FusedLoraLinear(K, N, R).lora_A["default"], A)


def test_meta_device():
    """A layer made without memory works once it is given memory and a state."""
    layer = FusedLoraLinear(K, N, R, device="meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    source = make_layer()
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = make_x()
    assert torch.equal(layer(x), source(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("linear", [lambda dtype: nn.Linear(K, N, dtype=dtype), conv1d], ids=["Linear", "Conv1D"])
def test_merge_and_unmerge(dtype, linear):
    layer = make_layer(linear=linear(dtype), lora_alpha=20)
    x = make_x(dtype)
    W0, unmerged_y, storage = layer.weight.clone(), layer(x), layer.weight.data_ptr()
    exact_weight = W0.double() + layer.scaling["default"] * (
        layer.lora_B["default"].double() @ layer.lora_A["default"].double()
    )

    layer.merge()
    assert layer.merged
    peft_weight = (W0 + layer.delta_weight()).to(dtype)
    assert error(layer.weight.data, peft_weight.data, exact_weight).within_bound
    assert not torch.equal(layer.weight, W0)
    wide = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert error(layer(x), nn.functional.linear(x, layer.weight, layer.bias), wide).within_bound

    layer.unmerge()
    assert not layer.merged
    assert torch.equal(layer.weight, W0)
    assert layer.weight.data_ptr() == storage, "W0 is where it was, shared with whoever shared it"
    assert not layer.weight.requires_grad
    assert torch.equal(layer(x), unmerged_y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_output_is_the_unmerged_output(dtype):
    """But for what rounding the weight costs: a plain layer of weight W0 + ΔW, rounded, is the yardstick."""
    layer = make_layer(dtype)
    x = make_x(dtype)
    exact = eager(copy.deepcopy(layer).double(), x.double())
    rounded = (layer.weight.double() + layer.delta_weight().double()).to(dtype)
    yardstick = nn.functional.linear(x, rounded, layer.bias)
    layer.merge()
    assert error(layer(x), yardstick, exact).within_bound


def test_merge_leaves_whoever_shares_the_weight_alone():
    linear = nn.Linear(K, N)
    W0 = linear.weight.clone()
    layer = make_layer(linear=linear)
    layer.merge()
    assert torch.equal(linear.weight, W0)
    assert not torch.equal(layer.weight, W0)


def test_merge_state_dict_has_the_merged_weight_alone():
    layer = make_layer()
    layer.merge()
    assert sorted(layer.state_dict()) == ["bias", "lora_A.default", "lora_B.default", "weight"]
    assert torch.equal(layer.state_dict()["weight"], layer.weight)


def test_merged_layer_moves_with_its_weight():
    layer = make_layer()
    W0 = layer.weight.clone()
    layer.merge()
    layer.to(torch.bfloat16).unmerge()
    assert torch.equal(layer.weight, W0.to(torch.bfloat16))


def test_merging_twice_is_an_error():
    layer = make_layer()
    with pytest.raises(RuntimeError, match=r"nothing is merged; call merge\(\) first"):
        layer.unmerge()
    layer.merge()
    merged = layer.weight.clone()
    with pytest.raises(RuntimeError, match=r'adapter "default" is merged already; call unmerge\(\) first'):
        layer.merge()
    assert torch.equal(layer.weight, merged)


def test_a_merged_weight_must_be_finite():
    layer = make_layer(torch.float16)
    W0 = layer.weight.clone()
    with torch.no_grad():
        layer.lora_B["default"][3, 0] = 1e6
        layer.lora_A["default"][0] = 1
    with pytest.raises(ValueError, match="not finite; nothing was changed"):
        layer.merge()
    assert not layer.merged
    assert torch.equal(layer.weight, W0)


BAD_ARGUMENTS = [
    ({"r": 0}, ValueError, "r must be an integer >= 1, got 0"),
    ({"r": -3}, ValueError, "r must be an integer >= 1, got -3"),
    ({"r": 2.0}, ValueError, "r must be an integer >= 1, got 2.0"),
    ({"r": True}, ValueError, "r must be an integer >= 1, got True"),
    ({"lora_alpha": math.inf}, ValueError, "lora_alpha must be a finite number, got inf"),
    ({"lora_alpha": math.nan}, ValueError, "lora_alpha must be a finite number, got nan"),
    ({"lora_alpha": "8"}, ValueError, "lora_alpha must be a finite number, got '8'"),
    ({"lora_dropout": 1.0}, ValueError, "lora_dropout must be a number in [0, 1), got 1.0"),
    ({"lora_dropout": -0.1}, ValueError, "lora_dropout must be a number in [0, 1), got -0.1"),
    ({"lora_dropout": math.nan}, ValueError, "lora_dropout must be a number in [0, 1), got nan"),
    ({"lora_dropout": None}, ValueError, "lora_dropout must be a number in [0, 1), got None"),
    (
        {"init_lora_weights": "xavier"},
        ValueError,
        '"pissa_niter_N" or "loftq_iter_N", got \'xavier\'',
    ),
    ({"adapter_dtype": torch.int8}, TypeError, "adapter_dtype must be float32, bfloat16, float16, float64 or None"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD_ARGUMENTS)
def test_bad_arguments(arguments, kind, message):
    """Are named with their value, and the wrapped layer is left as it was."""
    with pytest.raises(kind) as caught:
        FusedLoraLinear(K, N, **arguments)
    assert message in str(caught.value)

    linear = nn.Linear(K, N)
    with pytest.raises(kind) as caught:
        FusedLoraLinear.from_linear(linear, **arguments)
    assert message in str(caught.value)
    assert linear.weight.requires_grad, "an error came after the weight was frozen"


@pytest.mark.parametrize("name", ["", "a.b", "keys", 3])
def test_bad_adapter_names(name):
    """Are named, and the wrapped layer is left as it was."""
    linear = nn.Linear(K, N)
    with pytest.raises(ValueError, match=f"adapter_name must be a non-empty string .*got {name!r}"):
        FusedLoraLinear.from_linear(linear, adapter_name=name)
    assert linear.weight.requires_grad


@pytest.mark.parametrize("module", [nn.Embedding(K, N), nn.Conv1d(2, 3, 1), nn.Sequential(nn.Linear(K, N))])
def test_bad_layers(module):
    """Are named by their type."""
    with pytest.raises(TypeError, match=f"linear must be an nn.Linear, a transformers Conv1D .*, got {type(module).__name__}"):
        FusedLoraLinear.from_linear(module)


def test_the_weight_cannot_be_trained():
    layer = make_layer()
    layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="weight requires grad, but W0 is frozen by definition"):
        layer(make_x())


def test_a_wrong_x():
    """Is named with the K that it must have."""
    with pytest.raises(ValueError, match=rf"x must be \(..., K\) with K = {K}"):
        make_layer()(torch.randn(2, K + 1))


def test_trains_the_adapter_alone():
    layer = make_layer()
    layer(make_x()).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_A.default", "lora_B.default"}


def test_dropout_acts_in_training_alone():
    layer = make_layer(lora_dropout=0.5)
    x = make_x()
    plain = make_layer()
    plain.load_state_dict(layer.state_dict())
    torch.manual_seed(1)
    y = layer(x)
    assert not torch.equal(y, plain(x))
    torch.manual_seed(1)
    assert torch.equal(layer(x), y)
    assert torch.equal(layer.eval()(x), plain(x))


def test_repr():
    """Has sizes, rank, alpha and dropout, and says when the layer is merged."""
    layer = make_layer(lora_alpha=16, lora_dropout=0.1)
    text = f"FusedLoraLinear(\n  in_features={K}, out_features={N}, bias=True, r={R}, lora_alpha=16, lora_dropout=0.1"
    assert repr(layer).startswith(text)
    layer.merge()
    assert ", merged" in repr(layer)


def test_exported():
    assert {"FusedLoraLinear", "LoraConfig", "add_lora", "remove_lora", "merge_lora"} <= set(lora_ops.__all__)
