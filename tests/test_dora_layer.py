"""FusedLoraLinear with DoRA and with biases of B, one adapter and several, beside PEFT's layers and fp64."""

import copy
import itertools
import math
from dataclasses import dataclass, replace

import compare
import pytest
import torch
from compare import BF16, F16, F32, Dtypes, Results
from peft import LoraConfig, PeftModel, get_peft_model
from peft_layers import DoraDropout, K, N, One, PhiloxDropout, Setting, base_layer, run
from tiny_models import DUPLICATES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_ops
from lora_ops import FusedLoraLinear, NF4Weight
from lora_ops.dora import row_norms

F64 = torch.float64
OPTIONS = {"lora": {}, "dora": {"use_dora": True}, "bias": {"lora_bias": True}}
NAMES = ("default", "second", "third")


@dataclass(frozen=True)
class Case:
    """Adapters of these kinds, each with its dropout, all of them active, over a base layer."""

    kinds: tuple[str, ...]
    setting: Setting
    dropouts: tuple[float, ...] = (0.0, 0.0, 0.0)

    def __str__(self) -> str:
        return "-".join(["+".join(self.kinds), str(self.setting), *(str(p) for p in self.dropouts if any(self.dropouts))])

    def options(self, i: int) -> dict:
        options = {"r": 4 + 3 * i, "lora_alpha": 6 + 2 * i, "lora_dropout": self.dropouts[i], "init_lora_weights": False}
        return options | OPTIONS[self.kinds[i]]


def make_stock(case: Case) -> PeftModel:
    torch.manual_seed(11)
    setting, names = case.setting, NAMES[: len(case.kinds)]
    model = One(base_layer(setting))
    model.is_loaded_in_4bit = setting.kind == "4bit"
    for i, name in enumerate(names):
        config = LoraConfig(target_modules=["layer"], fan_in_fan_out=setting.kind == "conv1d", **case.options(i))
        if i == 0:
            model = get_peft_model(model, config, autocast_adapter_dtype=False)
        else:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
    model.base_model.set_adapter(list(names))
    layer = model.base_model.model.layer
    for part in (layer.lora_A, layer.lora_B):
        part.to(setting.dtypes.adapter)
    for vector in layer.lora_magnitude_vector.values():
        vector.weight.data = vector.weight.data.float() * torch.linspace(0.5, 2, N)
    for name, p in model.named_parameters():
        p.requires_grad_(p.is_floating_point() and not name.endswith("base_layer.weight"))
    return model


def with_masks(model: PeftModel, case: Case) -> PeftModel:
    """A stock model with the masks of ours."""
    dropouts = model.base_model.model.layer.lora_dropout
    for i, (name, kind) in enumerate(zip(NAMES, case.kinds, strict=False)):
        if case.dropouts[i] and kind == "dora":
            dropouts[name] = DoraDropout(case.dropouts[i])
        elif case.dropouts[i] and i == 0 and "dora" not in case.kinds:
            dropouts[name] = PhiloxDropout(case.dropouts[i])
    return model


def in_fp64(model: PeftModel, case: Case) -> PeftModel:
    """Stock PEFT in fp64, over the same numbers."""
    if case.setting.kind != "4bit":
        return copy.deepcopy(model).double()
    layer = model.base_model.model.layer
    wide = make_stock(replace(case, setting=replace(case.setting, kind="linear", dtypes=Dtypes(F32, F32)))).double()
    of = wide.base_model.model.layer
    state = {name: t for name, t in layer.state_dict().items() if "lora_" in name or name.endswith(".bias")}
    of.load_state_dict(state, strict=False)
    of.base_layer.weight.data = NF4Weight.from_params4bit(layer.base_layer.weight).dequantize(F64)
    return wide


def make_ours(model: PeftModel, case: Case) -> One:
    stock = model.base_model.model.layer
    options = case.options(0)
    layer = FusedLoraLinear.from_linear(copy.deepcopy(stock.base_layer), adapter_dtype=case.setting.dtypes.adapter, **options)
    for i, name in enumerate(NAMES[1 : len(case.kinds)], 1):
        layer.add_adapter(name, adapter_dtype=case.setting.dtypes.adapter, **case.options(i))
    layer.set_adapter(list(NAMES[: len(case.kinds)]))
    if layer.bias is not None:
        layer.bias.requires_grad_(stock.base_layer.bias.requires_grad)
    ours = dict(layer.named_parameters())
    for name, p in stock.named_parameters():
        if not name.endswith("base_layer.weight"):
            ours[ours_of(name)].data.copy_(p.data)
    return One(layer)


def ours_of(name: str) -> str:
    """The name that a parameter of PEFT's layer has in ours."""
    name = name.split("layer.")[-1].removesuffix(".weight")
    kind, *adapter = name.removesuffix(".bias").split(".")
    return f"{kind}_bias.{adapter[0]}" if adapter and name.endswith(".bias") else name


