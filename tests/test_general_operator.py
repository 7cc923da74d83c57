"""y = out_scale ∘ (x W0ᵀ + scaling · (((drop(x) Aᵀ) ∘ gate) core) Bᵀ) + bias: every combination of the three factors, by
compare.py's policy, with W0 dense and in 4 bits."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from compare import BF16, DTYPES, F16, F32, Case, Dtypes, Error, Shape, assert_within_bound, error, every_dtype, make_case
from four_bit import make_quantised_case
from observe import bytes_beside, saved
from torch import Tensor

import lora_ops
from lora_ops import NF4Weight, ops, qlora_ops, reference

# Dot products, tiles of every ISA with a part of one behind them, r beyond a panel, one block of rows and several.
SHAPES = [(1, 33, 300, 8), (3, 129, 17, 12), (15, 48, 129, 16), (41, 127, 33, 100), (257, 31, 48, 16)]
FACTORS = [
    (gate, core, scale)
    for gate, core, scale in itertools.product(("", "rank", "token"), ("", "core"), ("", "scale"))
    if gate or core or scale
]
every_combination = pytest.mark.parametrize("kinds", FACTORS, ids=lambda kinds: "-".join(filter(None, kinds)))
NAMES = ("x", "lora_A", "lora_B", "bias", "gate", "core", "out_scale")


@dataclass(frozen=True)
class General:
    """`case` with factors; `weight` is what the operator multiplies by, case.weight what eager does."""

    case: Case
    weight: Tensor | NF4Weight
    gate: Tensor | None
    core: Tensor | None
    out_scale: Tensor | None

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
        case = self.case
        tensors = (case.x, case.lora_A, case.lora_B, case.bias, self.gate, self.core, self.out_scale)
        leaf = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
        return dict(zip(NAMES, leaf, strict=True))


def general(case: Case, kinds: tuple[str, str, str]) -> General:
    """Gates of both signs and zero; gate and core have A's dtype, out_scale x's."""
    (M, _), r, N = case.x.shape, case.lora_A.shape[0], case.weight.shape[0]
    g = torch.Generator().manual_seed(case.generator)
    gate, core, scale = kinds
    of_gate = None
    if gate:
        of_gate = torch.randn((r,) if gate == "rank" else (M, r), generator=g).to(case.lora_A.dtype)
        of_gate[..., r // 2] = 0
    of_core = (torch.randn(r, r, generator=g) * r**-0.5).to(case.lora_A.dtype) if core else None
    of_scale = (torch.rand(N, generator=g) + 0.5).to(case.x.dtype) if scale else None
    return General(case, getattr(case, "qweight", case.weight), of_gate, of_core, of_scale)


def without_seed(g: General, x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, **options) -> Tensor:
    linear = lora_ops.qlora_linear if isinstance(g.weight, NF4Weight) else lora_ops.lora_linear
    return linear(x, g.weight, lora_A, lora_B, scaling=g.case.scaling, bias=bias, **options)


def fused(g: General, *args: Tensor, **options) -> Tensor:
    torch.manual_seed(g.case.generator)
    return without_seed(g, *args, dropout_p=g.case.dropout_p, training=True, **options)


def eager(g: General, x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, gate, core, out_scale) -> Tensor:
    """PEFT's arithmetic, and the same in float64 for leaves of that."""
    case = g.case
    weight = g.weight.dequantize(torch.float64) if x.dtype == torch.float64 and isinstance(g.weight, NF4Weight) else case.weight
    h = x.to(lora_A.dtype)
    if case.seed is not None:
        keep = reference.dropout_keep(case.seed, case.dropout_p, *x.shape)
        h = h * (keep.to(h.dtype) / (1 - case.dropout_p))
    h = F.linear(h, lora_A)
    h = h if gate is None else h * gate
    h = h if core is None else h @ core
    z = (F.linear(x, weight.to(x.dtype)) + F.linear(h, lora_B) * case.scaling).to(x.dtype)
    z = z if out_scale is None else z * out_scale
    return z if bias is None else z + bias


