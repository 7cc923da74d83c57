"""Patched PEFT models: embeddings, and convolutions that are matrix products."""

import copy

import compare
import peft
import pytest
import torch
from compare import BF16, F16, F32, Dtypes, every_dtype
from other_layers import assert_as_near, errors, factors, layer_of, run, with_peft
from peft_layers import One
from test_conv import OTHERS, PRODUCTS, Mask, cases, make_x
from test_embedding import IDS, N, V, scaled
from torch import Tensor, nn

from lora_ops import functional
from lora_ops.integrations import peft as integration

FP32 = Dtypes(F32, F32)
TWO = ("default", "second")
OVERLAP = "its convolution is no matrix product: windows overlap, are padded, have holes, or are in groups"


def pair(base: nn.Module, dtypes: Dtypes = FP32, names: tuple[str, ...] = ("default",), **options):
    """PEFT's layer, stock and patched."""
    stock = with_peft(base, dtypes, names, **options)
    patched = integration.patch(copy.deepcopy(stock))
    for model in (stock, patched):
        bias = getattr(layer_of(model).base_layer, "bias", None)
        if bias is not None:
            bias.requires_grad_()
    return stock, patched


def assert_fused(model: nn.Module) -> None:
    report = integration.report(model)
    assert (report.fused, report.not_fused) == (["base_model.model.layer"], {})


@every_dtype
@cases(PRODUCTS)
@pytest.mark.parametrize("names", [("default",), TWO], ids=len)
def test_convolutions(monkeypatch, dtypes: Dtypes, base, shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    stock, patched = pair(base(), dtypes, names)
    assert_fused(patched)
    calls = []
    monkeypatch.setattr("lora_ops.convolution.lora_linear", lambda *a, **k: calls.append(1) or functional.lora_linear(*a, **k))
    x = make_x(shape, dtypes.x)
    assert_as_near(layer_of(patched), layer_of(stock), x)
    assert calls == [1]
    assert patched(x).is_contiguous()


@every_dtype
@pytest.mark.parametrize("names", [("default",), TWO], ids=len)
def test_embeddings(dtypes: Dtypes, names: tuple[str, ...]) -> None:
    stock, patched = pair(nn.Embedding(V, N, padding_idx=3, max_norm=2.0), dtypes, names)
    assert_fused(patched)
    assert_as_near(layer_of(patched), layer_of(stock), IDS)
    for name, factor in factors(layer_of(patched)).items():
        assert torch.equal(factor, factors(layer_of(stock))[name])


@pytest.mark.parametrize("of", ["embedding", "scaled embedding", "2d", "2d patches"])
@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"autocast": BF16}, {"adapter": F16}, {"tensor scaling": True}], ids=str
)
def test_options(of: str, options: dict) -> None:
    bases = {"embedding": lambda: nn.Embedding(V, N), "scaled embedding": scaled}
    base, x = (bases[of], IDS) if of in bases else (PRODUCTS[of][0], make_x(PRODUCTS[of][1]))
    rslora, autocast, adapter = options.get("use_rslora", False), options.get("autocast"), options.get("adapter", F32)
    stock, patched = pair(base(), FP32, TWO, use_rslora=rslora)
    exact = run(copy.deepcopy(layer_of(stock)).double(), x.double() if x.is_floating_point() else x)
    for model in (stock, patched):
        for factor in factors(layer_of(model)).values():
            factor.data = factor.data.to(adapter)
        if "tensor scaling" in options:  # as prepare_model_for_compiled_hotswap leaves it
            layer_of(model).scaling = {name: torch.tensor(s) for name, s in layer_of(model).scaling.items()}
    if adapter is not F32:
        exact = run(copy.deepcopy(layer_of(stock)).double(), x.double() if x.is_floating_point() else x)
    assert_fused(patched)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        actual, eager = run(layer_of(patched), x), run(layer_of(stock), x)
    compare.assert_within_bound({name: compare.error(actual[name], eager[name], exact[name]) for name in eager})


@every_dtype
@pytest.mark.parametrize("names", [("default",), TWO], ids=len)
def test_dropout(dtypes: Dtypes, names: tuple[str, ...]) -> None:
    """One mask is drawn in the kernel, those of further adapters by nn.Dropout, after it."""
    stock, patched = pair(nn.Conv2d(3, 20, (2, 4), (2, 4)), dtypes, names, lora_dropout=0.4)
    layer_of(stock).lora_dropout["default"] = Mask(0.4, (2, 4))
    assert_fused(patched)
    assert_as_near(layer_of(patched), layer_of(stock), make_x((2, 3, 6, 8), dtypes.x))


def test_lora_bias() -> None:
    stock, patched = pair(nn.Conv2d(12, 20, 1), lora_bias=True)
    for model in (stock, patched):
        layer_of(model).lora_B["default"].bias.data = torch.linspace(-1, 1, 20)
    assert_fused(patched)
    assert_as_near(layer_of(patched), layer_of(stock), make_x((3, 12, 5, 4)))


@cases(OTHERS)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_what_overlaps_is_peft_s(base, shape: tuple[int, ...]) -> None:
    stock, patched = pair(base())
    assert integration.report(patched).not_fused == {"base_model.model.layer": OVERLAP}
    x = make_x(shape)
    assert torch.equal(patched(x), stock(x))


