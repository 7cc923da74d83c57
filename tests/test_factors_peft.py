"""Providers beside PEFT's own layers, with PEFT's parameters."""

import copy

import peft
import pytest
import torch
from factored_layers import assert_close, randomised
from tiny_models import llama, tokens
from torch import nn

from lora_ops import add_factors, factors


def models_of(config, add):
    """PEFT's and ours, of one base model in fp64, PEFT's parameters random."""
    base = llama().double().eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    return randomised(theirs, 0.3), add(base)


def linears(model):
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.shape[0] < 96]


def assert_same(theirs, ours, parameters):
    """Outputs, and gradients of the parameters: pairs (PEFT's, ours), ours being set to PEFT's."""
    with torch.no_grad():
        for a, b in parameters:
            b.copy_(a.view_as(b))
    a, b = theirs(tokens()).logits, ours(tokens()).logits
    assert a.std() > 0.1
    assert_close(b, a, 1e-10)
    for model, y in ((theirs, a), (ours, b)):
        model.zero_grad()
        y.square().mean().backward()
    for a, b in parameters:
        assert a.grad.abs().max() > 0
        assert_close(b.grad, a.grad.view_as(b), 1e-9)


def layers_of(theirs, kind):
    return {name.removeprefix("base_model.model."): m for name, m in theirs.named_modules() if isinstance(m, kind)}


def test_vera_is_peft_s():
    """A and B come from the same seed, and are the same, for layers of every shape."""
    config = peft.VeraConfig(r=6, target_modules="all-linear", projection_prng_key=3)
    shared = factors.Pair.seeded(*factors.widest(linears(llama())), r=6, seed=3)
    theirs, ours = models_of(config, lambda m: add_factors(m, lambda name, linear: factors.vera(linear, shared)))
    layers = layers_of(theirs, peft.tuners.vera.layer.VeraLayer)
    assert len(layers) == 14
    first = next(iter(layers.values()))
    assert torch.equal(first.vera_A["default"].float(), shared.lora_A.float())
    assert torch.equal(first.vera_B["default"].float(), shared.lora_B.float())
    pairs = []
    for name, layer in layers.items():
        f = ours.get_submodule(name).factors
        pairs += [(layer.vera_lambda_d["default"], f.gate), (layer.vera_lambda_b["default"], f.B_scale)]
    assert_same(theirs, ours, pairs)


def test_vb_lora_is_peft_s():
    config = peft.VBLoRAConfig(r=3, target_modules="all-linear", num_vectors=12, vector_length=8, topk=3)
    shared = factors.VectorBank(12, 8)
    theirs, ours = models_of(config, lambda m: add_factors(m, lambda name, linear: factors.VBLora(linear, shared, 3, topk=3)))
    layers = layers_of(theirs, peft.tuners.vblora.layer.VBLoRALayer)
    assert len(layers) == 14
    pairs = [(next(iter(layers.values())).vblora_vector_bank["default"], shared.vectors)]
    for name, layer in layers.items():
        f = ours.get_submodule(name).factors
        pairs += [(layer.vblora_logits_A["default"], f.logits_A), (layer.vblora_logits_B["default"], f.logits_B)]
    assert_same(theirs, ours, pairs)


def test_a_mixture_is_a_masked_softmax_over_the_bank():
    bank, logits = factors.VectorBank(32, 4).double(), torch.randn(5, 6, 32, dtype=torch.float64)
    best, indices = logits.topk(2, dim=-1)
    masked = torch.full_like(logits, -torch.inf).scatter(-1, indices, best)
    assert_close(bank.mix(logits, 2), masked.softmax(-1) @ bank.vectors)


def test_ada_lora_s_forward_is_peft_s():
    """Λ is the gate; PEFT scales by lora_alpha / (r + 1e-5), r the rank at the start."""
    config = peft.AdaLoraConfig(init_r=5, lora_alpha=7, target_modules=["q_proj", "down_proj"], total_step=10)

    def add(model):
        make = lambda name, linear: factors.gated(linear, 5, gate=0.0, std=0.02, zero_B=False)  # noqa: E731
        return add_factors(model, make, target_modules=["q_proj", "down_proj"], scaling=7 / (5 + 1e-5))

    theirs, ours = models_of(config, add)
    pairs = []
    for name, layer in layers_of(theirs, peft.tuners.adalora.layer.SVDLinear).items():
        f = ours.get_submodule(name).factors
        layer.ranknum["default"].data.fill_(5)  # a parameter, and as such random above
        pairs += [(layer.lora_A["default"], f.pair.lora_A), (layer.lora_B["default"], f.pair.lora_B)]
        pairs += [(layer.lora_E["default"], f.gate)]
    assert len(pairs) == 12
    assert_same(theirs, ours, pairs)


@pytest.mark.parametrize("target", ["k_proj", "up_proj"])
def test_ia3_is_peft_s(target):
    """Llama's layers have no bias, which PEFT would scale, too."""
    config = peft.IA3Config(target_modules=[target], feedforward_modules=[])
    make = lambda m: add_factors(m, lambda name, linear: factors.ia3(linear), target_modules=[target])  # noqa: E731
    theirs, ours = models_of(config, make)
    layers = layers_of(theirs, peft.tuners.ia3.layer.IA3Layer)
    pairs = [(layer.ia3_l["default"], ours.get_submodule(name).factors.out_scale) for name, layer in layers.items()]
    assert len(pairs) == 2
    assert_same(theirs, ours, pairs)


def test_ia3_of_an_input_is_that_of_the_output_before():
    """PEFT's feedforward_modules: the input of down_proj is act(gate_proj(x)) ∘ up_proj(x)."""
    config = peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"])
    make = lambda m: add_factors(m, lambda name, linear: factors.ia3(linear), target_modules=["up_proj"])  # noqa: E731
    theirs, ours = models_of(config, make)
    layers = layers_of(theirs, peft.tuners.ia3.layer.IA3Layer)
    pairs = [
        (layer.ia3_l["default"], ours.get_submodule(name.replace("down_proj", "up_proj")).factors.out_scale)
        for name, layer in layers.items()
    ]
    assert_same(theirs, ours, pairs)