def results(g: General, linear, dtype: torch.dtype | None = None, train: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    leaves = g.leaves(dtype)
    for name, t in leaves.items():
        if t is not None and name not in train:
            t.requires_grad_(False)
    y = linear(g, **leaves)
    wanted = {name: t for name, t in leaves.items() if t is not None and t.requires_grad}
    return {"y": y.detach()} | dict(
        zip(wanted, torch.autograd.grad(y, list(wanted.values()), g.case.dy.to(y.dtype)), strict=True)
    )


def errors(g: General) -> dict[str, Error]:
    actual, theirs, exact = results(g, fused), results(g, eager), results(g, eager, torch.float64)
    assert actual.keys() == theirs.keys()
    return {name: error(actual[name], theirs[name], exact[name]) for name in actual}


def assert_as_exact_as_eager(make, shape: Shape, dtypes: Dtypes, kinds: tuple[str, str, str], dropout_p: float) -> None:
    """The largest errors over several draws: the error of a few sums says little of who makes it."""
    count = min(8, max(1, 256 // shape[3]))
    drawn = [errors(general(make(shape, dtypes, dropout_p=dropout_p, bias=True, draw=i), kinds)) for i in range(count)]
    assert_within_bound({name: Error(*map(max, zip(*(e[name] for e in drawn), strict=True))) for name in drawn[0]})


@every_combination
@every_dtype
def test_values_and_every_gradient(dtypes, kinds):
    for i, shape in enumerate(SHAPES):
        assert_as_exact_as_eager(make_case, shape, dtypes, kinds, 0.25 * (i % 2))


@every_combination
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2]], ids=str)
def test_weights_in_4_bits(dtypes, kinds):
    for i, shape in enumerate([(1, 300, 33, 12), (6, 128, 64, 8), (41, 191, 33, 20)]):
        assert_as_exact_as_eager(make_quantised_case, shape, dtypes, kinds, 0.25 * (i % 2))


@every_combination
@pytest.mark.parametrize("M", [0, 3, 41])
def test_reference_is_the_same_form(M, kinds):
    """What runs in float64, and where there is no kernel, against autograd's gradients of the form written down."""
    g = general(make_case((M, 17, 9, 5), Dtypes(torch.float64, torch.float64), bias=True, dropout_p=0.25), kinds)
    actual, exact = results(g, fused), results(g, eager)
    for name in exact:
        torch.testing.assert_close(actual[name], exact[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(5, 20, 9, 1), (3, 40, 33, 4), (41, 129, 65, 40)], ids=str)
@every_dtype
def test_factors_of_one_are_the_plain_operator(dtypes, shape):
    """Bit for bit; with an output scale in half precision, which has the low-rank part added last, y to one rounding."""
    case = make_case(shape, dtypes, bias=True)
    (M, _), r, N = case.x.shape, case.lora_A.shape[0], case.weight.shape[0]
    scale = torch.ones(N) if dtypes.x == F32 else None
    plain = results(General(case, case.weight, None, None, None), fused)
    for gate in (torch.ones(r), torch.ones(M, r)):
        g = General(case, case.weight, gate.to(dtypes.x), torch.eye(r, dtype=dtypes.x), scale)
        ones = results(g, fused)
        assert all(torch.equal(plain[name], ones[name]) for name in plain)
    scaled = results(General(case, case.weight, None, None, torch.ones(N)), fused)["y"].double()
    y, once, in_sums = plain["y"].double(), torch.finfo(dtypes.x).eps, 16 * torch.finfo(F32).eps
    assert ((scaled - y).abs() <= once * y.abs() + in_sums * y.abs().max()).all()


@every_dtype
def test_no_rows(dtypes):
    g = general(make_case((0, 33, 16, 4), dtypes, bias=True), ("token", "core", "scale"))
    got = results(g, fused)
    assert all(not t.any() for t in got.values())
    assert got["gate"].shape == (0, 4)


def test_leading_dimensions_and_a_gate_that_is_expanded():
    case = make_case((6, 33, 17, 4), Dtypes(F32, F32), bias=True)
    gate = torch.rand(2, 1, 4, requires_grad=True)
    y = fused(general(case, ("", "", "")), case.x.view(2, 3, 33), case.lora_A, case.lora_B, None, gate=gate.expand(2, 3, 4))
    y.backward(case.dy.view(2, 3, 17))
    g = general(case, ("token", "", ""))
    flat = results(replace(g, gate=gate.expand(2, 3, 4).reshape(6, 4), case=replace(case, bias=None)), fused)
    assert torch.equal(y.view(6, 17), flat["y"])
    torch.testing.assert_close(gate.grad, flat["gate"].view(2, 3, 4).sum(1, keepdim=True))


