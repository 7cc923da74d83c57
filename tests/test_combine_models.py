"""One adapter from several of a model: beside PEFT where it is right, beside fp64 where it is not."""

import copy

import peft
import pytest
import torch
from combining import assert_as_near, delta, options, peft_s
from tiny_models import Mlp, assert_as_exact, assert_untouched, gpt2, injected, llama, snapshot, tokens
from torch import nn

import lora_ops
from lora_ops import Adapter, LoraConfig, add_weighted_adapter, lora_layers
from lora_ops.adapters.combine import METHODS


def with_two(model: nn.Module, **fields) -> nn.Module:
    """Adapters "default" and "b", which both do something."""
    torch.manual_seed(0)
    injected(model, lora_dropout=0.25, **fields)
    return lora_ops.add_adapter(model, LoraConfig(r=4, lora_alpha=2, init_lora_weights=False), "b")


def in_peft(make, directory, names) -> peft.PeftModel:
    folders = {name: directory if name == "default" else directory / name for name in names}
    model = peft.PeftModel.from_pretrained(make(), directory, torch_device="cpu")
    for name in names[1:]:
        model.load_adapter(folders[name], name, torch_device="cpu")
    return model


@pytest.mark.parametrize("method", ["cat", "linear", "ties", "magnitude_prune", "svd"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_model_s_new_adapter_is_peft_s(tmp_path, make, method: str) -> None:
    """Layer by layer; and PEFT reads it as it is."""
    model = with_two(make(), target_modules=["q_proj", "down_proj"] if make is llama else ["c_attn"])
    weights = (0.5, 2)  # scalings 2 and 0.5: nothing that "cat" rounds
    assert add_weighted_adapter(model, ["default", "b"], weights, "new", method, **options(method)) is model
    for name in ("default", "b", "new"):
        lora_ops.save_adapter(model, tmp_path, name)
    theirs = in_peft(make, tmp_path, ["default", "b", "new"])
    theirs.add_weighted_adapter(["default", "b"], list(weights), "theirs", combination_type=method, **options(method))
    for name, layer in lora_layers(model):
        stock = theirs.base_model.model.get_submodule(name)
        new, of_peft = (
            Adapter(stock.lora_A[n].weight.data, stock.lora_B[n].weight.data, stock.scaling[n]) for n in ("new", "theirs")
        )
        assert torch.equal(layer.lora_A["new"], new.lora_A)
        assert torch.equal(layer.lora_B["new"], new.lora_B)
        assert layer.scaling["new"] == new.scaling == of_peft.scaling == 1.0
        if method == "svd":
            assert_as_near(new, of_peft, delta(svd_in_fp64(stock, weights)))
        else:
            assert torch.equal(new.lora_A, of_peft.lora_A)
            assert torch.equal(new.lora_B, of_peft.lora_B)


def svd_in_fp64(stock: nn.Module, weights) -> Adapter:
    wide = [
        Adapter(stock.lora_A[n].weight.double(), stock.lora_B[n].weight.double(), stock.scaling[n]) for n in ("default", "b")
    ]
    return peft_s([Adapter(A.detach(), B.detach(), s) for A, B, s in wide], weights, "svd")


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_cat_of_a_model_computes_what_both_do(quant: str | None) -> None:
    """The logits of both at once, with layers of different ranks, some of them in 4 bits."""
    model = with_two(llama(), quant=quant, rank_pattern={"q_proj": 7}).eval()
    lora_ops.set_adapter(model, ["default", "b"])
    both, exactly = model(tokens()).logits, copy.deepcopy(model).double()(tokens()).logits
    state = {name: t.clone() for name, t in model.state_dict().items()}
    add_weighted_adapter(model, ["default", "b"], (1, 1), "new", "cat")
    assert {layer.r["new"] for _, layer in lora_layers(model)} == {8, 11}
    assert {layer.lora_dropout["new"] for _, layer in lora_layers(model)} == {0.25}
    assert torch.equal(model(tokens()).logits, both)  # not active yet
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in state.items())
    lora_ops.set_adapter(model, "new")
    assert_as_exact([(model(tokens()).logits, both, exactly)])


def test_each_layer_draws_random_numbers_of_its_own() -> None:
    model = with_two(llama(), target_modules=["q_proj"])
    for name in ("one", "two"):
        generator = torch.Generator().manual_seed(3)
        add_weighted_adapter(model, ["default", "b"], (1, 1), name, "dare_linear", density=0.5, generator=generator)
    layers = [layer for _, layer in lora_layers(model)]
    assert all(torch.equal(layer.lora_A["one"], layer.lora_A["two"]) for layer in layers)
    assert not torch.equal(layers[0].lora_A["one"] == 0, layers[1].lora_A["one"] == 0)


@pytest.mark.parametrize(
    ("adapters", "weights", "name", "method", "how", "words"),
    [
        (["default", "c"], (1, 1), "new", "cat", {}, r"adapters must be of first's \['default', 'b'\], got 'c'"),
        (["default", "b"], (1, 1), "b", "cat", {}, "adapter_name must be a new name, got 'b', which first has already"),
        (["default", "b"], (1, 1), "a.b", "cat", {}, "adapter_name must be a non-empty string without a dot"),
        (["default", "b"], (1,), "new", "cat", {}, "first: weights must be one number for each .*, got 1; .*untouched"),
        (["default", "b"], (1, 1), "new", "ties", {}, r"first: density must be a number in \(0, 1\] for \"ties\", got None"),
        (["default", "b"], (1, 1), "new", "linear", {}, r'block.0: "linear" needs adapters of one rank, got \[6, 4\]; .*'),
        ([], (), "new", "cat", {}, "first: adapters must hold at least one adapter"),
    ],
)  # fmt: skip
def test_a_model_is_left_untouched(adapters, weights, name: str, method: str, how: dict, words: str) -> None:
    model = with_two(Mlp(), rank_pattern={"block.0": 6})
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        add_weighted_adapter(model, adapters, weights, name, method, **how)
    assert_untouched(model, before)


def test_peft_leaves_half_an_adapter_behind() -> None:
    """What the test above rules out."""
    model = peft.get_peft_model(Mlp(), peft.LoraConfig(r=4, target_modules=["first", "last"]), "a")
    model.add_adapter("b", peft.LoraConfig(r=4, target_modules=["first", "last"]))
    with pytest.raises(TypeError):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", combination_type="ties")
    assert "new" in model.peft_config


def with_biases(make) -> nn.Module:
    """Adapters "default" and "b" with biases of B, "c" without."""
    model = with_two(make(), target_modules=["first", "block.0"], lora_bias=True)
    lora_ops.delete_adapter(model, "b")
    for name, lora_bias in (("b", True), ("c", False)):
        config = LoraConfig(r=4, lora_alpha=2, init_lora_weights=False, lora_bias=lora_bias)
        lora_ops.add_adapter(model, config, name)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B_bias["default"])
    return model


