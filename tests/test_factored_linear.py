"""The layer around a provider: its state, copies, dtypes, merging, 4-bit and Conv1D weights, errors."""

import copy

import bitsandbytes
import pytest
import torch
from compare import error
from factored_layers import factored, fresh, randomised
from quantised_layers import linear4bit
from tiny_models import DTYPES, DUPLICATES, K, N, R, conv1d, make_layer, make_x
from torch import nn

from lora_ops import FactoredLinear, NF4Weight, factors
from lora_ops.factors import Factors

PROVIDERS = {
    "gated": lambda base: factors.gated(base, R),
    "core": lambda base: factors.flora(base, R),
    "output scale": lambda base: factors.ia3(base),
    "vera": lambda base: factors.vera(base, factors.Pair.seeded(N + 3, K + 5, R)),
    "nola": lambda base: factors.Nola(base, R, bases=20),
    "svdiff": lambda base: factors.SVDiff(base),
    "vb-lora": lambda base: factors.VBLora(base, factors.VectorBank(10, 8), R),
    "loretta": lambda base: factors.LorettaRep(base, R),
}
every_provider = pytest.mark.parametrize("make", PROVIDERS.values(), ids=PROVIDERS)


def plain(layer):
    """A FusedLoraLinear's A and B, as a provider."""
    pair = factors.Pair(layer.lora_A["default"].detach().clone(), layer.lora_B["default"].detach().clone())
    return factors.Gated(pair)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_without_anything_between_it_is_lora_bit_for_bit(dtype, quant):
    """Outputs, dropout's masks and gradients."""
    base = nn.Linear(K, N, dtype=dtype)
    lora = make_layer(dtype, base, lora_dropout=0.3, quant=quant)
    layer = FactoredLinear(base, plain(lora), scaling=lora.scaling["default"], lora_dropout=0.3, quant=quant)
    x, results = make_x(dtype), []
    for module in (lora, layer):
        torch.manual_seed(1)
        y = module(x)
        y.float().square().sum().backward()
        results.append((y, *(p.grad for p in module.parameters() if p.requires_grad)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    for module in (lora, layer):
        module.eval()
    assert torch.equal(layer(x), lora(x))
    lora.merge()
    layer.merge()
    assert torch.equal(layer(x), lora(x))
    assert layer.merge_error == lora.merge_error


@pytest.mark.parametrize("name", ["vera", "nola", "loretta"])
def test_autocast_leaves_the_provider_alone(name):
    """As of a LoRA that has the factors as fp32 parameters."""
    layer, x = factored(PROVIDERS[name], nn.Linear(K, N)), make_x()
    A, B = layer.plain_factors()
    lora = FactoredLinear(nn.Linear(K, N), factors.Gated(factors.Pair(A, B)), scaling=layer.scaling)
    lora.weight, lora.bias = layer.weight, layer.bias
    exact = wide(layer)(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        measured = error(layer(x), lora(x), exact)
    assert measured.within_bound, measured


def wide(layer):
    """The layer in fp64 and with a dense weight: the oracle, and in the layer's own dtypes what eager PyTorch computes."""
    other = copy.deepcopy(layer)
    if isinstance(other.weight, NF4Weight):
        other.weight = nn.Parameter(other.weight.dequantize(torch.float32), requires_grad=False)
    return other.double()


def eager(layer, x):
    weight = layer.weight.dequantize(x.dtype) if isinstance(layer.weight, NF4Weight) else layer.weight
    f = layer.factors(x)
    S = x.to(f.lora_A.dtype) @ f.lora_A.T
    S = S if f.gate is None else S * f.gate
    S = S if f.core is None else S @ f.core
    y = x @ weight.T + layer.scaling * (S @ f.lora_B.T)
    return ((y if f.out_scale is None else y * f.out_scale) + layer.bias).to(x.dtype)


@every_provider
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "nf4", "Linear4bit"])
def test_computes(make, dtype, kind):
    """As near to fp64 as eager, and merged as the weight that stands for it."""
    base = {"Conv1D": conv1d, "Linear4bit": linear4bit}.get(kind, lambda dtype: nn.Linear(K, N, dtype=dtype))(dtype)
    if kind == "Linear":
        before = base(make_x(dtype))
    layer = factored(make, base, quant="nf4" if kind == "nf4" else None)
    assert {p.dtype for p in layer.factors.parameters()} == {torch.float32}
    x = make_x(dtype)
    if kind == "Linear":
        assert layer.weight is base.weight and not base.weight.requires_grad
        layer.disable_adapters()
        assert torch.equal(layer(x), base(x)) and before.shape == (len(x), N)
        layer.enable_adapters()
    exact = wide(layer)(x.double())
    measured = error(layer(x), eager(layer, x), exact)
    assert measured.within_bound, measured
    weight, bias = layer.weight, layer.bias
    layer.merge(torch.float32)
    assert layer.merged and layer.bias is bias
    assert (layer.weight.double() @ x.double().T + bias.double()[:, None] - exact.T).abs().max() < 1e-4 * exact.abs().max()
    with pytest.raises(RuntimeError, match="is merged already"):
        layer.merge()
    layer.unmerge()
    assert layer.weight is weight
    with pytest.raises(RuntimeError, match="nothing is merged"):
        layer.unmerge()


@every_provider
def test_state_dict_loads_into_another_layer(make):
    layer, x = factored(make, nn.Linear(K, N)), make_x()
    other = fresh(make, copy.deepcopy(nn.Linear(K, N)), scaling=layer.scaling)
    frozen = {key for key, _ in layer.named_buffers()} & set(layer.state_dict())
    assert set(layer.state_dict()) == {name for name, _ in layer.named_parameters()} | frozen
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


@every_provider
@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_copies_are_layers_of_their_own(make, duplicate):
    layer, x = factored(make, nn.Linear(K, N)), make_x()
    y = layer(x)
    other = duplicate(layer)
    assert torch.equal(other(x), y)
    randomised(other)
    assert not torch.equal(other(x), y)
    assert torch.equal(layer(x), y)
    layer.merge()
    other = duplicate(layer)
    assert other.merged and torch.equal(other(x), layer(x))
    other.unmerge()
    assert torch.equal(other.weight, layer.unmerged_weight)


@every_provider
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_casts(make, quant):
    """to(dtype): weight, bias and provider, also what is merged."""
    layer = factored(make, nn.Linear(K, N), quant=quant)
    x = make_x(torch.bfloat16)
    before = layer.float()(x.float())
    layer.merge()
    layer.to(torch.bfloat16)
    layer.unmerge()
    assert layer.weight.dtype == torch.bfloat16
    assert {t.dtype for t in (*layer.factors.parameters(), *layer.factors.buffers())} == {torch.bfloat16}
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - before).abs().max() < 0.05 * before.abs().max()


