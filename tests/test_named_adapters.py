"""Several adapters in one layer, and in a model: which are added to its output, and which train."""

import copy

import compare
import pytest
import torch
from compare import BF16, F32, Dtypes
from tiny_models import K, N, make_layer, make_x
from torch import Tensor, nn

import lora_ops
from lora_ops import FusedLoraLinear, LoraConfig


def layer_of_three(dtype: torch.dtype = F32, **options) -> FusedLoraLinear:
    layer = make_layer(dtype)
    layer.add_adapter("second", 3, lora_alpha=5, init_lora_weights=False, **options)
    layer.add_adapter("third", 7, use_rslora=True, init_lora_weights=False, **options)
    return layer


def in_fp64(layer: FusedLoraLinear, x: Tensor, names: list[str]) -> Tensor:
    y = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    for name in names:
        A, B = layer.lora_A[name].double(), layer.lora_B[name].double()
        y = y + layer.scaling[name] * (x.double() @ A.T @ B.T)
    return y


def eager(layer: FusedLoraLinear, x: Tensor, names: list[str]) -> Tensor:
    """As PEFT adds one after the other."""
    base = nn.functional.linear(x, layer.weight, layer.bias)
    y = base
    for name in names:
        A, B = layer.lora_A[name], layer.lora_B[name]
        y = y + layer.scaling[name] * (x.to(A.dtype) @ A.T @ B.T)
    return y.to(base.dtype)


NAMES = [["default"], ["second"], ["third", "default"], ["default", "second", "third"]]


@pytest.mark.parametrize("names", NAMES, ids="+".join)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_active_adapters_are_added(names: list[str], dtype: torch.dtype) -> None:
    layer, x = layer_of_three(dtype), make_x(dtype)
    layer.set_adapter(names)
    with torch.no_grad():
        measured = compare.error(layer(x), eager(layer, x, names), in_fp64(layer, x, names))
    assert measured.within_bound, measured


@pytest.mark.parametrize("names", NAMES, ids="+".join)
def test_active_adapters_alone_train(names: list[str]) -> None:
    layer = layer_of_three()
    layer.set_adapter(names)
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {f"{factor}.{name}" for name in names for factor in ("lora_A", "lora_B")}
    layer(make_x()).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == trained


def test_a_new_adapter_is_not_active() -> None:
    layer, x = make_layer(), make_x()
    before = layer(x)
    layer.add_adapter("other", 2, init_lora_weights=False)
    assert layer.active_adapters == ["default"]
    assert torch.equal(layer(x), before)
    assert not layer.lora_A["other"].requires_grad
    assert layer.lora_A["other"].dtype == layer.lora_A["default"].dtype


def test_dropout_is_each_adapter_s_own() -> None:
    """With one adapter in the call and the others beside it, the mean over masks is the output without dropout."""
    layer, x = layer_of_three(lora_dropout=0.5), make_x()
    layer.set_adapter(["default", "second", "third"])
    torch.manual_seed(0)
    first = layer(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x), first)
    assert not torch.equal(layer(x), first)
    layer.eval()
    expected = layer(x)
    assert torch.equal(layer(x), expected)


def test_none_active_and_disabled_are_the_frozen_layer() -> None:
    layer, x = layer_of_three(), make_x()
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    layer.disable_adapters()
    assert torch.equal(layer(x), expected)
    layer.enable_adapters()
    assert not torch.equal(layer(x), expected)
    layer.set_adapter([])
    assert torch.equal(layer(x), expected)
    with pytest.raises(RuntimeError, match="no adapter is active"):
        layer.merge()


def test_merging_takes_what_is_active() -> None:
    layer, x = layer_of_three(), make_x()
    layer.set_adapter(["second", "third"])
    before, W0 = layer(x), layer.weight.clone()
    layer.merge()
    measured = compare.error(layer(x), before, in_fp64_merged(layer, x))
    assert measured.within_bound, measured
    for change in (lambda: layer.set_adapter("default"), lambda: layer.delete_adapter("second")):
        with pytest.raises(RuntimeError, match=r'adapter "second" and "third" is merged; call unmerge\(\) first'):
            change()
    layer.unmerge()
    assert torch.equal(layer.weight, W0)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_switching_a_merged_task_is_a_fresh_merge(dtype: torch.dtype) -> None:
    """Bit for bit, in half precision, too, where W + ΔW_1 - ΔW_1 + ΔW_2 would not be."""
    switched = layer_of_three(dtype)
    fresh = copy.deepcopy(switched)
    switched.merge()
    for name in ("second", "third"):
        switched.unmerge()
        switched.set_adapter(name)
        switched.merge()
        fresh.set_adapter(name)
        fresh.merge()
        assert torch.equal(switched.weight, fresh.weight)
        fresh.unmerge()


def in_fp64_merged(layer: FusedLoraLinear, x: Tensor) -> Tensor:
    return nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())


