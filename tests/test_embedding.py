"""FusedLoraEmbedding beside PEFT's `lora.Embedding` and fp64."""

import copy

import compare
import pytest
import torch
from compare import BF16, F32, every_dtype
from other_layers import assert_as_near, factors, layer_of, ours_like, run, with_peft
from tiny_models import DUPLICATES
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from lora_ops import FusedLoraEmbedding, LoraConfig, add_lora, remove_lora

V, N = 30, 24
IDS = torch.tensor([[0, 3, 3, 29, 7], [7, 1, 0, 2, 3]])
FP32 = compare.Dtypes(F32, F32)


def scaled() -> nn.Module:
    return Gemma3TextScaledWordEmbedding(V, N, padding_idx=1, embed_scale=5.0)


def scaled_by_a_number() -> nn.Module:
    return BartScaledWordEmbedding(V, N, padding_idx=1, embed_scale=5.0)


def make(names: tuple[str, ...] = ("default",), dtypes: compare.Dtypes = FP32, base: nn.Module | None = None, **options):
    """PEFT's layer and ours."""
    theirs = layer_of(with_peft(base or nn.Embedding(V, N), dtypes, names, **options))
    return theirs, ours_like(theirs)


@every_dtype
@pytest.mark.parametrize("names", [("default",), ("default", "second", "third")], ids=len)
@pytest.mark.parametrize("ids", [IDS, IDS[0], IDS[:0], torch.tensor(5)], ids=lambda ids: str(tuple(ids.shape)))
def test_as_near_to_fp64_as_peft(dtypes: compare.Dtypes, names: tuple[str, ...], ids: torch.Tensor) -> None:
    theirs, ours = make(names, dtypes)
    assert_as_near(ours, theirs, ids)


@pytest.mark.parametrize(
    "options",
    [{"padding_idx": 3}, {"scale_grad_by_freq": True}, {"max_norm": 0.9, "norm_type": 1.5}],
    ids=str,
)
def test_settings_act_as_in_peft(options: dict) -> None:
    theirs, ours = make(base=nn.Embedding(V, N, **options))
    assert_as_near(ours, theirs, IDS)
    for name, factor in factors(ours).items():  # max_norm scales A down in place
        assert torch.equal(factor, factors(theirs)[name])
    assert torch.equal(ours.weight, theirs.base_layer.weight)
    if "padding_idx" in options:
        dA = run(ours, IDS)["lora_embedding_A.default"]
        assert dA[:, 3].count_nonzero() == 0
        assert dA[:, 7].count_nonzero() > 0


def test_gradients_of_a_sparse_embedding_are_dense() -> None:
    theirs, ours = make(base=nn.Embedding(V, N, sparse=True))
    with torch.no_grad():
        measured = compare.error(ours(IDS), theirs(IDS), copy.deepcopy(theirs).double()(IDS))
    assert measured.within_bound, measured
    theirs.base_layer.sparse = False  # with which PEFT's backward fails
    assert_as_near(ours, theirs, IDS)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("base", [scaled, scaled_by_a_number])
def test_scaled_embeddings(base, dtype: torch.dtype) -> None:
    theirs, ours = make(dtypes=compare.Dtypes(dtype, F32), base=base())
    assert_as_near(ours, theirs, IDS)
    ours.merge()
    merged = copy.deepcopy(theirs).double()
    merged.merge()
    measured = compare.error(ours(IDS), theirs(IDS), merged(IDS))
    assert measured.within_bound, measured


def test_a_scaled_embedding_comes_back() -> None:
    model = nn.ModuleDict({"words": scaled()})
    expected = copy.deepcopy(model).double().words(IDS)
    names = set(model.state_dict())
    add_lora(model, LoraConfig(target_modules=["words"], init_lora_weights=False)).double()
    assert {name for name in model.state_dict() if "lora_" not in name} == names
    remove_lora(model)
    assert model.words.embed_scale.dtype == torch.float64
    assert torch.equal(model.words(IDS), expected)


def test_autocast_rounds_nothing() -> None:
    theirs, ours = make()
    expected = ours(IDS)
    with torch.autocast("cpu", BF16):
        assert torch.equal(ours(IDS), expected)
        assert theirs(IDS).dtype == F32


def test_initialisation() -> None:
    """Shapes, dtypes and starting values are PEFT's."""
    for init in (True, "gaussian", False):
        base = nn.Embedding(V, 2000).to(BF16)
        ours = FusedLoraEmbedding.from_embedding(copy.deepcopy(base), 3, init_lora_weights=init)
        theirs = factors(layer_of(with_peft(base, compare.Dtypes(BF16, F32), r=3, init_lora_weights=init)))
        for name, factor in factors(ours).items():
            assert (factor.shape, factor.dtype) == (theirs[name].shape, theirs[name].dtype)
            assert bool(factor.any()) == bool(theirs[name].any())
        assert ours.lora_embedding_B["default"].std().item() == pytest.approx(1, abs=0.05)
        assert torch.equal(ours(IDS), base(IDS)) == bool(init)


