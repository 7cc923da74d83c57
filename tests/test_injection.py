"""`add_lora`: which layers it replaces, as compared with PEFT, what it leaves alone, and what it refuses."""

import copy

import peft
import pytest
import torch
import transformers
from tiny_models import Mlp, assert_untouched, bert, gpt2, injected, llama, snapshot, with_peft
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_ops import FusedLoraLinear, LoraConfig, add_adapter, add_lora, lora_layers, lora_parameters, merge_lora, remove_lora

TARGETS = [
    (llama, {}),
    (gpt2, {}),
    (bert, {}),
    (llama, {"target_modules": ["q_proj", "v_proj"]}),
    (llama, {"target_modules": ["mlp.up_proj", "model.layers.1.self_attn.o_proj", "lm_head"]}),
    (llama, {"target_modules": ["proj", "1.self_attn.k_proj"]}),
    (llama, {"target_modules": r".*layers\.1.*(q|k)_proj"}),
    (llama, {"target_modules": "lm_head"}),
    (llama, {"target_modules": "all-linear"}),
    (llama, {"target_modules": "ALL-linear", "exclude_modules": ["o_proj", "mlp.down_proj"]}),
    (llama, {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0\..*"}),
    (gpt2, {"target_modules": ["c_attn", "c_fc"]}),
    (gpt2, {"target_modules": ["attn.c_proj"]}),
    (gpt2, {"target_modules": "all-linear"}),
    (bert, {"target_modules": ["query", "value"]}),
    (bert, {"target_modules": ["dense"], "exclude_modules": ["pooler.dense"]}),
    (bert, {"target_modules": "all-linear"}),
    (Mlp, {"target_modules": "all-linear"}),
    (Mlp, {"target_modules": ["first", "0"]}),
    (Mlp, {"target_modules": r"block\.[02]"}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "fields"), TARGETS, ids=[f"{make.__name__}-{fields}" for make, fields in TARGETS])
def test_targets_what_peft_targets(make, fields):
    config = LoraConfig(**fields)
    model = make()
    expected = set(with_peft(copy.deepcopy(model), config).base_model.targeted_module_names)
    assert add_lora(model, config) is model
    assert {name for name, _ in lora_layers(model)} == expected
    assert expected


@pytest.mark.parametrize(
    "pattern",
    [
        {"q_proj": 2},
        {r"layers\.1\.self_attn\.[qv]_proj": 3, "q_proj": 5},
        {"model.layers.0.mlp.up_proj": 1},
        {"proj": 7},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_patterns_are_peft_s(pattern):
    """rank_pattern and alpha_pattern give the ranks, alphas and shapes that they give in PEFT."""
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules="all-linear",
        rank_pattern=pattern,
        alpha_pattern={k: v + 9 for k, v in pattern.items()},
    )
    model = llama()
    theirs = with_peft(copy.deepcopy(model), config).base_model.model
    for name, layer in lora_layers(add_lora(model, config)):
        expected = theirs.get_submodule(name)
        assert layer.r == expected.r
        assert layer.lora_alpha == expected.lora_alpha
        assert layer.scaling == expected.scaling
        assert layer.lora_A["default"].shape == expected.lora_A["default"].weight.shape
        assert layer.lora_B["default"].shape == expected.lora_B["default"].weight.shape


def test_parameters_of_a_large_llama():
    """r = 8 in the query and value layers of LLaMA-2-70B, whose values have an eighth of the heads: 80 · 8 · (16384 + 9216)."""
    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    add_lora(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    assert sum(p.numel() for p in lora_parameters(model)) == 16_384_000


def test_config_defaults_are_peft_s():
    ours, theirs = LoraConfig(), peft.LoraConfig()
    for name, value in vars(ours).items():
        assert value == getattr(theirs, name), name


def test_options_reach_the_layers():
    config = LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.25, use_rslora=True, init_lora_weights="gaussian", target_modules=["q_proj"]
    )
    model = add_lora(llama().eval(), config, "style", adapter_dtype=torch.bfloat16, prepack=True)
    for _, layer in lora_layers(model):
        assert (layer.r, layer.lora_alpha, layer.lora_dropout) == ({"style": 4}, {"style": 6}, {"style": 0.25})
        assert layer.scaling == {"style": 3.0}
        assert layer.lora_A["style"].dtype == torch.bfloat16
        assert layer.prepack
        assert not layer.training
    assert model.lora_injection.adapter_name == "style"
    assert model.lora_injection.config == config


def test_variants_reach_the_layers():
    model = add_lora(llama(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    add_adapter(model, LoraConfig(r=2, lora_bias=True), "b")
    for _, layer in lora_layers(model):
        assert layer.use_dora == {"default": True, "b": False}
        assert layer.lora_bias == {"default": False, "b": True}


def test_state_dict_keys():
    """The base model's, and <layer>.lora_A.default and lora_B.default beside them."""
    model = Mlp()
    base = set(model.state_dict())
    add_lora(model, LoraConfig(target_modules=["first", "last"]))
    added = {f"{layer}.lora_{m}.default" for layer in ("first", "last") for m in "AB"}
    assert set(model.state_dict()) == base | added
    for name, field in (("lora_magnitude_vector", "use_dora"), ("lora_B_bias", "lora_bias")):
        model = add_lora(Mlp(), LoraConfig(target_modules=["first"], **{field: True}))
        assert set(model.state_dict()) == base | {f"first.{name}.default", "first.lora_A.default", "first.lora_B.default"}


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("make", [gpt2, bert])
@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_what_trains_is_what_trains_in_peft(make, bias, variant):
    config = LoraConfig(target_modules=["c_attn", "query"], bias=bias, **variant)
    model = make()
    theirs = with_peft(copy.deepcopy(model), config)
    expected = {
        n.removeprefix("base_model.model.")
        .replace(".base_layer", "")
        .replace(".default.weight", ".default")
        .replace(".lora_B.default.bias", ".lora_B_bias.default")
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    add_lora(model, config)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    assert {id(p) for p in lora_parameters(model)} == {id(p) for p in adapters}


@pytest.mark.parametrize("target", ["block.0", "block.2"])
def test_a_module_in_two_places_gets_one_layer(target):
    model = Mlp()
    shared = model.block[2] = model.block[0]
    model.again = model.block
    add_lora(model, LoraConfig(target_modules=[target]))
    assert isinstance(model.block[0], FusedLoraLinear)
    assert model.block[2] is model.block[0]
    assert model.again[2] is model.block[0]
    assert len(list(lora_parameters(model))) == 2
    remove_lora(model)
    assert model.block[0] is model.block[2] is model.again[0] is shared


def test_tied_weights_stay_tied():
    model = llama(tie_word_embeddings=True)
    embedding = model.get_input_embeddings().weight
    add_lora(model, LoraConfig(target_modules=["lm_head"]))
    assert model.lm_head.weight is embedding
    W0 = embedding.clone()
    nn.init.normal_(model.lm_head.lora_B["default"])
    merge_lora(model)
    assert torch.equal(embedding, W0)
    assert not torch.equal(model.lm_head.weight, W0)
    remove_lora(model)
    assert model.lm_head.weight.data_ptr() == embedding.data_ptr()
    assert model.get_input_embeddings().weight is embedding


def test_hooks_survive():
    model, calls = Mlp(), []
    handle = model.first.register_forward_hook(lambda *_: calls.append("before"))
    x = torch.randn(2, 12)
    injected(model)(x)
    assert calls == ["before"]
    model.first.register_forward_pre_hook(lambda *_: calls.append("during"))
    handle.remove()
    model(x)
    assert calls == ["before", "during"]
    remove_lora(model)(x)
    assert calls == ["before", "during", "during"]


BAD_FIELDS = [
    ({"r": 0}, ValueError, "r must be an integer >= 1, got 0"),
    ({"r": 1.5}, ValueError, "r must be an integer >= 1, got 1.5"),
    ({"lora_alpha": float("nan")}, ValueError, "lora_alpha must be a finite number, got nan"),
    ({"lora_dropout": 1.0}, ValueError, "lora_dropout must be a number in [0, 1), got 1.0"),
    ({"bias": "lora"}, ValueError, 'bias must be "none", "all" or "lora_only", got \'lora\''),
    ({"use_rslora": "yes"}, TypeError, "use_rslora must be True or False, got 'yes'"),
    ({"init_lora_weights": "pizza"}, ValueError, '"pissa_niter_N" or "loftq_iter_N", got \'pizza\''),
    (
        {"target_modules": 3},
        TypeError,
        "target_modules must be a list of module names, a regular expression or None, got 3",
    ),
    ({"target_modules": ["q_proj", 3]}, TypeError, "target_modules must be a list of module names"),
    ({"target_modules": []}, ValueError, "target_modules is empty"),
    ({"target_modules": "q_(proj"}, ValueError, "target_modules must be a regular expression, got 'q_(proj'"),
    ({"exclude_modules": "*"}, ValueError, "exclude_modules must be a regular expression, got '*'"),
    ({"exclude_modules": {"a": 1}}, TypeError, "exclude_modules must be a list of module names"),
    ({"rank_pattern": ["q_proj"]}, TypeError, "rank_pattern must be a dict"),
    ({"rank_pattern": {"q_proj": 0}}, ValueError, "rank_pattern['q_proj']: r must be an integer >= 1, got 0"),
    (
        {"alpha_pattern": {"q_proj": "1"}},
        ValueError,
        "alpha_pattern['q_proj']: lora_alpha must be a finite number, got '1'",
    ),
    ({"alpha_pattern": {"(": 1}}, ValueError, "alpha_pattern's key must be a regular expression, got '('"),
    ({"rank_pattern": {3: 1}}, TypeError, "rank_pattern's key must be a regular expression, got 3"),
    ({"use_dora": 1}, TypeError, "use_dora must be True or False, got 1"),
    ({"lora_bias": True, "use_dora": True}, ValueError, "lora_bias must be False with use_dora, got True"),
]


@pytest.mark.parametrize(("fields", "kind", "message"), BAD_FIELDS)
def test_bad_config(fields, kind, message):
    """Is named with its value, when made or when changed later, and the model is left as it was."""
    with pytest.raises(kind) as caught:
        LoraConfig(**fields)
    assert message in str(caught.value)

    config = LoraConfig(target_modules=["first"])
    vars(config).update(fields)
    model = Mlp()
    before = snapshot(model)
    with pytest.raises(kind) as caught:
        add_lora(model, config)
    assert message in str(caught.value)
    assert_untouched(model, before)


def lazy():
    model = Mlp()
    model.first = nn.LazyLinear(16)
    return model


def parametrized():
    model = Mlp()
    nn.utils.parametrizations.orthogonal(model.first)
    return model


def integer():
    model = Mlp()
    model.first.weight = nn.Parameter(torch.zeros((16, 12), dtype=torch.int8), requires_grad=False)
    return model


def subclassed():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = Mlp()
    model.first = Scaled(12, 16)
    return model


def wrapped():
    """As accelerate's offloading does it."""
    model = Mlp()
    model.first.forward = model.first.forward
    return model


def attention():
    return nn.Sequential(nn.MultiheadAttention(8, 2), nn.TransformerEncoderLayer(8, 2))


BAD_MODELS = [
    (Mlp, {"target_modules": ["q_proj"]}, ValueError, "target_modules=['q_proj'] matches nothing in the model. "
     "The model has linear layers such as first, block.0, block.2, last"),
    (Mlp, {"target_modules": "firs"}, ValueError, "target_modules='firs' matches nothing"),
    (Mlp, {"target_modules": ["first"], "exclude_modules": "f.*"}, ValueError, "exclude_modules='f.*' takes away"),
    (Mlp, {}, ValueError, "target_modules is None, and there is no default for this model's config.model_type"),
    (Mlp, {"target_modules": ["first", "norm"]}, TypeError, "target_modules takes in norm, a LayerNorm, which is not"),
    (llama, {"target_modules": ["q_proj", "mlp"]}, TypeError, "takes in model.layers.0.mlp, a LlamaMLP"),
    (lazy, {"target_modules": ["block.0", "first"]}, TypeError, "no plain nn.Parameter but UninitializedParameter"),
    (parametrized, {"target_modules": "all-linear"}, TypeError, "its weight is no plain nn.Parameter but Tensor"),
    (integer, {"target_modules": "all-linear"}, TypeError, "its weight is torch.int8"),
    (subclassed, {"target_modules": "all-linear"}, TypeError, "takes in first, a Scaled, which is not supported: only"),
    (wrapped, {"target_modules": "all-linear"}, TypeError, "with their own forward"),
    (attention, {"target_modules": ["0.out_proj"]}, TypeError, "MultiheadAttention reads its weight"),
    (attention, {"target_modules": ["linear1"]}, TypeError, "TransformerEncoderLayer reads its weight"),
    (lambda: nn.Linear(3, 4), {"target_modules": "all-linear"}, TypeError, "model is itself a Linear, which cannot be"),
    (lambda: Conv1D(3, 4), {"target_modules": "all-linear"}, TypeError, "model is itself a Conv1D"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "fields", "kind", "message"), BAD_MODELS, ids=[case[3] for case in BAD_MODELS])
def test_bad_models(make, fields, kind, message):
    """Are errors that name what does not fit, and the model is left as it was."""
    model = make()
    lazily = make is lazy
    before = None if lazily else snapshot(model)
    with pytest.raises(kind) as caught:
        add_lora(model, LoraConfig(**fields))
    assert message in str(caught.value)
    if lazily:
        assert isinstance(model.first, nn.LazyLinear)
        assert all(p.requires_grad for p in model.parameters())
    else:
        assert_untouched(model, before)


@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize("target_modules", [["q_proj"], ["k_proj"]])
def test_adding_twice_is_an_error(name, target_modules):
    model = add_lora(llama(), LoraConfig(target_modules=["q_proj"]))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r'model already has LoRA: adapter "default" in .*q_proj.* left untouched'):
        add_lora(model, LoraConfig(r=2, target_modules=target_modules), name)
    assert_untouched(model, before)
    assert model.lora_injection.config.r == 8


def test_adding_to_a_peft_model_is_an_error():
    model = with_peft(llama(), LoraConfig())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model already has an adapter of PEFT's in .*q_proj"):
        add_lora(model, LoraConfig(target_modules="all-linear"))
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("a.b",), ValueError, "adapter_name must be a non-empty string without a dot"),
        (("default", torch.int32), TypeError, "adapter_dtype must be float32"),
    ],
)
def test_bad_arguments(arguments, kind, message):
    """Are named, and the model is left as it was."""
    name, *adapter_dtype = arguments
    model = Mlp()
    before = snapshot(model)
    with pytest.raises(kind, match=message):
        add_lora(model, LoraConfig(target_modules=["first"]), name, adapter_dtype=next(iter(adapter_dtype), None))
    assert_untouched(model, before)


def test_wrong_types():
    """Of config and model are named."""
    with pytest.raises(TypeError, match=r"config must be a lora_ops\.LoraConfig, got peft\."):
        add_lora(Mlp(), peft.LoraConfig())
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
        add_lora([], LoraConfig())


def test_a_failure_halfway_changes_nothing(monkeypatch):
    """Out of memory, say, at the third layer."""
    model = llama()
    before = snapshot(model)
    build, built = FusedLoraLinear.from_linear, []

    def failing(linear, *arguments, **options):
        if len(built) == 2:
            raise MemoryError("no more")
        built.append(linear)
        return build(linear, *arguments, **options)

    monkeypatch.setattr(FusedLoraLinear, "from_linear", failing)
    with pytest.raises(MemoryError, match="no more"):
        add_lora(model, LoraConfig(target_modules="all-linear"))
    assert_untouched(model, before)


def test_warns_of_what_matches_nothing():
    config = LoraConfig(target_modules=["q_proj"], rank_pattern={"q_prj": 2}, exclude_modules=["v_prj"])
    with pytest.warns(UserWarning) as caught:
        add_lora(llama(), config)
    messages = [str(w.message) for w in caught]
    assert messages == [
        "rank_pattern has keys that match no targeted module: q_prj",
        "exclude_modules=['v_prj'] matches nothing in the model",
    ]