def test_deleting() -> None:
    layer = layer_of_three()
    layer.set_adapter(["default", "second"])
    layer.delete_adapter("default")
    assert layer.active_adapters == ["second"]
    assert set(layer.lora_A) == set(layer.lora_B) == set(layer.r) == set(layer.scaling) == {"second", "third"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda layer: layer.add_adapter("second"), "adapter_name must be a new name, got 'second'"),
        (lambda layer: layer.add_adapter("a.b"), "adapter_name must be a non-empty string without a dot"),
        (lambda layer: layer.add_adapter("x", 0), "r must be an integer >= 1, got 0"),
        (lambda layer: layer.set_adapter("x"), r"adapter_name must be of the layer's adapters .*, got 'x'"),
        (lambda layer: layer.set_adapter(["second", "second"]), "every name once"),
        (lambda layer: layer.delete_adapter("x"), r"adapter_name must be of the layer's adapters .*, got 'x'"),
    ],
    ids=["taken", "dot", "rank", "unknown", "twice", "not there"],
)
def test_bad_arguments_change_nothing(change, words: str) -> None:
    layer = layer_of_three()
    before = (list(layer.lora_A), list(layer.active_adapters), dict(layer.r))
    with pytest.raises(ValueError, match=words):
        change(layer)
    assert (list(layer.lora_A), list(layer.active_adapters), dict(layer.r)) == before


def test_a_model_s_adapters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K))
    x = make_x()
    frozen = model(x)
    lora_ops.add_lora(model, LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
    config = LoraConfig(r=2, rank_pattern={"2": 5}, init_lora_weights=False)
    lora_ops.add_adapter(model, config, "other")
    assert [layer.r for _, layer in lora_ops.lora_layers(model)] == [{"default": 4, "other": 2}, {"default": 4, "other": 5}]
    first = model(x)
    lora_ops.set_adapter(model, "other")
    assert not torch.equal(model(x), first)
    with lora_ops.disable_adapter(model):
        assert torch.equal(model(x), frozen)
    lora_ops.set_adapter(model, "default")
    assert torch.equal(model(x), first)
    lora_ops.delete_adapter(model, "other")
    with pytest.raises(ValueError, match="got 'other'"):
        lora_ops.set_adapter(model, "other")
    with pytest.raises(ValueError, match="'default', which 0 has already"):
        lora_ops.add_adapter(model, config, "default")
    assert torch.equal(model(x), first)


def test_swapping_in_place_does_not_recompile() -> None:
    layer, x = make_layer(), make_x()
    layer.requires_grad_(False)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        layer.lora_B["default"].copy_(-layer.lora_B["default"])
        assert torch.equal(compiled(x), layer(x))


def test_gradients_of_several_are_those_of_each() -> None:
    """Of a sum, so each adapter's are what they are alone."""
    layer, x = layer_of_three(), make_x()
    alone = {}
    for name in ("default", "second"):
        layer.set_adapter(name)
        layer.zero_grad()
        layer(x).sum().backward()
        alone[name] = layer.lora_A[name].grad
    layer.set_adapter(["default", "second"])
    layer.zero_grad()
    layer(x).sum().backward()
    for name, expected in alone.items():
        A, B = layer.lora_A[name].double(), layer.lora_B[name].double()
        exact = layer.scaling[name] * B.sum(0)[:, None] * x.double().sum(0)
        assert exact.shape == A.shape
        compare.assert_within_bound({name: compare.error(layer.lora_A[name].grad, expected, exact)})


DTYPES = [Dtypes(F32, F32), Dtypes(BF16, F32), Dtypes(BF16, BF16)]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_4bit_layers_have_several_too(dtypes: Dtypes) -> None:
    torch.manual_seed(0)
    layer = FusedLoraLinear.from_linear(nn.Linear(64, N, dtype=dtypes.x), 4, quant="nf4", adapter_dtype=dtypes.adapter)
    layer.add_adapter("second", 3, init_lora_weights=False, adapter_dtype=dtypes.adapter)
    nn.init.normal_(layer.lora_B["default"])
    names = ["default", "second"]
    layer.set_adapter(names)
    x = torch.randn(5, 64).to(dtypes.x)
    dense = FusedLoraLinear.from_linear(nn.Linear(64, N, dtype=dtypes.x), 4)
    dense.bias = layer.bias
    dense.weight = nn.Parameter(layer.weight.dequantize(dtypes.x), requires_grad=False)
    dense.lora_A, dense.lora_B, dense.scaling = layer.lora_A, layer.lora_B, layer.scaling
    with torch.no_grad():
        eagerly = eager(dense, x, names)
        dense.weight = nn.Parameter(layer.weight.dequantize(torch.float64), requires_grad=False)
        measured = compare.error(layer(x), eagerly, in_fp64(dense, x, names))
    assert measured.within_bound, measured
