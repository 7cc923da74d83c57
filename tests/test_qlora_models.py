"""Whole models in 4 bits: quantised here or by bitsandbytes, against PEFT over the same weights; merged, restored, refused."""

import copy

import bitsandbytes
import pytest
import torch
import transformers
from quantised_layers import assert_same_weight
from safetensors.torch import load_file
from tiny_models import (
    DUPLICATES,
    SPREAD,
    VOCABULARY,
    Mlp,
    assert_as_exact,
    assert_untouched,
    copy_adapters,
    gpt2,
    injected,
    llama,
    snapshot,
    tokens,
    with_peft,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_ops import (
    FusedLoraLinear,
    LoraConfig,
    NF4Weight,
    add_lora,
    lora_layers,
    lora_parameters,
    merge_lora,
    quantize_nf4,
    remove_lora,
    unmerge_lora,
)

CONFIG = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


def exact_model(model):
    """In float64, with W = code · absmax exactly."""
    model = copy.deepcopy(model)
    for _, layer in lora_layers(model):
        layer.weight = nn.Parameter(layer.weight.dequantize(torch.float64), requires_grad=False)
    return model.double()


def logits_of(model):
    return model(tokens()).logits


def loss_of(model):
    return nn.functional.cross_entropy(logits_of(model)[:, :-1].flatten(0, 1).double(), tokens()[:, 1:].flatten())


def gradients_of(model):
    loss_of(model).backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


def assert_no_less_exact(pair):
    """Logits and gradients of our model beside PEFT's, a new pair of them in each of several draws."""
    logits, gradients = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        model, theirs = pair()
        copy_adapters(theirs, model)
        models = model, theirs, exact_model(model)
        logits.append([logits_of(m) for m in models])
        gradients += zip(*(gradients_of(m) for m in models), strict=True)
    assert_as_exact(logits)
    assert_as_exact(gradients)


# --- quantised here ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("options", [{"quant": "nf4"}, {"quant": "fp4", "blocksize": 128, "double_quant": False}], ids=str)
def test_add_lora_quantises_what_is_targeted(make, options):
    """And nothing else: the output layer, which all-linear leaves out, stays dense."""
    model = make()
    before = copy.deepcopy(model)
    add_lora(model, CONFIG, **options)
    layers = dict(lora_layers(model))
    assert len(layers) == len([m for m in before.modules() if isinstance(m, nn.Linear | Conv1D)]) - 1
    for name, layer in layers.items():
        original = before.get_submodule(name)
        weight = original.weight.T if isinstance(original, Conv1D) else original.weight
        arguments = options.get("blocksize", 64), options.get("double_quant", True), options["quant"]
        assert_same_weight(layer.weight, quantize_nf4(weight, *arguments))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.lora_{m}.default" for name in layers for m in "AB"
    }


def with_dense_weights(model):
    """The model before add_lora, but for its weights: the dequantised ones, rounded to their dtype."""
    return remove_lora(copy.deepcopy(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_is_no_less_exact_than_peft_over_the_dequantised_weights(make, dtype):
    """Logits and the adapters' gradients."""

    def pair():
        model = add_lora(make().to(dtype).eval(), CONFIG, quant="nf4")
        return model, with_peft(with_dense_weights(model), CONFIG).eval()

    assert_no_less_exact(pair)


def test_trains():
    """The loss falls to less than half; codes and scales stay."""
    model = add_lora(llama(), CONFIG, quant="nf4")
    before = {name: layer.weight.clone() for name, layer in lora_layers(model)}
    optimiser, losses = torch.optim.AdamW(lora_parameters(model), lr=5e-3), []
    for _ in range(20):
        loss = loss_of(model)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    for name, layer in lora_layers(model):
        assert_same_weight(layer.weight, before[name])


@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_duplicates(duplicate):
    model = injected(llama().eval(), quant="nf4")
    other = duplicate(model)
    assert torch.equal(logits_of(other), logits_of(model))
    remove_lora(other)
    assert not list(lora_layers(other))
    assert list(lora_layers(model))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_remove_lora_gives_dense_layers_with_the_dequantised_weight(make):
    model = make()
    modules, flags = dict(model.named_modules()), {n: p.requires_grad for n, p in model.named_parameters()}
    injected(model, quant="nf4")
    weights = {name: layer.weight.dequantize() for name, layer in lora_layers(model)}
    merge_lora(model)
    remove_lora(model)
    assert dict(model.named_modules()) == modules
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    for name, weight in weights.items():
        restored = model.get_submodule(name)
        assert torch.equal(restored.weight.T if isinstance(restored, Conv1D) else restored.weight, weight)
    assert logits_of(model).isfinite().all()


def test_merge_lora_and_back():
    model = injected(llama().eval(), quant="nf4")
    exact = logits_of(exact_model(model))
    before, codes = logits_of(model), {name: layer.weight.clone() for name, layer in lora_layers(model)}
    merge_lora(model)
    assert all(0 < layer.merge_error < 0.15 for _, layer in lora_layers(model))
    assert not torch.equal(logits_of(model), before)
    unmerge_lora(model)
    merge_lora(model, to=torch.float32)
    assert all(isinstance(layer.weight, nn.Parameter) for _, layer in lora_layers(model))
    assert_as_exact([(logits_of(model), before, exact)])
    unmerge_lora(model)
    assert torch.equal(logits_of(model), before)
    for name, layer in lora_layers(model):
        assert_same_weight(layer.weight, codes[name])


def test_a_merge_that_fails_leaves_every_layer_unmerged():
    model = injected(llama(), quant="nf4")
    last = [layer for _, layer in lora_layers(model)][-1]
    with torch.no_grad():
        last.lora_A["default"].fill_(3e38)
    with pytest.raises(ValueError, match="not finite"):
        merge_lora(model)
    assert not any(layer.merged for _, layer in lora_layers(model))


# --- quantised by bitsandbytes ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A Llama whose rows are whole blocks (bitsandbytes errs on others), as it was, and saved in 4 bits."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=SPREAD,
    )  # fmt: skip
    paths = {name: tmp_path_factory.mktemp(name) for name in ("dense", "nf4")}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(paths["dense"])
    load_in_4_bits(paths["dense"]).save_pretrained(paths["nf4"])
    return paths


def load_in_4_bits(path):
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    return transformers.AutoModelForCausalLM.from_pretrained(path, quantization_config=quantization, dtype=torch.bfloat16)


def loaded_by_bitsandbytes(paths):
    """In training mode, or its first forward pass would repack the weights."""
    return transformers.AutoModelForCausalLM.from_pretrained(paths["nf4"], dtype=torch.bfloat16).train()


def loaded_without_bitsandbytes(paths):
    """The same files in a plain model, through the keys of the state dict."""
    model = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(paths["dense"])).bfloat16()
    add_lora(model, CONFIG, quant="nf4")
    missing, unexpected = model.load_state_dict(load_file(paths["nf4"] / "model.safetensors"), strict=False)
    assert not unexpected
    assert all("lora_" in key for key in missing)
    return model