@pytest.mark.parametrize("method", METHODS)
def test_biases_of_b_are_summed(method: str) -> None:
    """Times weights and scalings; the adapter without one has none to add."""
    model = with_biases(Mlp)
    add_weighted_adapter(model, ["default", "c", "b"], (0.5, 3, -2), "new", method, **options(method))
    for _, layer in lora_layers(model):
        of = layer.lora_B_bias
        expected = 0.5 * layer.scaling["default"] * of["default"].double() - 2 * layer.scaling["b"] * of["b"].double()
        assert torch.equal(of["new"], expected.float())
        assert not of["new"].requires_grad
    add_weighted_adapter(model, ["c"], (1,), "without", method, **options(method))
    assert not any(layer.lora_bias["without"] for _, layer in lora_layers(model))


def test_cat_of_adapters_with_biases_computes_what_both_do() -> None:
    model, x = with_biases(Mlp).eval(), torch.randn(9, 12)
    lora_ops.set_adapter(model, ["default", "b"])
    both, exactly = model(x), copy.deepcopy(model).double()(x.double())
    add_weighted_adapter(model, ["default", "b"], (1, 1), "new", "cat")
    lora_ops.set_adapter(model, "new")
    assert_as_exact([(model(x), both, exactly)])


def test_a_combined_bias_must_be_finite() -> None:
    model = with_biases(Mlp)
    nn.init.constant_(model.block[0].lora_B_bias["default"], 3e38)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"block\.0: the combined bias of B is not finite in torch\.float32: .*untouched"):
        add_weighted_adapter(model, ["default", "c"], (2, 1), "new", "cat")
    assert_untouched(model, before)


def test_dora_is_not_combined() -> None:
    model = with_two(Mlp())
    lora_ops.add_adapter(model, LoraConfig(r=4, use_dora=True), "dora")
    before = snapshot(model)
    with pytest.raises(
        ValueError, match="adapters must be without DoRA, whose magnitudes cannot be combined, got 'dora' in fi"
    ):
        add_weighted_adapter(model, ["default", "dora"], (1, 1), "new", "cat")
    assert_untouched(model, before)


@pytest.mark.parametrize("field", ["use_dora", "lora_bias"])
def test_peft_forgets_biases_and_magnitudes(field: str) -> None:
    """What lora_ops sums or refuses: the combination of one adapter, with weight 1, is another one."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Mlp(), peft.LoraConfig(r=4, target_modules=["first"], **{field: True}), "a").eval()
    layer, x = model.base_model.model.first, torch.randn(3, 12)
    for p in layer.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    model.add_weighted_adapter(["a"], [1.0], "new", combination_type="linear")
    before = layer(x)
    model.set_adapter("new")
    if field == "use_dora":
        norms = torch.linalg.vector_norm(layer.base_layer.weight, dim=1)
        assert torch.equal(layer.lora_magnitude_vector["new"].weight, norms)
    else:
        assert not layer.lora_B["new"].bias.any()
    assert not torch.allclose(layer(x), before)


def test_a_model_without_lora() -> None:
    with pytest.raises(ValueError, match="model has no layer with LoRA; see add_lora"):
        add_weighted_adapter(Mlp(), ["a"], (1,), "new")