def hooked(model: nn.Module) -> None:
    layer_of(model).base_layer.register_forward_hook(lambda *_: None)


REASONS = {
    "disabled": (lambda model: model.base_model.disable_adapter_layers(), "its adapters are disabled"),
    "merged": (lambda model: model.base_model.merge_adapter(), "its adapters are merged"),
    "none active": (lambda model: model.base_model.set_adapter([]), "no adapter of it is active"),
    "trained": (lambda model: layer_of(model).base_layer.weight.requires_grad_(), "its base weight is trained"),
    "hooks": (hooked, "its base layer has hooks or another forward"),
    "odd factors": (
        lambda model: layer_of(model).lora_A.update({"default": nn.Identity()}),
        'adapter "default": its factors are Identity of NoneType, or have hooks',
    ),
}


@pytest.mark.parametrize(("change", "reason"), REASONS.values(), ids=REASONS)
def test_reasons(change, reason: str) -> None:
    _, patched = pair(nn.Conv2d(12, 20, 1))
    change(patched)
    assert integration.report(patched).not_fused == {"base_model.model.layer": reason}


def test_a_distributed_embedding_is_peft_s() -> None:
    _, patched = pair(nn.Embedding(V, N))
    layer_of(patched).input_fns["default"] = lambda inputs: inputs[0]
    assert integration.report(patched).not_fused == {"base_model.model.layer": 'adapter "default": it is distributed'}


def test_dora_is_peft_s() -> None:
    for base, x, name in (
        (nn.Conv2d(12, 20, 1), make_x((3, 12, 5, 4)), "DoraConv2d"),
        (nn.Embedding(V, N), IDS, "DoraEmbedding"),
    ):
        stock, patched = pair(base, use_dora=True)
        assert integration.report(patched).not_fused == {"base_model.model.layer": f'adapter "default": it is a {name}'}
        assert torch.equal(patched(x), stock(x))


@pytest.mark.parametrize("of", ["embedding", "convolution"])
def test_the_rest_is_peft_s(of: str, tmp_path) -> None:
    """Mixed batches, merging, disabling, saving, unpatching."""
    base, x = (nn.Embedding(V, N), IDS) if of == "embedding" else (nn.Conv2d(12, 20, 1), make_x((2, 12, 5, 4)))
    stock, patched = pair(base, names=TWO)
    assert repr(patched) == repr(stock)
    with torch.no_grad():
        mixed = [model.eval()(x, adapter_names=["second", "__base__"]) for model in (stock, patched)]
        assert torch.equal(*mixed)
        for method in ("merge_adapter", "unmerge_adapter"):
            for model in (stock, patched):
                getattr(model.base_model, method)()
        with stock.disable_adapter(), patched.disable_adapter():
            assert torch.equal(patched(x), stock(x))
    patched.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(One(copy.deepcopy(layer_of(patched).base_layer)), tmp_path / "second", "second")
    for name, factor in factors(layer_of(again)).items():
        assert torch.equal(factor, factors(layer_of(stock))[name])
    integration.unpatch(patched)
    assert type(layer_of(patched)) is type(layer_of(stock))
    assert torch.equal(patched(x), stock(x))


def test_what_fails_in_peft() -> None:
    """As docs/coming_from_peft.md says; ours are in test_conv.py and test_embedding.py."""
    with pytest.raises(RuntimeError, match="size"):
        with_peft(nn.Conv3d(3, 4, (1, 1, 2)), FP32).merge_adapter()
    with pytest.raises(RuntimeError, match="must match the size"):
        with_peft(nn.Conv1d(3, 4, 3, dilation=2), FP32)(torch.randn(1, 3, 9))
    circular, x = with_peft(nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), FP32).double(), make_x((1, 3, 9)).double()
    y = circular(x)
    circular.merge_adapter()
    assert not torch.allclose(circular(x), y)
    with pytest.raises(RuntimeError, match="transpositions between sparse and dense"):
        with_peft(nn.Embedding(V, N, sparse=True), FP32)(IDS).sum().backward()


def test_compile_has_no_graph_break() -> None:
    for base, x in ((nn.Embedding(V, N), IDS), (nn.Conv2d(60, 70, 1), make_x((2, 60, 8, 8)))):
        _, patched = pair(base)
        layer = layer_of(patched)
        expected = run(layer, x)
        layer.compile(backend="aot_eager", fullgraph=True)
        for name, t in run(layer, x).items():
            assert torch.equal(t, expected[name]), name


def test_a_gradient_that_is_wrong_fails(monkeypatch) -> None:
    stock, patched = pair(nn.Conv2d(12, 20, 1))

    def wrong(x: Tensor, weight: Tensor, A: Tensor, *rest, **options) -> Tensor:
        return functional.lora_linear(x, weight, A * 1.02 - A.detach() * 0.02, *rest, **options)

    monkeypatch.setattr("lora_ops.convolution.lora_linear", wrong)
    measured = errors(layer_of(patched), layer_of(stock), make_x((3, 12, 5, 4)))
    assert [name for name, e in measured.items() if not e.within_bound] == ["lora_A.default"]