def test_state_dict_and_sharing() -> None:
    base = nn.Embedding(V, N, padding_idx=2).to(BF16)
    layer = FusedLoraEmbedding.from_embedding(base, 3, adapter_name="style")
    assert layer.weight is base.weight
    assert not base.weight.requires_grad
    assert list(layer.state_dict()) == ["weight", "lora_embedding_A.style", "lora_embedding_B.style"]
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {
        "lora_embedding_A.style",
        "lora_embedding_B.style",
    }
    assert layer.lora_A is layer.lora_embedding_A
    assert layer.lora_B is layer.lora_embedding_B
    assert "30, 24, padding_idx=2, r=3" in repr(layer)


def test_merging_is_exact_and_leaves_who_shares_the_weight_alone() -> None:
    theirs, ours = make(("default", "second"), compare.Dtypes(BF16, F32))
    head = nn.Linear(N, V, bias=False)
    head.weight = shared = ours.weight
    W0 = shared.clone()
    merged = copy.deepcopy(theirs).double()
    merged.merge()
    ours.merge()
    expected = (W0.double() + merged.base_layer.weight - theirs.base_layer.weight.double()).to(BF16)
    assert torch.equal(ours.weight, expected)
    assert torch.equal(ours(IDS), nn.functional.embedding(IDS, expected))
    assert head.weight is shared
    assert torch.equal(shared, W0)
    with pytest.raises(RuntimeError, match="merged already"):
        ours.merge()
    ours.to(F32)
    assert shared.dtype == F32
    ours.unmerge()
    assert ours.weight is shared
    assert torch.equal(ours.weight, W0.to(F32))
    with pytest.raises(RuntimeError, match="nothing is merged"):
        ours.unmerge()
    ours.lora_embedding_B["second"].data.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite; nothing was changed"):
        ours.merge()
    with pytest.raises(TypeError, match="to must be float32"):
        ours.merge(torch.int8)


def test_named_adapters() -> None:
    _, layer = make(("default", "second"))
    base = nn.functional.embedding(IDS, layer.weight)
    both = layer(IDS)
    layer.set_adapter("second")
    second = layer(IDS)
    assert not torch.equal(second, both)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == [
        "lora_embedding_A.second", "lora_embedding_B.second"
    ]  # fmt: skip
    layer.disable_adapters()
    assert torch.equal(layer(IDS), base)
    layer.enable_adapters()
    assert torch.equal(layer(IDS), second)
    layer.delete_adapter("second")
    assert torch.equal(layer(IDS), base)
    assert list(layer.lora_embedding_A) == list(layer.r) == ["default"]
    with pytest.raises(RuntimeError, match="no adapter is active"):
        layer.merge()


@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_duplicates(duplicate) -> None:
    _, layer = make(("default", "second"))
    assert torch.equal(duplicate(layer)(IDS), layer(IDS))
    layer.merge()
    other = duplicate(layer)
    assert torch.equal(other(IDS), layer(IDS))
    other.unmerge()
    assert not torch.equal(other(IDS), layer(IDS))


def test_a_new_layer_and_compile() -> None:
    layer = FusedLoraEmbedding(V, N, 3, padding_idx=2, init_lora_weights=False, dtype=BF16)
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx, layer.weight.dtype) == (V, N, 2, BF16)
    assert layer.lora_A["default"].dtype == F32
    expected = run(layer, IDS)
    layer.compile(backend="aot_eager", fullgraph=True)
    for name, t in run(layer, IDS).items():
        assert torch.equal(t, expected[name])


class Odd(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids).tanh()


@pytest.mark.parametrize(
    ("make_it", "kind", "words"),
    [
        (lambda: FusedLoraEmbedding.from_embedding(Odd(V, N)), TypeError, "embedding must be an nn.Embedding .* got Odd"),
        (lambda: FusedLoraEmbedding.from_embedding(nn.Linear(3, 4)), TypeError, "got Linear"),
        (lambda: FusedLoraEmbedding.from_embedding(nn.Embedding(V, N), 0), ValueError, "r must be an integer >= 1, got 0"),
        (lambda: FusedLoraEmbedding(V, N, lora_alpha=float("nan")), ValueError, "lora_alpha must be a finite number"),
        (lambda: make()[1].add_adapter("default"), ValueError, "adapter_name must be a new name"),
    ],
)
def test_errors(make_it, kind, words) -> None:
    with pytest.raises(kind, match=words):
        make_it()
