"""FusedLoraConv1d, 2d and 3d beside PEFT's `lora.Conv1d`, 2d and 3d, and fp64."""

import copy
import math

import compare
import pytest
import torch
from compare import BF16, F32, every_dtype
from other_layers import assert_as_near, factors, layer_of, ours_like, run, with_peft
from tiny_models import DUPLICATES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_ops import FusedLoraConv1d, FusedLoraConv2d, FusedLoraConv3d, functional, reference
from lora_ops.convolution import Geometry, convolve, transposed

FP32 = compare.Dtypes(F32, F32)
# Layers that are matrix products, each with an x.
PRODUCTS = {
    "1d": (lambda: nn.Conv1d(12, 20, 1), (3, 12, 9)),
    "1d of large matrices": (lambda: nn.Conv1d(60, 70, 1), (2, 60, 61)),
    "1d with a stride, without a bias": (lambda: nn.Conv1d(12, 20, 1, 2, bias=False), (3, 12, 9)),
    "1d patches": (lambda: nn.Conv1d(4, 20, 3, 3), (2, 4, 11)),
    "1d in one piece": (lambda: nn.Conv1d(4, 20, 5, 6), (2, 4, 5)),
    "2d": (lambda: nn.Conv2d(12, 20, 1), (3, 12, 5, 4)),
    "2d of padding same": (lambda: nn.Conv2d(12, 20, 1, padding="same"), (3, 12, 5, 4)),
    "2d with holes that hold nothing": (lambda: nn.Conv2d(12, 20, 1, dilation=3), (1, 12, 5, 4)),
    "2d with strides": (lambda: nn.Conv2d(12, 20, 1, (2, 3)), (2, 12, 5, 7)),
    "2d patches": (lambda: nn.Conv2d(3, 20, (2, 4), (2, 5)), (2, 3, 7, 14)),
    "3d": (lambda: nn.Conv3d(6, 10, 1), (2, 6, 3, 4, 5)),
    "3d patches": (lambda: nn.Conv3d(2, 10, (1, 2, 3), (1, 2, 3)), (2, 2, 3, 4, 7)),
    "no rows": (lambda: nn.Conv2d(12, 20, 1), (0, 12, 5, 4)),
    "no batch": (lambda: nn.Conv2d(12, 20, 1), (12, 5, 4)),
    "one channel": (lambda: nn.Conv1d(1, 9, 1), (2, 1, 7)),
}
# Those that torch convolves.
OTHERS = {
    "1d": (lambda: nn.Conv1d(6, 10, 3), (2, 6, 9)),
    "1d padded": (lambda: nn.Conv1d(6, 10, 3, 2, 1), (2, 6, 9)),
    "2d of padding same": (lambda: nn.Conv2d(4, 10, (3, 4), padding="same"), (2, 4, 6, 5)),
    "2d in groups": (lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2), (2, 6, 5, 4)),
    "2d of size 1 in groups": (lambda: nn.Conv2d(6, 8, 1, groups=2, bias=False), (2, 6, 5, 4)),
    "2d of size 1, padded": (lambda: nn.Conv2d(6, 8, 1, padding=1), (2, 6, 3, 2)),
    "3d": (lambda: nn.Conv3d(3, 6, (1, 3, 2), padding=(0, 1, 0)), (2, 3, 3, 4, 5)),
    "3d of 1 x 1 x 2": (lambda: nn.Conv3d(3, 6, (1, 1, 2)), (2, 3, 3, 4, 5)),
    "no batch": (lambda: nn.Conv2d(4, 10, 3), (4, 6, 5)),
}
# Those whose A is neither dilated nor padded otherwise than with zeros in PEFT.
CORRECTED = {
    "1d dilated": (lambda: nn.Conv1d(6, 10, 3, padding="same", dilation=2), (2, 6, 9)),
    "1d circular": (lambda: nn.Conv1d(6, 10, 3, padding=1, padding_mode="circular"), (2, 6, 9)),
    "1d patches with holes": (lambda: nn.Conv1d(6, 10, 3, 5, dilation=2), (2, 6, 17)),
    "2d dilated": (lambda: nn.Conv2d(4, 10, 3, dilation=(2, 1)), (2, 4, 6, 5)),
    "2d reflected": (lambda: nn.Conv2d(4, 10, (3, 2), padding=(1, 2), padding_mode="reflect"), (2, 4, 6, 5)),
    "2d replicated, same": (lambda: nn.Conv2d(4, 10, (3, 4), padding="same", padding_mode="replicate"), (2, 4, 6, 5)),
    "3d circular": (lambda: nn.Conv3d(3, 6, 3, padding=(1, 0, 2), padding_mode="circular"), (2, 3, 3, 4, 5)),
}