def results_of(model: nn.Module, case: Case, draw: int, dtype: torch.dtype | None = None) -> Results:
    return {ours_of(name): t for name, t in run(model, case.setting, draw, dtype).items()}


def measured(case: Case, draws: int = 3, change=lambda name, t: t) -> dict[str, compare.Error]:
    """The output's and every gradient's errors, the largest of a few draws."""
    stock = make_stock(case)
    ours, wide = make_ours(stock, case), in_fp64(stock, case)
    with_masks(stock, case)
    with_masks(wide, case)
    drawn = []
    for draw in range(draws):
        actual, eager = results_of(ours, case, draw), results_of(stock, case, draw)
        exact = results_of(wide, case, draw, F64)
        assert actual.keys() == eager.keys() == exact.keys()
        drawn.append({name: compare.error(change(name, actual[name]), eager[name], exact[name]) for name in actual})
    return {name: compare.Error(*map(max, zip(*(e[name] for e in drawn), strict=True))) for name in drawn[0]}


# --- forward and backward ---------------------------------------------------------------------------------------------

KINDS = [("dora",), ("bias",), ("bias", "bias"), ("lora", "dora"), ("dora", "lora"), ("dora", "dora"), ("bias", "dora", "bias")]
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


@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
@pytest.mark.parametrize("kind", ["linear", "4bit"])
def test_compiles_without_a_graph_break(kind: str, kinds: tuple[str, ...]) -> None:
    case = Case(kinds, Setting(Dtypes(F32, F32), kind=kind))
    model = make_ours(make_stock(case), case)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, actual = run(model, case.setting, 0), run(compiled, case.setting, 0)
    assert expected.keys() == {name.removeprefix("_orig_mod.") for name in actual}
    assert all(torch.equal(t, expected[name.removeprefix("_orig_mod.")]) for name, t in actual.items())
    torch.compiler.reset()


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


# --- initialisation and training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "4bit"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_the_magnitude_is_the_norm_at_first(dtype: torch.dtype, kind: str, init: bool) -> None:
    """As PEFT's is, in fp32 whatever the weight's dtype."""
    torch.manual_seed(0)
    base = base_layer(Setting(Dtypes(dtype, F32), kind=kind))
    layer = FusedLoraLinear.from_linear(copy.deepcopy(base), 4, use_dora=True, init_lora_weights=init)
    model = One(base)
    model.is_loaded_in_4bit = kind == "4bit"
    config = LoraConfig(r=4, use_dora=True, target_modules=["layer"], fan_in_fan_out=kind == "conv1d")
    stock = get_peft_model(model, config).base_model.model.layer
    stock.lora_A["default"].weight.data, stock.lora_B["default"].weight.data = layer.lora_A["default"], layer.lora_B["default"]
    stock.lora_variant["default"].init(stock, adapter_name="default")
    theirs, ours = stock.lora_magnitude_vector["default"].weight, layer.lora_magnitude_vector["default"]
    weight = layer.weight.dequantize(F64) if kind == "4bit" else layer.weight.double()
    delta = layer.scaling["default"] * (layer.lora_B["default"].double() @ layer.lora_A["default"].double())
    exact = torch.linalg.vector_norm(weight + delta, dim=1)
    assert ours.dtype == F32
    assert ours.requires_grad
    compare.assert_within_bound({"magnitude": compare.error(ours.data, theirs.data, exact)})


