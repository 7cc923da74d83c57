"""A fine-tuned model as a plain one."""

import copy

import bitsandbytes
import compare
import pytest
import torch
from compare import BF16, F16, F32
from tiny_models import Mlp, assert_as_exact, assert_untouched, gpt2, injected, llama, snapshot, tokens, with_peft
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_ops
from lora_ops import FusedLoraLinear, LoraConfig, lora_layers, merge_and_unload, merge_lora

F64 = torch.float64


def sums(model: nn.Module, dtype: torch.dtype = F64) -> dict[str, torch.Tensor]:
    """W0 + ΔW of every layer, as it is in the state dict, added in `dtype`."""
    found = {}
    for name, layer in lora_layers(model):
        weight = layer.weight if isinstance(layer.weight, torch.Tensor) else layer.weight.dequantize(dtype)
        total = weight.detach().to(dtype)
        for adapter in layer.active_adapters:
            total = total + layer.scaling[adapter] * (layer.lora_B[adapter].to(dtype) @ layer.lora_A[adapter].to(dtype))
        found[f"{name}.weight"] = (total.T if isinstance(vars(layer).get("original"), Conv1D) else total).detach()
    return found


def assert_rounded_once(actual: torch.Tensor, in_fp32: torch.Tensor, exact: torch.Tensor) -> None:
    """The sum is fp32's, and then rounded."""
    measured = compare.error(actual, in_fp32.to(actual.dtype), exact)
    assert measured.within_bound, measured


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("make", [llama, gpt2, Mlp])
def test_the_model_is_plain_and_holds_the_sums(make, dtype: torch.dtype, merged: bool) -> None:
    torch.manual_seed(0)
    model = make().to(dtype)
    modules, before = dict(model.named_modules()), {name: t.clone() for name, t in model.state_dict().items()}
    flags, attributes = {name: p.requires_grad for name, p in model.named_parameters()}, set(vars(model))
    injected(model)
    exact, in_fp32 = sums(model), sums(model, torch.promote_types(dtype, F32))
    if merged:
        merge_lora(model)
    assert merge_and_unload(model) is model
    assert dict(model.named_modules()) == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert set(vars(model)) == attributes
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, t in after.items():
        assert t.dtype == before[name].dtype
        if name in exact:
            assert_rounded_once(t, in_fp32[name], exact[name])
        else:
            assert torch.equal(t, before[name])
    fresh = make().to(dtype)
    fresh.load_state_dict(after)


@pytest.mark.parametrize("merged", [False, True])
def test_it_computes_what_the_merged_model_does(merged: bool) -> None:
    model = injected(llama()).eval()
    expected = merge_lora(copy.deepcopy(model))(tokens()).logits
    if merged:
        merge_lora(model)
    assert torch.equal(merge_and_unload(model)(tokens()).logits, expected)


def test_peft_s_bits() -> None:
    torch.manual_seed(0)
    model = llama()
    config = LoraConfig(target_modules=["q_proj", "up_proj"], r=4, lora_alpha=6)
    theirs = with_peft(copy.deepcopy(model), config)
    lora_ops.add_lora(model, config)
    for name, layer in lora_layers(model):
        stock = theirs.base_model.model.get_submodule(name)
        nn.init.normal_(stock.lora_B["default"].weight, std=0.2)
        layer.lora_A["default"].data, layer.lora_B["default"].data = (
            part["default"].weight.data.clone() for part in (stock.lora_A, stock.lora_B)
        )
    exact, in_fp32 = sums(model), sums(model, F32)
    actual, expected = merge_and_unload(model).state_dict(), theirs.merge_and_unload().state_dict()
    assert actual.keys() == expected.keys()
    for name, t in actual.items():
        if name in exact:
            assert_rounded_once(t, expected[name], exact[name])
            assert_rounded_once(expected[name], in_fp32[name], exact[name])
        else:
            assert torch.equal(t, expected[name])


def test_of_several_adapters_the_active_ones_are_merged() -> None:
    model = injected(Mlp())
    for name in ("b", "c"):
        lora_ops.add_adapter(model, LoraConfig(r=3, init_lora_weights=False), name)
    lora_ops.set_adapter(model, ["b", "default"])
    merged = {f"{name}.weight": layer.weight for name, layer in lora_layers(merge_lora(copy.deepcopy(model)))}
    state = merge_and_unload(model).state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in merged.items())


def test_a_combined_adapter_is_exported() -> None:
    model = injected(llama()).eval()
    lora_ops.add_adapter(model, LoraConfig(r=3, init_lora_weights=False), "b")
    lora_ops.add_weighted_adapter(model, ["default", "b"], (0.7, -0.3), "new", "cat")
    lora_ops.set_adapter(model, "new")
    exact = copy.deepcopy(model).double()(tokens()).logits
    yardstick = copy.deepcopy(model)
    for name, t in sums(model).items():
        yardstick.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(t.float(), requires_grad=False)
    with lora_ops.disable_adapter(yardstick):
        plain = yardstick(tokens()).logits
    assert_as_exact([(merge_and_unload(model)(tokens()).logits, plain, exact)])


