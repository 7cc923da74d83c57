"""What the tests of modules and models share: small layers, tiny models, their PEFT counterparts, the comparisons."""

import copy
import io
import pickle

import numpy as np
import torch
import transformers
from compare import error
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_ops import FusedLoraLinear, LoraConfig, add_lora, lora_layers

K, N, M, R = 48, 40, 20, 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_layer(dtype=torch.float32, linear=None, **options):
    """A layer whose adapter does something: B is not zero."""
    layer = FusedLoraLinear.from_linear(linear or nn.Linear(K, N, dtype=dtype), R, **options)
    for B in layer.lora_B.values():
        nn.init.normal_(B, std=0.3)
    return layer


def make_x(dtype=torch.float32):
    return torch.randn(M, K).to(dtype)


def conv1d(dtype=torch.float32):
    conv = Conv1D(N, K).to(dtype)
    nn.init.normal_(conv.bias)
    return conv


def eager(layer, x):
    """PEFT's arithmetic with the layer's parameters."""
    name = layer.active_adapter
    A, B = layer.lora_A[name], layer.lora_B[name]
    base = nn.functional.linear(x, layer.weight, layer.bias)
    return (base + layer.scaling[name] * (x.to(A.dtype) @ A.T @ B.T)).to(base.dtype)


def exactly(layer, x):
    """eager's arithmetic in long double, rounded once, to float64: an oracle for layers in float64, too."""
    name = layer.active_adapter
    tensors = (x, layer.weight, layer.lora_A[name], layer.lora_B[name], layer.bias)
    x, W, A, B, bias = (t.detach().double().numpy().astype(np.longdouble) for t in tensors)
    return torch.from_numpy((x @ W.T + bias + layer.scaling[name] * (x @ A.T @ B.T)).astype(np.float64))


def assert_computes(layer, x):
    """The layer's output is as near to the exact one as eager's."""
    measured = error(layer(x), eager(layer, x), exactly(layer, x))
    assert measured.within_bound, measured


VOCABULARY = 96
SPREAD = 0.16  # of the initial weights: with the usual 0.02 such narrow models hardly depend on their input


def llama(**options):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, initializer_range=SPREAD, **sizes | options)
    return transformers.LlamaForCausalLM(config)


def gpt2():
    """Its linear layers are Conv1D."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=SPREAD,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert():
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=SPREAD, num_labels=50,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


class Mlp(nn.Module):
    """No transformers model, one layer outside any block."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.block = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.norm = nn.LayerNorm(16)
        self.last = nn.Linear(16, 4, bias=False)

    def forward(self, x):
        return self.last(self.norm(self.block(self.first(x).relu())))


def tokens():
    """Three sequences that count, by 1, 2 and 3: something that can be learnt."""
    first, step, position = torch.tensor([[5], [40], [71]]), torch.tensor([[1], [2], [3]]), torch.arange(17)
    return (first + step * position) % VOCABULARY


def with_peft(model, config):
    import peft  # late: it takes seconds, and processes that tests start do without

    return peft.get_peft_model(model, peft.LoraConfig(**vars(config)))


def copy_adapters(peft_model, model):
    """A as PEFT has it; B, which PEFT leaves at zero, random in both."""
    import peft

    layers = {name: m for name, m in peft_model.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    ours = dict(lora_layers(model))
    assert sorted(layers) == sorted(ours)
    with torch.no_grad():
        for name, layer in layers.items():
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            nn.init.normal_(B, std=0.2)
            ours[name].lora_A["default"].copy_(A)
            ours[name].lora_B["default"].copy_(B)


def injected(model, quant=None, **fields):
    """The model with adapters that do something."""
    add_lora(model, LoraConfig(**{"target_modules": "all-linear", "r": 4, **fields}), quant=quant)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B["default"], std=0.2)
    return model


def snapshot(model):
    """All that an error must leave as it is."""
    state = {name: t.clone() for name, t in model.state_dict().items()}
    return (
        list(model.named_modules()),
        {n: p.requires_grad for n, p in model.named_parameters()},
        state,
        set(vars(model)),
    )


def assert_untouched(model, before):
    modules, flags, state, attributes = snapshot(model)
    assert [(n, id(m)) for n, m in modules] == [(n, id(m)) for n, m in before[0]]
    assert flags == before[1]
    assert state.keys() == before[2].keys()
    assert all(torch.equal(t, before[2][name]) for name, t in state.items())
    assert attributes == before[3]


def three_models(make, dtype, config, **options):
    """Ours, PEFT's, and PEFT's in fp64, with the same weights and adapters."""
    model = make().to(dtype)
    theirs = with_peft(copy.deepcopy(model), config)
    add_lora(model, config, **options)
    copy_adapters(theirs, model)
    return model, theirs, copy.deepcopy(theirs).double()


def assert_as_exact(results):
    """Our error is at most 1.5 times PEFT's, against PEFT in fp64, for (ours, theirs, exact) of several models.

    Root mean square over all of them: in a whole model's outputs every error is one of the few that were made early,
    grown, so that the largest single one is chance.
    """
    ours, theirs, exact = (torch.cat([t.detach().double().flatten() for t in side]) for side in zip(*results, strict=True))
    error, peft_error = (ours - exact).norm(), (theirs - exact).norm()
    assert peft_error > 0
    assert error <= 1.5 * peft_error, f"error {error:.3g}, PEFT's {peft_error:.3g}"


def copied(module):
    return copy.deepcopy(module)


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


DUPLICATES = [copied, pickled, saved]