def test_a_saved_4_bit_model_gives_the_same_logits_without_bitsandbytes(checkpoints):
    """Within the tolerance policy, against the exactly dequantised model in fp64; so does the live model, taken over."""
    theirs = loaded_by_bitsandbytes(checkpoints)
    model, taken_over = loaded_without_bitsandbytes(checkpoints), add_lora(loaded_by_bitsandbytes(checkpoints), CONFIG)
    for (name, layer), (other_name, other) in zip(lora_layers(model), lora_layers(taken_over), strict=True):
        assert name == other_name
        assert_same_weight(layer.weight, other.weight)
        assert_same_weight(layer.weight, NF4Weight.from_params4bit(theirs.get_submodule(name).weight))
    exact = logits_of(exact_model(model))
    for ours in (model, taken_over):
        assert_as_exact([[logits_of(ours), logits_of(theirs), exact]])


def test_is_no_less_exact_than_peft_over_bitsandbytes(checkpoints):
    """Logits and the adapters' gradients, of real Linear4bit layers wrapped by PEFT and taken over by us."""

    def pair():
        ours, theirs = (loaded_by_bitsandbytes(checkpoints) for _ in range(2))
        return add_lora(ours, CONFIG), with_peft(theirs, CONFIG)

    assert_no_less_exact(pair)


def test_remove_lora_gives_linear4bit_back(checkpoints):
    """The very modules, with the codes, scales and results that they had."""
    model = loaded_by_bitsandbytes(checkpoints)
    before, state, expected = dict(model.named_modules()), model.state_dict(), logits_of(model)
    add_lora(model, CONFIG)
    assert not any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in model.modules())
    assert not any(p.dtype == torch.uint8 for p in model.parameters())
    remove_lora(model)
    assert dict(model.named_modules()) == before
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(t, after[key]) for key, t in state.items())
    assert torch.equal(logits_of(model), expected)


def test_layers_that_are_in_4_bits_stay_and_others_follow(checkpoints):
    model = loaded_by_bitsandbytes(checkpoints)
    config = LoraConfig(target_modules=["q_proj", "lm_head"])
    add_lora(model, config, quant="nf4", blocksize=128)
    blocks = {name.split(".")[-1]: layer.weight.blocksize for name, layer in lora_layers(model)}
    assert blocks == {"q_proj": 64, "lm_head": 128}


# --- what it refuses --------------------------------------------------------------------------------------------------


def with_a_nan(model):
    model.block[2].weight.data[3, 4] = torch.nan
    return model


def in_float64(model):
    model.last.double()
    return model


@pytest.mark.parametrize(
    ("prepare", "options", "kind", "message"),
    [
        (with_a_nan, {"quant": "nf4"}, ValueError, r"block\.2: weight must be finite, got nan at \(3, 4\)"),
        (in_float64, {"quant": "nf4"}, TypeError, "last: dtype of a weight to quantise must be .* got torch.float64"),
        (lambda m: m, {"quant": "nf5"}, ValueError, "quant must be .* got 'nf5'"),
        (lambda m: m, {"quant": "nf4", "blocksize": 100}, ValueError, "blocksize must be one of .* got 100"),
        (lambda m: m, {"quant": "nf4", "prepack": True}, ValueError, "first: prepack must be False for a weight in 4 bits"),
    ],
)
def test_refused_and_left_untouched(prepare, options, kind, message):
    model = prepare(Mlp())
    modules, flags = dict(model.named_modules()), {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(kind, match=message):
        add_lora(model, LoraConfig(target_modules="all-linear"), **options)
    assert dict(model.named_modules()) == modules
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert "lora_injection" not in vars(model)


def test_repacked_layers_are_refused(checkpoints):
    model = loaded_by_bitsandbytes(checkpoints)
    before = snapshot(model)
    proj = model.model.layers[1].mlp.down_proj
    proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj: param has been repacked .*left untouched"):
        add_lora(model, CONFIG)
    proj.weight.quant_state.packing_format_for_cpu = False
    assert_untouched(model, before)


def test_unquantised_linear4bit_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), bitsandbytes.nn.Linear4bit(8, 8))
    with pytest.raises(TypeError, match=r"1, a Linear4bit, which is not supported: .*quantised Linear4bit"):
        add_lora(model, LoraConfig(target_modules=["0", "1"]), quant="nf4")
    assert not any(isinstance(m, FusedLoraLinear) for m in model)