def cases(of: dict):
    return pytest.mark.parametrize(("base", "shape"), of.values(), ids=of)


def make_x(shape: tuple[int, ...], dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def make(base, dtypes: compare.Dtypes = FP32, names: tuple[str, ...] = ("default",), **options):
    """PEFT's layer and ours, whose biases train."""
    theirs = layer_of(with_peft(base(), dtypes, names, **options))
    ours = ours_like(theirs)
    for bias in (theirs.base_layer.bias, ours.bias):
        if bias is not None:
            bias.requires_grad_()
    return theirs, ours


@every_dtype
@cases(PRODUCTS)
def test_matrix_products(monkeypatch, dtypes: compare.Dtypes, base, shape: tuple[int, ...]) -> None:
    theirs, ours = make(base, dtypes)
    calls = []
    monkeypatch.setattr("lora_ops.convolution.lora_linear", lambda *a, **k: calls.append(1) or functional.lora_linear(*a, **k))
    assert Geometry.of(theirs.base_layer).is_product
    x = make_x(shape, dtypes.x)
    assert_as_near(ours, theirs, x)
    assert calls == [1]
    assert ours(x).is_contiguous()


@every_dtype
@cases(OTHERS)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_others(dtypes: compare.Dtypes, base, shape: tuple[int, ...]) -> None:
    theirs, ours = make(base, dtypes, names=("default", "second"))
    assert not Geometry.of(theirs.base_layer).is_product
    assert_as_near(ours, theirs, make_x(shape, dtypes.x))


class Corrected(nn.Module):
    """What PEFT's layer would compute if its A were the base layer's, with its arithmetic."""

    def __init__(self, theirs):
        super().__init__()
        self.base_layer, self.scaling = theirs.base_layer, theirs.scaling["default"]
        self.lora_A, self.lora_B = theirs.lora_A, theirs.lora_B
        A, base = self.lora_A["default"], theirs.base_layer
        for name in (*Geometry._fields, "_reversed_padding_repeated_twice"):
            setattr(A, name, getattr(base, name))

    def forward(self, x: Tensor) -> Tensor:
        y, A, B = self.base_layer(x), self.lora_A["default"], self.lora_B["default"]
        return (y + B(A(x.to(A.weight.dtype))) * self.scaling).to(y.dtype)


@every_dtype
@cases(CORRECTED)
def test_windows_of_A_are_the_weight_s(dtypes: compare.Dtypes, base, shape: tuple[int, ...]) -> None:
    theirs, ours = make(base, dtypes)
    assert_as_near(ours, Corrected(theirs), make_x(shape, dtypes.x))


@pytest.mark.parametrize("of", [PRODUCTS, OTHERS, CORRECTED], ids=["products", "others", "corrected"])
def test_merged_is_unmerged(of: dict) -> None:
    for name, (base, shape) in of.items():
        if "groups" in name:
            continue
        _, ours = make(base)
        x, W0, shared = make_x(shape), ours.weight.clone(), ours.weight
        before, wide = ours(x), copy.deepcopy(ours).double()
        exact, delta = wide(x.double()), wide.delta_weight()
        wide.merge()
        measured = compare.error(wide(x.double()).float(), before, exact)
        assert measured.within_bound, (name, measured)
        ours.merge()
        assert compare.error(ours.weight, W0 + delta.float(), W0.double() + delta).within_bound
        assert torch.equal(ours(x), convolve(x, ours.weight, ours.bias, ours.geometry))
        ours.unmerge()
        assert ours.weight is shared
        assert torch.equal(ours.weight, W0)
        assert torch.equal(ours(x), before)


def test_the_padding_mode_may_be_assigned_to() -> None:
    """As is done to make images that can be tiled."""
    theirs, ours = make(lambda: nn.Conv2d(4, 10, 3, padding=1))
    x = make_x((2, 4, 6, 5))
    for module in (theirs.base_layer, ours):
        module.padding_mode = "circular"
    assert_as_near(ours, Corrected(theirs), x)


def test_delta_weight_is_peft_s() -> None:
    theirs, ours = make(lambda: nn.Conv2d(4, 10, (3, 2)), names=("default", "second"))
    for name in ("default", "second"):
        exact = copy.deepcopy(theirs).double().get_delta_weight(name)
        assert compare.error(ours.delta_weight(name), theirs.get_delta_weight(name), exact).within_bound
    assert torch.equal(ours.delta_weight(), ours.delta_weight("default") + ours.delta_weight("second"))


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_groups_are_not_merged() -> None:
    _, ours = make(OTHERS["2d in groups"][0])
    with pytest.raises(ValueError, match="groups must be 1 for adapters to be merged, got 2"):
        ours.merge()
    assert not ours.merged
    with pytest.raises(ValueError, match="r must be a multiple of the convolution's groups, 2, got 3"):
        ours.add_adapter("third", 3)
    assert list(ours.lora_A) == list(ours.r) == ["default"]


@pytest.mark.parametrize("dtypes", [FP32, compare.Dtypes(BF16, F32)], ids=str)
@pytest.mark.parametrize("kind", ["2d", "3d", "2d patches", "2d with strides"])
def test_channels_last(kind: str, dtypes: compare.Dtypes) -> None:
    base, shape = PRODUCTS[kind]
    theirs, ours = make(base, dtypes)
    memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = make_x(shape, dtypes.x).contiguous(memory_format=memory_format)
    assert_as_near(ours, theirs, x)
    assert ours(x).is_contiguous(memory_format=memory_format)
    ours.to(memory_format=memory_format) if len(shape) == 4 else None
    assert_as_near(ours, theirs, x)


def test_a_strided_x() -> None:
    theirs, ours = make(lambda: nn.Conv1d(12, 20, 1))
    assert_as_near(ours, theirs, make_x((3, 9, 12)).transpose(1, 2))
    theirs, ours = make(lambda: nn.Conv2d(12, 20, 1))
    for x in (make_x((3, 24, 5, 8))[:, ::2, :, 1::2], make_x((12, 3, 5, 4)).transpose(0, 1)):
        assert_as_near(ours, theirs, x)


class Mask(nn.Module):
    """The mask that `lora_linear` draws, whose rows are windows, in x's places."""

    def __init__(self, p: float, kernel_size: tuple[int, int]):
        super().__init__()
        self.p, self.kernel_size = p, kernel_size

    def forward(self, x: Tensor) -> Tensor:
        seed = torch.randint(0, 2**62, (), dtype=torch.int64)
        (n, C, H, W), (h, w) = x.shape, self.kernel_size
        keep = reference.dropout_keep(seed, self.p, n * (H // h) * (W // w), C * h * w)
        keep = keep.view(n, H // h, W // w, C, h, w).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
        return x * (keep.to(x.dtype) / (1 - self.p))


@every_dtype
@pytest.mark.parametrize(
    ("base", "shape"), [(lambda: nn.Conv2d(12, 20, 1), (3, 12, 5, 4)), (lambda: nn.Conv2d(3, 20, (2, 4), (2, 4)), (2, 3, 6, 8))]
)
def test_dropout_of_products(dtypes: compare.Dtypes, base, shape: tuple[int, ...]) -> None:
    theirs, ours = make(base, dtypes, lora_dropout=0.4)
    theirs.lora_dropout["default"] = Mask(0.4, theirs.base_layer.kernel_size)
    assert_as_near(ours, theirs, make_x(shape, dtypes.x))


@pytest.mark.parametrize("of", ["2d", "2d of padding same"])
@pytest.mark.parametrize("names", [("default",), ("default", "second")], ids=len)
def test_dropout_follows_the_generator(of: str, names: tuple[str, ...]) -> None:
    base, shape = {**PRODUCTS, "2d of padding same": OTHERS["2d of padding same"]}[of]
    theirs, ours = make(base, names=names, lora_dropout=0.4)
    x = make_x(shape).requires_grad_()
    first = run(ours, x)
    assert all(torch.equal(t, first[name]) for name, t in run(ours, x).items())
    assert not torch.equal(run(ours, x, draw=1)["y"], first["y"])
    torch.manual_seed(0)
    assert torch.equal(checkpoint(ours, x, use_reentrant=False), first["y"])
    assert_as_near(ours.eval(), theirs.eval(), x)


@pytest.mark.parametrize("of", ["2d", "1d patches"])
@pytest.mark.parametrize("adapter", [F32, BF16], ids=str)
def test_autocast(of: str, adapter: torch.dtype) -> None:
    base, shape = PRODUCTS[of]
    theirs, ours = make(base, compare.Dtypes(F32, F32))
    for layer in (theirs, ours):
        for factor in factors(layer).values():
            factor.data = factor.data.to(adapter)
    x, wide = make_x(shape), copy.deepcopy(theirs).double()
    exact = run(wide, x.double())
    with torch.autocast("cpu", BF16):
        actual, eager = run(ours, x), run(theirs, x)
    assert actual["y"].dtype == BF16
    compare.assert_within_bound({name: compare.error(actual[name], eager[name], exact[name]) for name in actual})


def test_several_adapters_and_named_ones() -> None:
    for base, shape in (PRODUCTS["2d"], OTHERS["1d"]):
        theirs, ours = make(base, names=("default", "second", "third"))
        x = make_x(shape)
        assert_as_near(ours, theirs, x)
        theirs.set_adapter(["third"])
        ours.set_adapter("third")
        theirs.base_layer.bias.requires_grad_()
        assert_as_near(ours, theirs, x)
        plain = theirs.base_layer(x)
        ours.disable_adapters()
        assert torch.equal(ours(x), plain)
        ours.enable_adapters()
        ours.delete_adapter("third")
        assert torch.equal(ours(x), plain)


def test_initialisation_and_state() -> None:
    """Shapes, dtypes, names and starting values are PEFT's."""
    for init in (True, "gaussian", False):
        base = nn.Conv2d(40, 30, (3, 5)).to(BF16)
        ours = FusedLoraConv2d.from_conv(copy.deepcopy(base), 8, init_lora_weights=init)
        theirs = factors(layer_of(with_peft(base, compare.Dtypes(BF16, F32), r=8, init_lora_weights=init)))
        for name, factor in factors(ours).items():
            assert (factor.shape, factor.dtype) == (theirs[name].shape, theirs[name].dtype)
            assert factor.std().item() == pytest.approx(theirs[name].std().item(), rel=0.1)
            assert factor.abs().max().item() == pytest.approx(theirs[name].abs().max().item(), rel=0.3)
        assert list(ours.state_dict()) == ["weight", "bias", "lora_A.default", "lora_B.default"]
        assert {name for name, p in ours.named_parameters() if p.requires_grad} == {"lora_A.default", "lora_B.default"}
    bound = 1 / math.sqrt(40 * 15)
    assert ours.lora_A["default"].abs().max() <= bound


@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_duplicates(duplicate) -> None:
    _, layer = make(PRODUCTS["2d"][0], names=("default", "second"))
    x = make_x(PRODUCTS["2d"][1])
    layer.merge()
    other = duplicate(layer)
    assert torch.equal(other(x), layer(x))
    other.unmerge()
    layer.unmerge()
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: FusedLoraConv1d(60, 70, 1, 3, init_lora_weights=False), (2, 60, 61)),
        (lambda: FusedLoraConv2d(4, 6, 3, 3, padding=1, init_lora_weights=False, lora_alpha=3), (2, 4, 5, 5)),
        (lambda: FusedLoraConv3d(4, 6, 2, 3, stride=2, init_lora_weights=False, bias=False), (2, 4, 5, 5, 4)),
    ],
)
def test_new_layers_and_compile(layer, shape: tuple[int, ...]) -> None:
    layer = layer()
    x = make_x(shape)
    expected = run(layer, x)
    layer.compile(backend="aot_eager", fullgraph=True)
    for name, t in run(layer, x).items():
        assert torch.equal(t, expected[name]), name


def test_transposed() -> None:
    for shape in ((3, 61, 60), (2, 5, 7), (0, 80, 80)):
        t = torch.randn(shape, requires_grad=True)
        y = transposed(t)
        assert y.is_contiguous()
        assert torch.equal(y, t.transpose(1, 2))
        dy = torch.randn(y.shape)
        (dt,) = torch.autograd.grad(y, [t], dy)
        assert torch.equal(dt, dy.transpose(1, 2))


class Odd(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).tanh()


@pytest.mark.parametrize(
    ("make_it", "kind", "words"),
    [
        (
            lambda: FusedLoraConv2d.from_conv(Odd(3, 4, 1)),
            TypeError,
            r"conv must be an nn\.Conv2d with its own forward, got Odd",
        ),
        (lambda: FusedLoraConv2d.from_conv(nn.Conv1d(3, 4, 1)), TypeError, r"conv must be an nn\.Conv2d .* got Conv1d"),
        (
            lambda: FusedLoraConv2d.from_conv(nn.Conv2d(4, 4, 1, groups=2), 3),
            ValueError,
            "multiple of the convolution's groups",
        ),
        (lambda: FusedLoraConv2d(3, 4, 1, r=0), ValueError, "r must be an integer >= 1, got 0"),
        (lambda: FusedLoraConv2d(4, 4, 1, r=3, groups=2), ValueError, "multiple of the convolution's groups"),
        (
            lambda: FusedLoraConv2d(3, 4, 1)(torch.ones(2, 5, 4, 4)),
            ValueError,
            r"x must be \(batch, 3, ...\) .* \(2, 5, 4, 4\)",
        ),
        (lambda: FusedLoraConv1d(3, 4, 1)(torch.ones(3)), ValueError, r"x must be \(batch, 3, ...\)"),
    ],
)
def test_errors(make_it, kind, words) -> None:
    with pytest.raises(kind, match=words):
        make_it()


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"init_lora_weights": "pissa"}, ValueError, 'init_lora_weights must be True, False or "gaussian"'),
        ({"use_dora": True}, ValueError, "use_dora must be False"),
        ({"adapter_name": "a.b"}, ValueError, "adapter_name must be"),
        ({"use_rslora": 1}, TypeError, "use_rslora must be True or False, got 1"),
        ({"alpha": 8}, TypeError, "unexpected keyword argument 'alpha'"),
    ],
)
def test_what_is_refused_is_left_as_it_was(options: dict, kind, words: str) -> None:
    conv = nn.Conv2d(3, 4, 1)
    with pytest.raises(kind, match=words):
        FusedLoraConv2d.from_conv(conv, **options)
    assert conv.weight.requires_grad
    assert conv.bias is not None and conv.bias.requires_grad


def test_a_kernel_that_is_wrong_fails() -> None:
    """The bound notices a last channel that is left out."""
    theirs, ours = make(PRODUCTS["2d"][0])
    x = make_x(PRODUCTS["2d"][1])
    short = x.clone()
    short[:, -1] = 0
    exact = copy.deepcopy(theirs).double()(x.double())
    assert not compare.error(ours(short), theirs(x), exact).within_bound