def test_kept_panels_and_strides_change_nothing():
    case = make_case((7, 64, 40, 8), Dtypes(BF16, BF16), bias=True)
    g = general(case, ("rank", "core", "scale"))
    args, factors = (case.x, case.lora_A, case.lora_B, case.bias), {"gate": g.gate, "out_scale": g.out_scale}
    panels = lora_ops.pack_weight(case.weight, BF16)
    strided = torch.empty(8, 16, dtype=BF16)[:, ::2].copy_(g.core)
    y = fused(g, *args, core=g.core, **factors)
    if not ops.base_on_torch(BF16):
        assert_within_bound({"y": error(fused(g, *args, core=g.core, panels=panels, **factors), y, y)})
    assert torch.equal(fused(g, *args, core=strided, **factors), y)


@every_combination
def test_results_do_not_depend_on_the_number_of_threads(kinds):
    for dtypes in (DTYPES[0], DTYPES[2]):
        g = general(make_case((300, 200, 300, 20), dtypes, bias=True, dropout_p=0.25), kinds)
        of = {}
        for threads in (1, 2):
            torch.set_num_threads(threads)
            of[threads] = results(g, fused)
        assert ops.base_on_torch(dtypes.x) or all(torch.equal(of[1][name], of[2][name]) for name in of[1])


@pytest.mark.parametrize("train", [(name,) for name in NAMES] + [("lora_B", "core"), ("x", "gate"), ("gate", "out_scale")])
def test_each_gradient_alone(train):
    g = general(make_case((41, 65, 33, 8), Dtypes(F32, F32), bias=True), ("token", "core", "scale"))
    everything, some = results(g, fused), results(g, fused, train=train)
    assert set(some) == {"y", *train}
    assert all(torch.equal(some[name], everything[name]) for name in some)


def test_only_what_the_trained_factors_need_is_kept():
    """Bytes beside the operator's own arguments. x is one of those: it counts where it is kept at all."""
    M, K, N, r = 32, 48, 64, 8
    g = general(make_case((M, K, N, r), Dtypes(BF16, F32), bias=True), ("rank", "core", "scale"))
    x, S, z = M * K * 2, M * r * 4, M * N * 2
    for train, expected in {
        ("lora_A",): x, ("lora_B",): S, ("lora_A", "lora_B"): x + S, ("gate",): S, ("core",): S, ("gate", "core"): S,
        ("out_scale",): S + z, ("lora_A", "out_scale"): x + S + z, ("bias",): 0, NAMES: x + S + z,
    }.items():  # fmt: skip
        leaves = g.leaves()
        for name, t in leaves.items():
            t.requires_grad_(name in train)
        kept = saved(lambda leaves=leaves: fused(g, **leaves))
        factors = [t for name, t in leaves.items() if name != "x"]
        assert bytes_beside(kept, [*factors, g.weight]) == expected, train


@pytest.mark.parametrize("four_bits", [False, True], ids=["dense", "4 bits"])
@pytest.mark.parametrize("train", [False, True])
def test_opcheck(train, four_bits):
    make = make_quantised_case if four_bits else make_case
    for dtype in (F32, torch.float64)[: 1 if four_bits else 2]:
        g = general(make((9, 33, 17, 4), Dtypes(dtype, dtype), bias=True), ("token", "core", "scale"))
        x, A, B, *rest = (t.requires_grad_(train) for t in g.leaves().values())
        weight, blocksize, quant_type = qlora_ops.operand_of(g.weight)
        seed = torch.tensor(7)
        arguments = (x, weight, blocksize, quant_type, A, B, *rest, None, seed, 0.75, 0.25, train)
        torch.library.opcheck(torch.ops.lora_ops.lora_general_forward.default, arguments)


@pytest.mark.usefixtures("no_compiled_code")
@pytest.mark.parametrize("four_bits", [False, True], ids=["dense", "4 bits"])
def test_compile_without_a_graph_break(four_bits):
    make = make_quantised_case if four_bits else make_case
    g = general(make((9, 33, 17, 4), Dtypes(F32, F32), bias=True), ("token", "core", "scale"))
    compiled = torch.compile(lambda **leaves: without_seed(g, **leaves), fullgraph=True, backend="aot_eager")
    expected = results(g, fused)
    actual = results(g, lambda _, **leaves: compiled(**leaves))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("no_compiled_code")
