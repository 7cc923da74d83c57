"""FusedLoraLinear with DoRA and with biases of B: merging, beside PEFT's, and plain models."""

import copy
import math

import compare
import pytest
import torch
from compare import BF16, F16, F32, Dtypes
from dora_layers import F64, KINDS, OPTIONS, Case, in_fp64, make_ours, make_stock, three
from peft import PeftModel
from peft_layers import K, N, Setting
from torch import Tensor, nn

import lora_ops
from lora_ops import FusedLoraLinear

MERGED = [("dora",), ("bias",), ("bias", "lora", "bias"), ("lora", "dora"), ("dora", "lora"), ("dora", "dora", "dora")]


def of_peft(model: PeftModel, kind: str) -> dict[str, Tensor]:
    """The merged weight and bias."""
    layer = copy.deepcopy(model).base_model.model.layer
    layer.merge()
    weight = layer.base_layer.weight.data
    return {"weight": weight.T if kind == "conv1d" else weight, "bias": layer.base_layer.bias.data}


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("kinds", MERGED, ids="+".join)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_merged_is_as_near_as_peft_s(dtype: torch.dtype, kinds: tuple[str, ...], kind: str) -> None:
    """And unmerged is what was there, for whoever shares it, too."""
    case = Case(kinds, Setting(Dtypes(dtype, F32), kind=kind))
    stock = make_stock(case)
    layer, x = make_ours(stock, case).layer.requires_grad_(False), torch.randn(5, K).to(dtype)
    weight, bias, unmerged = layer.weight, layer.bias, layer(x)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    theirs, exact = of_peft(stock, kind), of_peft(in_fp64(stock, case), kind)
    layer.merge()
    for name, t in theirs.items():
        measured = compare.error(getattr(layer, name).data, t, exact[name])
        assert measured.within_bound, (name, measured)
    assert torch.equal(weight, before["weight"].T if kind == "conv1d" else before["weight"])
    assert torch.equal(bias, before["bias"])
    assert (layer.bias is bias) == ("bias" not in kinds)
    layer.unmerge()
    assert layer.weight is weight
    assert layer.bias is bias
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    assert torch.equal(layer(x), unmerged)


@pytest.mark.parametrize("kinds", [*KINDS, *MERGED], ids="+".join)
@pytest.mark.parametrize("quantised", [False, True])
def test_merged_computes_what_unmerged_does(kinds: tuple[str, ...], quantised: bool) -> None:
    """Merged in fp64, where rounding is out of the way: also where DoRA comes after a bias of B, which PEFT's merged layer does
    not scale as its forward does."""
    case = Case(kinds, Setting(Dtypes(F32, F32), kind="4bit" if quantised else "linear"))
    stock, x = make_stock(case), torch.randn(5, K)
    layer = make_ours(stock, case).layer
    merged = copy.deepcopy(layer).double()
    merged.merge(to=F64)
    with torch.no_grad():
        compare.assert_within_bound({"y": compare.error(layer(x), stock(x), merged(x.double()))})