@pytest.mark.parametrize("kind", ["linear", "4bit"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("options", [OPTIONS["dora"], OPTIONS["bias"]], ids=str)
def test_a_new_layer_is_the_frozen_layer(options: dict, dtype: torch.dtype, kind: str) -> None:
    base = base_layer(Setting(Dtypes(dtype, F32), kind=kind))
    layer = FusedLoraLinear.from_linear(copy.deepcopy(base), 4, **options)
    x = torch.randn(5, K).to(dtype)
    weight = layer.weight.dequantize(F64) if kind == "4bit" else layer.weight.double()
    exact = nn.functional.linear(x.double(), weight, layer.bias.double())
    with torch.no_grad():
        compare.assert_within_bound({"y": compare.error(layer(x), base(x), exact)})


def test_a_bias_of_b_at_first() -> None:
    """Zero, or, where B is not, as nn.Linear's."""
    assert not FusedLoraLinear(K, N, 4, lora_bias=True).lora_B_bias["default"].any()
    bias = FusedLoraLinear(K, 4096, 4, lora_bias=True, init_lora_weights=False).lora_B_bias["default"].abs().max()
    assert 0.49 < bias <= 0.5


@pytest.mark.parametrize("half", [BF16, F16], ids=str)
def test_dtypes(half: torch.dtype) -> None:
    """The bias has B's, the magnitude fp32 at least."""
    layer = FusedLoraLinear(K, N, 4, dtype=half, adapter_dtype=half, use_dora=True)
    layer.add_adapter("b", adapter_dtype=half, lora_bias=True)
    assert (layer.lora_magnitude_vector["default"].dtype, layer.lora_B_bias["b"].dtype) == (F32, half)
    wide = FusedLoraLinear(K, N, 4, dtype=F64, use_dora=True)
    assert wide.lora_magnitude_vector["default"].dtype == F64


def test_reset_starts_anew() -> None:
    """From W0, also while something is merged."""
    case = Case(("dora",), Setting(Dtypes(F32, F32)))
    layer = make_ours(make_stock(case), case).layer
    layer.merge()
    layer.reset_lora_parameters()
    layer.unmerge()
    assert torch.equal(layer.lora_magnitude_vector["default"], row_norms(layer.weight).sqrt())


@pytest.mark.parametrize("kind", ["dora", "bias"])
def test_a_model_trains(kind: str) -> None:
    """All that an adapter has is among `lora_parameters`, and moves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N), nn.Tanh(), nn.Linear(N, 3))
    lora_ops.add_lora(model, lora_ops.LoraConfig(r=4, target_modules=["0", "2"], **OPTIONS[kind]))
    parameters = list(lora_ops.lora_parameters(model))
    assert len(parameters) == 6
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    before, losses = [p.detach().clone() for p in parameters], []
    optimizer, x, target = torch.optim.AdamW(parameters, lr=1e-2), torch.randn(8, K), torch.randn(8, 3)
    for _ in range(20):
        losses.append(nn.functional.mse_loss(model(x), target))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2
    assert not any(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


# --- several ----------------------------------------------------------------------------------------------------------


def three() -> FusedLoraLinear:
    case = Case(("dora", "bias", "lora"), Setting(Dtypes(F32, F32)))
    return make_ours(make_stock(case), case).layer


def test_what_is_active_trains() -> None:
    layer = three()
    for names in (["default"], ["second"], ["third", "default"]):
        layer.set_adapter(names)
        trained = {name.split(".")[1] for name, p in layer.named_parameters() if p.requires_grad and "lora_" in name}
        assert trained == set(names)
        layer.zero_grad()
        layer(torch.randn(3, K)).sum().backward()
        for name, p in layer.named_parameters():
            assert (p.grad is not None) == p.requires_grad, name


def test_adding_and_deleting() -> None:
    layer = three()
    assert layer.use_dora == {"default": True, "second": False, "third": False}
    assert layer.lora_bias == {"default": False, "second": True, "third": False}
    layer.add_adapter("new", 2, use_dora=True)
    assert not layer.lora_magnitude_vector["new"].requires_grad
    layer.delete_adapter("default")
    layer.delete_adapter("second")
    assert set(layer.lora_magnitude_vector) == {"new"}
    assert not layer.lora_B_bias
    assert layer.active_adapters == ["third"]


def test_a_new_adapter_s_magnitude_does_not_see_what_is_merged() -> None:
    layer = three()
    layer.add_adapter("before", use_dora=True)
    layer.merge()
    layer.add_adapter("while", use_dora=True)
    assert torch.equal(layer.lora_magnitude_vector["while"], layer.lora_magnitude_vector["before"])


# --- merging ----------------------------------------------------------------------------------------------------------

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


# --- state ------------------------------------------------------------------------------------------------------------


def test_state_dict() -> None:
    layer, x = three(), torch.randn(5, K)
    state = layer.state_dict()
    assert {name for name in state if "lora_A" not in name and name.startswith("lora_B.") is False} == {
        "weight", "bias", "lora_magnitude_vector.default", "lora_B_bias.second",
    }  # fmt: skip
    assert state["lora_magnitude_vector.default"].shape == state["lora_B_bias.second"].shape == (N,)
    other = FusedLoraLinear(K, N, 4, lora_alpha=6, use_dora=True)
    other.add_adapter("second", 7, lora_alpha=8, lora_bias=True)
    other.add_adapter("third", 10, lora_alpha=10)
    other.set_adapter(["default", "second", "third"])
    other(x)  # norms of another weight
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("duplicate", DUPLICATES)
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kinds", [("dora",), ("bias",), ("dora", "bias")], ids="+".join)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "4bit"])
def test_duplicates(kind: str, kinds: tuple[str, ...], merged: bool, duplicate) -> None:
    """A copy computes the same, merged or not, and shares no memory."""
    case = Case(kinds, Setting(Dtypes(F32, F32), kind=kind))
    layer, x = make_ours(make_stock(case), case).layer, torch.randn(5, K)
    unmerged = layer(x)
    if merged:
        layer.merge()
    y, other = layer(x), duplicate(layer)
    assert torch.equal(other(x), y)
    for p in layer.parameters():
        p.data.zero_()
    for t in (layer.unmerged_weight, layer.unmerged_bias):
        if isinstance(t, Tensor):
            t.data.zero_()
    assert torch.equal(other(x), y)
    if merged:
        other.unmerge()
        assert torch.equal(other(x), unmerged)


@pytest.mark.parametrize("dtype", [F64, BF16, F16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "4bit"])
@pytest.mark.parametrize("kinds", [("dora",), ("bias",), ("lora", "dora")], ids="+".join)
def test_to_dtype(kinds: tuple[str, ...], kind: str, dtype: torch.dtype) -> None:
    """A cast layer computes in its new dtype, what is merged moves with it."""
    case = Case(kinds, Setting(Dtypes(F32, F32), kind=kind))
    layer = make_ours(make_stock(case), case).layer
    layer(torch.randn(5, K))
    bias = layer.bias
    layer.merge()
    layer.to(dtype).unmerge()
    assert torch.equal(layer.bias, bias.to(dtype))
    assert {p.dtype for p in layer.parameters()} == {dtype}
    again = make_ours(make_stock(case), case).layer.to(dtype)
    x = torch.randn(5, K).to(dtype)
    assert torch.equal(layer(x), again(x))


@pytest.mark.parametrize("change", ["written", "replaced", "loaded", "cast", "merged"])
def test_norms_follow_the_weight(change: str) -> None:
    layer, x = FusedLoraLinear(K, N, use_dora=True).requires_grad_(False), torch.randn(5, K)
    layer(x)
    with torch.no_grad():
        if change == "written":
            layer.weight.mul_(3)
        elif change == "replaced":
            layer.weight = nn.Parameter(3 * layer.weight, requires_grad=False)
        elif change == "loaded":
            layer.load_state_dict({"weight": 3 * layer.weight}, strict=False, assign=True)
        elif change == "merged":
            layer.lora_magnitude_vector["default"].mul_(2)
            layer.merge()
            layer.unmerge()
        else:
            layer.double()
            x = x.double()
    assert torch.equal(layer(x), copy.deepcopy(layer)(x))


def test_meta_device() -> None:
    case = Case(("dora", "bias"), Setting(Dtypes(F32, F32)))
    source, x = make_ours(make_stock(case), case).layer, torch.randn(5, K)
    layer = FusedLoraLinear(device="meta", in_features=K, out_features=N, **{**case.options(0), "init_lora_weights": True})
    layer.add_adapter("second", **case.options(1))
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    layer.set_adapter(["default", "second"])
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(layer(x), source(x))


def test_repr() -> None:
    assert "lora_dropout=0.0, use_dora=True\n" in repr(FusedLoraLinear(K, N, use_dora=True))
    assert "lora_dropout=0.0, lora_bias=True\n" in repr(FusedLoraLinear(K, N, lora_bias=True))


BAD_ARGUMENTS = [
    ({"use_dora": 1}, TypeError, "use_dora must be True or False, got 1"),
    ({"lora_bias": "all"}, TypeError, "lora_bias must be True or False, got 'all'"),
    ({"use_dora": True, "lora_bias": True}, ValueError, "lora_bias must be False with use_dora, got True"),
    (
        {"lora_bias": True, "init_lora_weights": "gaussian"},
        ValueError,
        "init_lora_weights must be True or False with lora_bias, got 'gaussian'",
    ),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD_ARGUMENTS)
def test_bad_arguments(arguments: dict, kind: type[Exception], message: str) -> None:
    """PEFT takes neither of the last two."""
    linear, layer = nn.Linear(K, N), FusedLoraLinear(K, N)
    for call in (
        lambda: FusedLoraLinear(K, N, **arguments),
        lambda: FusedLoraLinear.from_linear(linear, **arguments),
        lambda: layer.add_adapter("other", **arguments),
        lambda: lora_ops.LoraConfig(**arguments),
    ):
        with pytest.raises(kind, match=message):
            call()
    assert linear.weight.requires_grad
    assert list(layer.lora_A) == ["default"]
    if kind is ValueError:
        with pytest.raises(ValueError):
            LoraConfig(**arguments)


def test_checkpoint_is_of_torch() -> None:
    """DoRA's mask comes from torch's generator."""
    layer, x = FusedLoraLinear(K, N, use_dora=True, lora_dropout=0.5, init_lora_weights=False), torch.randn(5, K)
    torch.manual_seed(1)
    y = checkpoint(layer, x, use_reentrant=False)
    torch.manual_seed(1)
    assert torch.equal(layer(x), y)
    assert not torch.equal(layer(x), y)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
