"""FusedLoraLinear with DoRA and with biases of B, one adapter and several, beside PEFT's layers and fp64."""

import itertools
from dataclasses import replace

import compare
import pytest
import torch
from compare import BF16, F32, Dtypes
from dora_layers import F64, KINDS, Case, in_fp64, make_ours, make_stock, measured, results_of, with_masks
from peft_layers import K, N, Setting, run
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_ops import FusedLoraLinear

BASES = [{}, {"bias": False}, {"kind": "conv1d"}, {"kind": "4bit"}]
DROPOUTS = [(0.0, 0.0, 0.0), (0.25, 0.25, 0.25), (0.25, 0.0, 0.5)]
CASES = [
    Case(kinds, Setting(dtypes, **base), dropouts)
    for kinds, dtypes, base, dropouts in itertools.product(KINDS, compare.DTYPES, BASES, DROPOUTS)
    if len(kinds) == 1 or (base in ({}, {"kind": "4bit"}) and dtypes in (Dtypes(F32, F32), Dtypes(BF16, F32)))
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients(case: Case) -> None:
    compare.assert_within_bound(measured(case))


@pytest.mark.parametrize("dropouts", DROPOUTS[:2], ids=str)
@pytest.mark.parametrize("kinds", KINDS[:4], ids="+".join)
@pytest.mark.parametrize("dtypes", [Dtypes(F32, F32), Dtypes(BF16, F32)], ids=str)
def test_autocast(dtypes: Dtypes, kinds: tuple[str, ...], dropouts: tuple[float, ...]) -> None:
    compare.assert_within_bound(measured(Case(kinds, Setting(dtypes, autocast=BF16), dropouts)))


@pytest.mark.parametrize("wrong", ["lora_magnitude_vector", "lora_B_bias", "lora_A", "lora_B", "x", "bias", "y"])
def test_what_is_wrong_is_noticed(wrong: str) -> None:
    """A gradient, or the output, that is one sixteenth off."""
    kind = "bias" if wrong == "lora_B_bias" else "dora"
    case = Case((kind,), Setting(Dtypes(BF16, F32)))
    errors = measured(case, change=lambda name, t: t * 17 / 16 if name.split(".")[0] == wrong else t)
    with pytest.raises(AssertionError, match=f"{wrong}.*: error"):
        compare.assert_within_bound(errors)


@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
@pytest.mark.parametrize("kind", ["linear", "4bit"])
def test_checkpointing_repeats_the_masks(kind: str, kinds: tuple[str, ...]) -> None:
    case = Case(kinds, Setting(Dtypes(F32, F32), kind=kind), (0.25, 0.0, 0.5))
    model, results = make_ours(make_stock(case), case), []
    for how in (None, "reentrant", "not reentrant"):
        results.append(run(model, replace(case.setting, checkpointing=how), 0))
    assert all(torch.equal(t, other[name]) for other in results[1:] for name, t in results[0].items())


@pytest.mark.usefixtures("no_compiled_code")
@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
@pytest.mark.parametrize("kind", ["linear", "4bit"])
def test_compiles_without_a_graph_break(kind: str, kinds: tuple[str, ...]) -> None:
    case = Case(kinds, Setting(Dtypes(F32, F32), kind=kind))
    model = make_ours(make_stock(case), case)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, actual = run(model, case.setting, 0), run(compiled, case.setting, 0)
    assert expected.keys() == {name.removeprefix("_orig_mod.") for name in actual}
    assert all(torch.equal(t, expected[name.removeprefix("_orig_mod.")]) for name, t in actual.items())


@pytest.mark.parametrize("kind", ["dora", "bias"])
def test_no_rows(kind: str) -> None:
    case = Case((kind,), Setting(Dtypes(F32, F32)), (0.5,))
    layer = make_ours(make_stock(case), case).layer
    layer(torch.empty(0, K, requires_grad=True)).sum().backward()
    assert all(not p.grad.any() for name, p in layer.named_parameters() if p.requires_grad)


def test_fp64() -> None:
    """In which nothing of an fp32 layer's error is left."""
    for kinds in KINDS:
        case = Case(kinds, Setting(Dtypes(F32, F32)), (0.25, 0.0, 0.5))
        stock = make_stock(case)
        ours, wide = make_ours(stock, case).double(), with_masks(in_fp64(stock, case), case)
        actual, exact = (results_of(model, case, 0, F64) for model in (ours, wide))
        for name, t in actual.items():
            assert t.dtype == F64
            assert compare.error(t.float(), exact[name].float(), exact[name]).ratio <= 1, name


def test_kept_panels_change_nothing() -> None:
    options = {"use_dora": True, "init_lora_weights": False}
    linear, x = nn.Linear(K, N), torch.randn(5, K)
    layer = FusedLoraLinear.from_linear(linear, prepack=True, **options)
    other = FusedLoraLinear.from_linear(linear, **options)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


def test_the_weight_cannot_be_trained() -> None:
    layer = FusedLoraLinear(K, N, use_dora=True)
    layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="weight requires grad, but W0 is frozen by definition"):
        layer(torch.randn(2, K))


def test_masks_come_from_torch_s_generator() -> None:
    """So that activation checkpointing repeats them."""
    layer, x = FusedLoraLinear(K, N, use_dora=True, lora_dropout=0.5, init_lora_weights=False), torch.randn(5, K)
    torch.manual_seed(1)
    y = checkpoint(layer, x, use_reentrant=False)
    torch.manual_seed(1)
    assert torch.equal(layer(x), y)
    assert not torch.equal(layer(x), y)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