def test_it_trains_on_and_takes_new_adapters() -> None:
    model = merge_and_unload(injected(Mlp()))
    model(torch.randn(3, 12)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert {layer.r["default"] for _, layer in lora_layers(injected(model, r=2))} == {2}


def test_who_shares_a_weight_keeps_it() -> None:
    model = llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    W0 = model.lm_head.weight.clone()
    injected(model, target_modules=["lm_head"])
    exact, in_fp32 = sums(model), sums(model, F32)
    merge_and_unload(model)
    assert torch.equal(model.model.embed_tokens.weight, W0)
    assert_rounded_once(model.lm_head.weight.detach(), in_fp32["lm_head.weight"], exact["lm_head.weight"])


def test_parts_and_layers_placed_by_hand() -> None:
    model = nn.ModuleList([Mlp(), FusedLoraLinear(3, 4)])
    nn.init.normal_(model[1].lora_B["default"])
    injected(model[0])
    before = {name: t.clone() for name, t in model[1].state_dict().items()}
    merge_and_unload(model)
    assert [name for name, _ in lora_layers(model)] == ["1"]
    assert all(torch.equal(t, before[name]) for name, t in model[1].state_dict().items())


def test_layers_of_a_model_that_is_not_among_the_parts_stay() -> None:
    whole, other = injected(Mlp()), injected(Mlp())
    before = snapshot(whole)
    merge_and_unload(nn.ModuleList([whole.block, other]))
    assert_untouched(whole, before)
    assert list(lora_layers(other)) == []


# --- 4 bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_what_add_lora_quantised_is_not_quantised_again(make, dtype: torch.dtype) -> None:
    model = make().to(dtype)
    modules = dict(model.named_modules())
    injected(model, quant="nf4")
    exact, in_fp32 = sums(model), sums(model, F32)
    merge_and_unload(model)
    assert dict(model.named_modules()) == modules
    for name, t in model.state_dict().items():
        assert t.dtype == dtype
        if name in exact:
            assert_rounded_once(t, in_fp32[name], exact[name])


def linear4bit(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=dtype, quant_type="nf4")
    dense = nn.Linear(64, 64).to(dtype)
    layer.weight = bitsandbytes.nn.Params4bit(dense.weight.data, requires_grad=False, quant_type="nf4")
    layer.bias = nn.Parameter(dense.bias.data)
    return nn.Sequential(layer.to("cpu"))


def test_linear4bit_is_one_again() -> None:
    """With the codes of the merged weight, which bitsandbytes computes with."""
    model = linear4bit(F32)
    (stock,) = model
    injected(model, target_modules=["0"])
    merged = merge_lora(copy.deepcopy(model))[0].weight
    merge_and_unload(model)
    assert model[0] is stock
    assert isinstance(stock.weight, bitsandbytes.nn.Params4bit)
    assert torch.equal(lora_ops.NF4Weight.from_params4bit(stock.weight).dequantize(F32), merged.dequantize(F32))
    x = torch.randn(5, 64)
    exact = nn.functional.linear(x.double(), merged.dequantize(F64), stock.bias.double())
    eager = nn.functional.linear(x, merged.dequantize(F32), stock.bias)
    assert compare.error(model(x), eager, exact).within_bound


@pytest.mark.parametrize("to", [F32, BF16, F64], ids=str)
def test_linear4bit_as_a_dense_layer(to: torch.dtype) -> None:
    model, calls = linear4bit(BF16), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    injected(model, target_modules=["0"])
    exact, in_fp32, bias = sums(model), sums(model, F32), model[0].bias.clone()
    merge_and_unload(model, to)
    (layer,) = model
    assert type(layer) is nn.Linear
    assert (layer.in_features, layer.out_features) == (64, 64)
    assert_rounded_once(layer.weight.detach(), in_fp32["0.weight"], exact["0.weight"])
    assert torch.equal(layer.bias, bias.to(to))
    assert model(torch.randn(5, 64, dtype=to)).dtype == to
    assert calls == [1]


def test_another_dtype() -> None:
    model = injected(Mlp())
    exact, in_fp32 = sums(model), sums(model, F32)
    state = merge_and_unload(model, BF16).state_dict()
    for name in exact:
        assert_rounded_once(state[name], in_fp32[name].to(BF16), exact[name])
    assert state["first.bias"].dtype == BF16


# --- what it refuses --------------------------------------------------------------------------------------------------


def with_infinity(model: nn.Module) -> None:
    model.block[2].lora_B["default"].data[0, 0] = torch.inf


@pytest.mark.parametrize(
    ("prepare", "to", "kind", "words"),
    [
        (with_infinity, None, ValueError, r"block\.2: .* not finite"),
        (lambda model: model.block[2].merge(), None, RuntimeError, "1 of 4 layers are merged already; call unmerge_lora"),
        (merge_lora, BF16, RuntimeError, "4 of 4 layers are merged already; call unmerge_lora"),
        (lambda model: model.block[2].set_adapter([]), None, RuntimeError, "no adapter is active"),
        (lambda model: None, torch.int8, TypeError, "to must be float32, .* got torch.int8"),
    ],
    ids=["infinite", "one merged", "merged", "none active", "dtype"],
)
def test_it_leaves_the_model_untouched(prepare, to, kind: type[Exception], words: str) -> None:
    model = injected(Mlp())
    prepare(model)
    before = snapshot(model)
    with pytest.raises(kind, match=words):
        merge_and_unload(model, to)
    assert_untouched(model, before)


def test_a_model_without_lora() -> None:
    with pytest.raises(ValueError, match="not what add_lora was called with"):
        merge_and_unload(Mlp())