def test_compile_with_dropout():
    g = general(make_case((9, 33, 17, 4), Dtypes(F32, F32), dropout_p=0.5), ("rank", "", ""))
    linear = torch.compile(lora_ops.lora_linear, fullgraph=True, backend="aot_eager")
    options = {"scaling": 1.0, "dropout_p": 0.5, "training": True, "gate": g.gate}
    args = g.case.x, g.case.weight, g.case.lora_A, g.case.lora_B
    torch.manual_seed(3)
    y = linear(*args, **options)
    torch.manual_seed(3)
    assert torch.equal(y, lora_ops.lora_linear(*args, **options))


def test_autocast_takes_factors_as_they_come():
    case = make_case((9, 33, 17, 4), Dtypes(F32, F32), bias=True)
    g = general(case, ("token", "core", "scale"))
    half = replace(g, gate=g.gate.to(F16))
    leaves = half.leaves()
    with torch.autocast("cpu", BF16):
        y = fused(half, **leaves)
    y.sum().backward()
    assert y.dtype == BF16
    assert all(t.grad.dtype == t.dtype for t in leaves.values())
    x, weight = (t.to(BF16) for t in (case.x, case.weight))
    factors = {"gate": half.gate.to(BF16), "core": g.core, "out_scale": g.out_scale}
    at_once = fused(replace(g, weight=weight), x, case.lora_A, case.lora_B, case.bias, **factors)
    torch.testing.assert_close(y, at_once, rtol=0.02, atol=0.02)


def test_the_second_derivative_is_refused():
    g = general(make_case((3, 8, 8, 2), Dtypes(F32, F32)), ("rank", "", ""))
    leaves = g.leaves()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(fused(g, **leaves).sum(), leaves["gate"], create_graph=True)


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"gate": torch.ones(5)}, ValueError, r"gate must be \(r,\) = \(4,\) or \(\.\.\., r\) = \(9, 4\), got shape \(5,\)"),
        ({"gate": torch.ones(8, 4)}, ValueError, r"gate must be .*got shape \(8, 4\)"),
        ({"core": torch.ones(4)}, ValueError, r"core must be \(r, r\) = \(4, 4\), got shape \(4,\)"),
        ({"core": torch.ones(4, 5)}, ValueError, r"core must be .*got shape \(4, 5\)"),
        ({"out_scale": torch.ones(33)}, ValueError, r"out_scale must be \(N,\) = \(17,\), got shape \(33,\)"),
        ({"gate": torch.ones(4, dtype=BF16)}, TypeError, "gate must have x's dtype torch.float32, got torch.bfloat16"),
        ({"core": torch.ones(4, 4, dtype=torch.int64)}, TypeError, "core must have x's dtype"),
        ({"out_scale": torch.ones(17, dtype=torch.float64)}, TypeError, "out_scale must have x's dtype"),
        ({"gate": torch.ones(4, device="meta")}, ValueError, "gate must be on x's device cpu, got meta"),
        ({"gate": torch.ones(4), "lora_A": torch.ones(4, 3)}, ValueError, "lora_A must be"),
        ({"gate": torch.ones(4), "scaling": float("nan")}, ValueError, "scaling must be finite"),
        ({"gate": torch.ones(4), "dropout_p": 1.5, "training": True}, ValueError, "dropout_p must be in"),
        ({"gate": torch.ones(4), "weight": torch.ones(17, 33, requires_grad=True)}, ValueError, "weight requires grad"),
    ],
)
def test_what_does_not_fit_is_named(wrong, kind, message):
    arguments = {
        "x": torch.ones(9, 33), "weight": torch.ones(17, 33), "lora_A": torch.ones(4, 33), "lora_B": torch.ones(17, 4),
        "scaling": 1.0,
    }  # fmt: skip
    state = torch.get_rng_state()
    with pytest.raises(kind, match=message):
        lora_ops.lora_linear(**{**arguments, **wrong})
    assert torch.equal(torch.get_rng_state(), state)