def test_state_dicts_of_other_weights():
    conv = conv1d()
    layer = factored(PROVIDERS["gated"], conv)
    assert torch.equal(layer.state_dict()["weight"], conv.weight)
    quantised = factored(PROVIDERS["gated"], linear4bit())
    state = quantised.state_dict()
    assert state["weight"].dtype == torch.uint8 and "weight.absmax" in state
    other = factored(PROVIDERS["gated"], linear4bit(), scaling=quantised.scaling)
    other.load_state_dict(state)
    x = make_x()
    assert torch.equal(other(x), quantised(x))
    with pytest.raises(KeyError, match=r"weight\.absmax"):
        other.load_state_dict({key: t for key, t in state.items() if key != "weight.absmax"})


def test_the_provider_takes_the_dtype_that_is_asked_for():
    base = nn.Linear(K, N, dtype=torch.bfloat16)
    assert fresh(PROVIDERS["gated"], base, adapter_dtype=torch.bfloat16).factors.gate.dtype == torch.bfloat16
    assert fresh(PROVIDERS["gated"], nn.Linear(K, N).double()).factors.gate.dtype == torch.float64


class PerToken(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.A, self.B, self.router = (nn.Linear(*size, bias=False) for size in ((K, R), (R, N), (K, R)))

    def forward(self, x):
        return Factors(self.A.weight, self.B.weight, gate=self.router(x).softmax(-1))


def test_what_depends_on_x_cannot_be_merged():
    layer, x = factored(PerToken, nn.Linear(K, N)), make_x()
    f = layer.factors
    expected = x @ layer.weight.T + layer.scaling * (f.A(x) * f.router(x).softmax(-1)) @ f.B.weight.T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    weight = layer.weight
    for forbidden in (layer.merge, layer.delta_weight, layer.plain_factors):
        with pytest.raises(ValueError, match="factors must not depend on x to be merged or exported, and PerToken's do"):
            forbidden()
    assert layer.weight is weight and not layer.merged


def test_a_merged_weight_must_be_finite():
    layer = factored(PROVIDERS["gated"], nn.Linear(K, N))
    layer.factors.gate.data[0] = torch.inf
    with pytest.raises(ValueError, match="the update of Gated gives a merged weight that is not finite"):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"scaling": float("nan")}, ValueError, "scaling must be a finite number, got nan"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout must be a number in \\[0, 1\\), got 1.0"),
        ({"quant": "int3"}, ValueError, 'quant must be "nf4", "fp4" or None'),
        ({"factors": lambda x: None}, TypeError, "factors must be an nn.Module that returns Factors, got function"),
        ({"linear": nn.Embedding(4, 4)}, TypeError, "linear must be an nn.Linear"),
        ({"linear": bitsandbytes.nn.Linear4bit(K, N)}, TypeError, "Linear4bit that is quantised"),
    ],
)
def test_refuses(options, kind, message):
    base = nn.Linear(K, N)
    with pytest.raises(kind, match=message):
        FactoredLinear(**{"linear": base, "factors": PROVIDERS["gated"](base), **options})
    assert base.weight.requires_grad


def test_keeps_the_mode_and_says_what_it_is():
    layer = fresh(PROVIDERS["gated"], nn.Linear(K, N).eval())
    assert not layer.training and not layer.factors.training
    assert "scaling=1.0, lora_dropout=0.0" in repr(layer)