def test_the_rows_of_a_merged_weight_are_as_long_as_the_magnitude_says() -> None:
    layer = FusedLoraLinear(K, N, 4, use_dora=True, init_lora_weights=False, dtype=F64)
    nn.init.normal_(layer.lora_magnitude_vector["default"], mean=2.0)
    layer.merge()
    lengths = torch.linalg.vector_norm(layer.weight, dim=1)
    torch.testing.assert_close(lengths, layer.lora_magnitude_vector["default"].abs().detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kinds", MERGED, ids="+".join)
def test_4bit_layers_merge_in_their_format(kinds: tuple[str, ...]) -> None:
    case = Case(kinds, Setting(Dtypes(BF16, F32), kind="4bit"))
    layer, x = make_ours(make_stock(case), case).layer, torch.randn(5, K, dtype=BF16)
    weight, bias, unmerged = layer.weight, layer.bias, layer(x)
    dense = copy.deepcopy(layer)
    dense.merge(to=F64)
    layer.merge()
    exact = dense.weight
    error = (layer.weight.dequantize(F64) - exact).norm() / exact.norm()
    assert layer.merge_error == pytest.approx(error.item(), rel=1e-4)
    assert 0.05 < layer.merge_error < 0.15
    layer.unmerge()
    assert layer.weight is weight
    assert layer.bias is bias
    assert torch.equal(layer(x), unmerged)


def test_peft_s_merged_layers_forget_a_scale_of_the_bias() -> None:
    """DoRA's, where it comes after a bias of B; the scaling, over a 4-bit weight. Ours do not: the tests above."""
    case = Case(("bias", "dora"), Setting(Dtypes(F32, F32)))
    wide, x = in_fp64(make_stock(case), case), torch.zeros(1, K, dtype=F64)
    unmerged = wide(x)
    wide.base_model.model.layer.merge()
    assert (wide(x) - unmerged).abs().max() > 0.1

    case = Case(("bias",), Setting(Dtypes(F32, F32), kind="4bit"))
    stock = make_stock(case).base_model.model.layer
    of_B, before = stock.lora_B["default"].bias.data, stock.base_layer.bias.data.clone()
    stock.merge()
    assert stock.scaling["default"] != 1
    assert torch.equal(stock.base_layer.bias.data, before + of_B)


def test_delta_weight_is_peft_s() -> None:
    case = Case(("dora", "bias"), Setting(Dtypes(F32, F32)))
    stock = make_stock(case)
    layer = make_ours(stock, case).layer
    for name in ("default", "second"):
        assert torch.equal(layer.delta_weight(name), stock.base_model.model.layer.get_delta_weight(name))


def test_a_bias_of_b_needs_a_bias_to_merge_into() -> None:
    """PEFT says so, too, when it merges."""
    with pytest.warns(UserWarning, match='lora_bias is True for adapter "default" of a layer without bias: it cannot be'):
        layer = FusedLoraLinear(K, N, bias=False, lora_bias=True)
    nn.init.ones_(layer.lora_B_bias["default"])
    assert torch.equal(layer(torch.zeros(1, K)), torch.ones(1, N))
    W0 = layer.weight
    with pytest.raises(ValueError, match=r'adapter "default" has a bias of B \(lora_bias\), .* no bias to take it; nothing'):
        layer.merge()
    assert layer.weight is W0
    assert not layer.merged
    model = nn.Sequential(nn.Linear(K, N), nn.Linear(N, K, bias=False))
    with pytest.warns(UserWarning, match="lora_bias is True"):
        lora_ops.add_lora(model, lora_ops.LoraConfig(r=2, target_modules=["0", "1"], lora_bias=True))
    with pytest.raises(ValueError, match=r'1: adapter "default" has a bias of B'):
        lora_ops.merge_and_unload(model)
    assert not any(layer.merged for _, layer in lora_ops.lora_layers(model))


@pytest.mark.parametrize("name", ["lora_B_bias", "lora_magnitude_vector"])
def test_what_is_merged_must_be_finite(name: str) -> None:
    layer = three()
    before = {key: t.clone() for key, t in layer.state_dict().items()}
    parameter = next(iter(getattr(layer, name).values()))
    parameter.data[3] = math.inf
    with pytest.raises(ValueError, match=r"gives a merged (bias|weight) that is not finite; nothing was changed"):
        layer.merge()
    parameter.data[3] = next(t for key, t in before.items() if key.startswith(name))[3]
    assert not layer.merged
    assert all(torch.equal(t, before[key]) for key, t in layer.state_dict().items())


@pytest.mark.parametrize("to", [None, BF16], ids=str)
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", ["dora", "bias"])
def test_a_plain_model_of_it(kind: str, merged: bool, to: torch.dtype | None) -> None:
    """Has the merged layer's weight and bias, and the flags of before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N), nn.Linear(N, K))
    modules, x = list(model), torch.randn(5, K)
    lora_ops.add_lora(model, lora_ops.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, **OPTIONS[kind]))
    for p in lora_ops.lora_parameters(model):
        p.data.mul_(1.5)
    removed = lora_ops.remove_lora(copy.deepcopy(model))
    expected = lora_ops.merge_lora(copy.deepcopy(model))
    if merged and to is None:
        lora_ops.merge_lora(model)
    W0, bias = removed[0].weight, removed[0].bias
    lora_ops.merge_and_unload(model, to)
    assert list(model) == modules
    assert torch.equal(model[0].weight, expected[0].weight.to(to or F32))
    assert torch.equal(model[0].bias, expected[0].bias.to(to or F32))
    assert torch.equal(model[0].bias, bias.to(to or F32)) == (kind != "bias")
    assert not torch.equal(model[0].weight, W0.to(to or F32))
    assert all(p.requires_grad for p in model.parameters())
    if to is None:
        assert torch.equal(model(x), expected(x))
