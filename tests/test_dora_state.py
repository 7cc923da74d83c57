"""FusedLoraLinear with DoRA and with biases of B: how adapters start, train, are added, copied, saved, cast and refused."""

import copy

import compare
import pytest
import torch
from compare import BF16, F16, F32, Dtypes
from dora_layers import F64, OPTIONS, Case, make_ours, make_stock, three
from peft import LoraConfig, get_peft_model
from peft_layers import K, N, One, Setting, base_layer
from tiny_models import DUPLICATES, assert_as_exact, gpt2, llama, tokens
from torch import Tensor, nn

import lora_ops
from lora_ops import FusedLoraLinear
from lora_ops.dora import row_norms

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


@pytest.mark.filterwarnings("ignore:lora_bias")
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("kind", ["dora", "bias"])
def test_a_model_of_peft_s_computes_the_same_here(tmp_path, kind: str, make) -> None:
    """Its loss and the gradients of what trains."""
    torch.manual_seed(0)
    model = make()
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **OPTIONS[kind])
    theirs = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad and p.dim() == 1:
                p.mul_(torch.linspace(0.5, 2, len(p)))
    theirs.save_pretrained(tmp_path)
    ours = lora_ops.load_adapter(model, tmp_path)
    wide, results = copy.deepcopy(theirs).double(), []
    for m in (ours, theirs, wide):
        loss = m(tokens(), labels=tokens()).loss
        loss.backward()
        gradients = {name: p.grad for name, p in m.named_parameters() if p.requires_grad}
        results.append([loss, *(gradients[name] for name in sorted(gradients, key=of_peft))])
    assert_as_exact(list(zip(*results, strict=True)))


def of_peft(name: str) -> str:
    """A parameter's name, in a model of PEFT's or of ours, as PEFT's files have it."""
    name = name.removeprefix("base_model.model.").replace("lora_B_bias.default", "lora_B.bias").replace(".default", "")
    return name if name.endswith(".bias") else name.removesuffix(".weight")


# --- several ----------------------------------------------------------------------------------------------------------


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
