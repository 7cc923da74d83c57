"""lora_linear as a citizen of torch: registration, compilation, export, autocast, what autograd keeps, bad input."""

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from compare import BF16, F16, F32, Dtypes, eager_lora, error, every_dtype, fused_lora, make_case, oracle, run
from compiled import assert_compiled_is_eager, assert_compiled_layer_is_eager, assert_one_graph_serves_all_rows
from observe import Names, bytes_beside, leaves, saved
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import lora_ops
from lora_ops import FusedLoraLinear, lora_linear, ops, reference

F64 = torch.float64
M, K, N, r = SHAPE = (41, 33, 65, 8)

pytestmark = pytest.mark.usefixtures("no_compiled_code")


# --- torch.library ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtypes", "dropout_p", "train_adapter"),
    [
        ((M, K), Dtypes(F32, F32), 0.0, True),
        ((2, 3, K), Dtypes(BF16, F32), 0.4, True),
        ((K,), Dtypes(F16, F16), 0.4, False),
        ((0, K), Dtypes(F32, F32), 0.0, True),
        ((2, 3, K), Dtypes(F64, F64), 0.4, True),
    ],
    ids=str,
)
def test_opcheck_forward(shape, dtypes, dropout_p, train_adapter):
    case = make_case(SHAPE, dtypes, bias=True)
    x = torch.randn(shape).to(dtypes.x).requires_grad_()
    A, B = (t.requires_grad_(train_adapter) for t in (case.lora_A, case.lora_B))
    seed = torch.tensor(5) if dropout_p else None
    weight = case.weight if train_adapter else case.weight.T.contiguous().T
    arguments = (x, weight, A, B, case.bias.requires_grad_(), None, seed, 0.5, dropout_p)
    torch.library.opcheck(torch.ops.lora_ops.lora_forward, arguments)


@pytest.mark.parametrize("need", [(True, True, True, True), (False, True, False, False), (True, False, True, False)])
@pytest.mark.parametrize(("dtypes", "dropout_p"), [(Dtypes(F32, F32), 0.0), (Dtypes(BF16, F32), 0.4)], ids=str)
def test_opcheck_backward(dtypes, dropout_p, need):
    case = make_case(SHAPE, dtypes)
    S, seed = torch.randn(M, r), torch.tensor(5) if dropout_p else None
    arguments = (case.dy, case.x, case.weight, case.lora_A, case.lora_B, S, seed, 0.5, dropout_p, *need)
    torch.library.opcheck(torch.ops.lora_ops.lora_backward, arguments)


def test_float64_runs_the_reference_and_passes_gradcheck():
    case = make_case((5, 7, 6, 3), Dtypes(F64, F64), bias=True, dropout_p=0.3)
    assert torch.autograd.gradcheck(lambda x, A, B, bias: fused_lora(x, case, A, B, bias), leaves(case))


def test_meta_tensors_give_shapes():
    y = lora_linear(*(torch.empty(s, device="meta") for s in ((4, 5, K), (N, K), (r, K), (N, r))), scaling=1.0)
    assert (y.shape, y.device.type) == ((4, 5, N), "meta")


# --- torch.compile and torch.export -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "dtypes", "dropout_p"),
    [
        ("aot_eager", Dtypes(F32, F32), 0.0),
        ("aot_eager", Dtypes(BF16, F32), 0.4),
        ("aot_eager", Dtypes(F16, F16), 0.4),
        ("inductor", Dtypes(F32, F32), 0.0),
    ],
    ids=str,
)
def test_compile_without_a_graph_break(backend, dtypes, dropout_p):
    case = make_case(SHAPE, dtypes, bias=True, dropout_p=dropout_p)

    def layer(x, A, B, bias):
        return lora_linear(x * 2, case.weight, A, B, scaling=0.5, bias=bias, dropout_p=dropout_p, training=True)

    assert_compiled_is_eager(layer, case, backend)


@pytest.mark.parametrize("prepack", [False, True])
def test_compile_the_module(prepack):
    layer = FusedLoraLinear(K, N, r=4, lora_dropout=0.3, init_lora_weights=False, prepack=prepack)
    assert_compiled_layer_is_eager(layer, torch.randn(2, 5, K))


def test_compile_with_shapes_that_change():
    case = make_case(SHAPE, Dtypes(F32, F32))
    assert_one_graph_serves_all_rows(lambda x: lora_linear(x, case.weight, case.lora_A, case.lora_B, scaling=0.5), K, N)


def test_inductor_drops_the_same_elements_forward_and_backward():
    eye, zero = torch.eye(160), torch.zeros(160, 160)
    layer = torch.compile(lambda x: lora_linear(x, zero, eye, eye, scaling=1.0, dropout_p=0.3, training=True), fullgraph=True)
    x = torch.ones(15, 160, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, x.grad)
    assert (y == 0).any() and (y > 0).any()


def test_export():
    """The exported program holds the operator and computes the same for another number of rows."""
    layer = FusedLoraLinear(K, N, r=4, init_lora_weights=False).eval()
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(layer, (torch.randn(5, K),), dynamic_shapes=({0: rows},))
    x = torch.randn(9, K)
    assert torch.equal(program.module()(x), layer(x))
    assert "lora_ops.lora_forward" in program.graph_module.code


# --- autocast ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [BF16, F16], ids=str)
@pytest.mark.parametrize("model", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("adapter", [F32, BF16], ids=str)
def test_autocast_gives_the_dtype_of_linear(model, adapter, autocast):
    case = make_case(SHAPE, Dtypes(model, adapter), bias=True)
    for x in (case.x, case.x.float()):
        with torch.autocast("cpu", dtype=autocast):
            expected = F.linear(x, case.weight, case.bias)
            inputs = [x.detach().requires_grad_(), *leaves(case)[1:]]
            y = fused_lora(inputs[0], case, *inputs[1:])
        assert y.dtype == expected.dtype == autocast
        y.backward(torch.ones_like(y))
        assert [t.grad.dtype for t in inputs] == [t.dtype for t in inputs]


@pytest.mark.parametrize("model", [F32, BF16], ids=str)
def test_autocast_is_no_less_exact_than_eager(model):
    case = make_case(SHAPE, Dtypes(model, F32), bias=True)
    with torch.autocast("cpu", dtype=BF16):
        actual, eager = (run(f, case, backward=False)["y"] for f in (fused_lora, eager_lora))
    assert error(actual, eager.to(BF16), oracle(case, backward=False)["y"]).within_bound


def test_autocast_leaves_float64_alone():
    case = make_case(SHAPE, Dtypes(F64, F64))
    with torch.autocast("cpu", dtype=BF16):
        assert run(fused_lora, case, backward=False)["y"].dtype == torch.float64


# --- what autograd keeps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@every_dtype
def test_saved_for_backward_is_x_and_S(dtypes, dropout_p):
    """x by reference, M · r of S in fp32, and 8 bytes of seed: no mask, no second x."""
    case = make_case(SHAPE, dtypes, bias=True, dropout_p=dropout_p)
    x, A, B, bias = leaves(case)
    tensors = saved(lambda: fused_lora(x, case, A, B, bias))
    shared = [x, case.weight, A, B]
    assert any(t.data_ptr() == x.data_ptr() for t in tensors)
    assert bytes_beside(tensors, shared) == 4 * M * r + (8 if dropout_p else 0)


@pytest.mark.parametrize(("train_A", "train_B"), [(False, True), (True, False), (False, False)])
def test_frozen_factors_save_less(train_A, train_B):
    """A frozen A keeps no x, a frozen B no S."""
    case = make_case(SHAPE, Dtypes(BF16, F32))
    x, A, B, _ = leaves(make_case(SHAPE, Dtypes(BF16, F32), bias=True))
    tensors = saved(lambda: fused_lora(x, case, A.requires_grad_(train_A), B.requires_grad_(train_B), None))
    assert any(t.data_ptr() == x.data_ptr() for t in tensors) == train_A
    assert bytes_beside(tensors, [x, case.weight, A, B]) == (4 * M * r if train_B else 0)


def test_nothing_is_saved_without_grad():
    case = make_case(SHAPE, Dtypes(F32, F32), bias=True)
    tensors = []
    with torch.no_grad(), saved_tensors_hooks(tensors.append, lambda t: t):
        fused_lora(*leaves(case)[:1], case, *leaves(case)[1:])
    assert tensors == []


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    """Gives the same gradients, bit for bit."""
    case = make_case(SHAPE, Dtypes(BF16, F32), bias=True)
    layer = FusedLoraLinear(K, N, r=4, init_lora_weights=False, dtype=BF16)
    results = []
    for run_layer in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        layer.zero_grad()
        x = case.x.detach().requires_grad_()
        run_layer(x).backward(case.dy)
        results.append([x.grad, layer.lora_A["default"].grad, layer.lora_B["default"].grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_inputs_changed_between_forward_and_backward_are_noticed():
    case = make_case(SHAPE, Dtypes(F32, F32), bias=True)
    x, A, B, bias = leaves(case)
    y = fused_lora(x, case, A, B, bias)
    with torch.no_grad():
        A.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_derivative_is_an_error():
    case = make_case(SHAPE, Dtypes(F32, F32), bias=True)
    inputs = leaves(case)
    y = fused_lora(inputs[0], case, *inputs[1:])
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(y.sum(), inputs[0], create_graph=True)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_gradient_of_the_weight_is_an_error_by_name():
    layer = nn.Linear(K, N)
    A, B, x = torch.randn(r, K, requires_grad=True), torch.randn(N, r), torch.randn(M, K)
    with pytest.raises(ValueError, match="weight requires grad, but W0 is frozen"):
        lora_linear(x, layer.weight, A, B, scaling=1.0)
    with pytest.raises(ValueError, match="weight requires grad, but W0 is frozen"):
        torch.ops.lora_ops.lora_forward(x, layer.weight, A, B, None, None, None, 1.0, 0.0)
    with torch.no_grad():
        lora_linear(x, layer.weight, A, B, scaling=1.0)


def zeros(*shape: int, dtype: torch.dtype = F32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


GOOD = {"x": zeros(M, K), "weight": zeros(N, K), "lora_A": zeros(r, K), "lora_B": zeros(N, r), "scaling": 1.0}
HALF = {"x": zeros(M, K, dtype=BF16), "weight": zeros(N, K, dtype=BF16)}

# What is wrong, the exception, what its message says of the argument, and the value in it.
BAD = {
    "x: last dimension": ({"x": zeros(M, 32)}, ValueError, "x must be (..., K) with K = 33", "(41, 32)"),
    "x: no dimension": ({"x": zeros()}, ValueError, "x must be (..., K)", "()"),
    "x: integers": ({"x": zeros(M, K, dtype=torch.int64)}, TypeError, "x must be float32", "torch.int64"),
    "x: complex": ({"x": zeros(M, K, dtype=torch.complex64)}, TypeError, "x must be float32", "torch.complex64"),
    "x: device": ({"x": zeros(M, K, device="meta")}, ValueError, "weight must be on x's device meta", "cpu"),
    "weight: dimensions": ({"weight": zeros(1, N, K)}, ValueError, "weight must be (N, K)", "(1, 65, 33)"),
    "weight: dtype": ({"weight": zeros(N, K, dtype=BF16)}, TypeError, "weight must have x's dtype", "torch.bfloat16"),
    "weight: device": ({"weight": zeros(N, K, device="meta")}, ValueError, "weight must be on x's device cpu", "meta"),
    "lora_A: columns": ({"lora_A": zeros(r, 32)}, ValueError, "lora_A must be (r, K) with K = 33", "(8, 32)"),
    "lora_A: r = 0": ({"lora_A": zeros(0, K), "lora_B": zeros(N, 0)}, ValueError, "(r, K) with r >= 1", "(0, 33)"),
    "lora_A: dtype": ({"lora_A": zeros(r, K, dtype=F16)}, TypeError, "lora_A must have x's dtype", "torch.float16"),
    "lora_A: device": ({"lora_A": zeros(r, K, device="meta")}, ValueError, "lora_A must be on x's device", "meta"),
    "lora_B: rows": ({"lora_B": zeros(64, r)}, ValueError, "lora_B must be (N, r) = (65, 8)", "(64, 8)"),
    "lora_B: columns": ({"lora_B": zeros(N, 7)}, ValueError, "lora_B must be (N, r) = (65, 8)", "(65, 7)"),
    "lora_B: dtype": ({**HALF, "lora_B": zeros(N, r, dtype=BF16)}, TypeError, "one dtype", "torch.bfloat16"),
    "lora_B: device": ({"lora_B": zeros(N, r, device="meta")}, ValueError, "lora_B must be on x's device", "meta"),
    "bias: length": ({"bias": zeros(64)}, ValueError, "bias must be (N,) = (65,)", "(64,)"),
    "bias: dtype": ({"bias": zeros(N, dtype=F16)}, TypeError, "bias must have x's dtype", "torch.float16"),
    "bias: device": ({"bias": zeros(N, device="meta")}, ValueError, "bias must be on x's device", "meta"),
    "scaling: infinite": ({"scaling": float("inf")}, ValueError, "scaling must be finite", "inf"),
    "scaling: NaN": ({"scaling": float("nan")}, ValueError, "scaling must be finite", "nan"),
    "dropout_p: 1": ({"dropout_p": 1.0}, ValueError, "dropout_p must be in [0, 1)", "1.0"),
    "dropout_p: negative": ({"dropout_p": -0.1}, ValueError, "dropout_p must be in [0, 1)", "-0.1"),
    "dropout_p: NaN": ({"dropout_p": float("nan")}, ValueError, "dropout_p must be in [0, 1)", "nan"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_named_with_its_value(bad):
    wrong, kind, what, value = BAD[bad]
    with pytest.raises(kind, match=f"{re.escape(what)}.*{re.escape(value)}"):
        lora_linear(**{**GOOD, **wrong})


@pytest.mark.parametrize("bad", ["lora_A: r = 0", "weight: dtype", "dropout_p: 1"])
def test_bad_input_draws_nothing_from_the_generator(bad):
    wrong, kind, _, _ = BAD[bad]
    before = torch.get_rng_state()
    with pytest.raises(kind):
        lora_linear(**{**GOOD, "dropout_p": 0.1, "training": True, **wrong})
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("panels", [zeros(1 << 16), zeros(1 << 16, dtype=F16)], ids=["size", "dtype"])
def test_panels_of_another_weight_are_an_error(panels):
    case = make_case(SHAPE, Dtypes(F32, F32))
    with pytest.raises((TypeError, ValueError), match="panels"):
        lora_linear(case.x, case.weight, case.lora_A, case.lora_B, scaling=1.0, panels=panels)


@every_dtype
def test_reference_is_public(dtypes):
    """And no less exact than eager in the dtypes that it stands in for a kernel in."""
    assert lora_ops.reference is reference
    case = make_case(SHAPE, dtypes, bias=True)
    y, _ = reference.lora_forward(case.x, case.weight, case.lora_A, case.lora_B, case.bias, case.scaling)
    eager, exact = run(eager_lora, case, backward=False)["y"], oracle(case, backward=False)["y"]
    assert error(y, eager, exact).within_bound


# --- without the dispatcher where it has no say ------------------------------------------------------------------------


def test_modes_and_the_profiler_see_the_operator():
    case = make_case((3, 33, 17, 4), Dtypes(F32, F32))
    with torch.no_grad():
        plain = run(fused_lora, case, backward=False)["y"]
        with Names() as names:
            seen = run(fused_lora, case, backward=False)["y"]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            profiled = run(fused_lora, case, backward=False)["y"]
    assert "lora_ops::lora_forward" in names.seen
    assert "lora_ops::lora_forward" in [event.key for event in profile.key_averages()]
    assert torch.equal(plain, seen) and torch.equal(plain, profiled)


@pytest.mark.parametrize("backward", [False, True])
def test_plain_tensors_do_without_the_dispatcher(monkeypatch, backward):
    """With the same result: its price would be noticed at every layer. The profiler, which shows operators, is told of them."""
    case = make_case((3, 33, 17, 4), Dtypes(BF16, F32), dropout_p=0.25)
    torch.manual_seed(1)
    with torch.profiler.profile() as profile:
        dispatched = run(fused_lora, case, backward=backward)
    names = {event.name for event in profile.events()}
    assert "lora_ops::lora_forward" in names and ("lora_ops::lora_backward" in names) == backward
    monkeypatch.setattr(ops, "lora_forward", dataclasses.replace(ops.lora_forward, forward=None, backward=None))
    torch.manual_seed(1)
    plain = run(fused_lora, case, backward=backward)
    assert plain.keys() == dispatched.keys()
    assert all(torch.equal(plain[name], dispatched[name]) for name in plain)


def test_subclasses_reach_the_dispatcher():
    class Sub(torch.Tensor):
        pass

    case = make_case((3, 33, 17, 4), Dtypes(F32, F32))
    args = (case.weight, case.lora_A, case.lora_B)
    with torch.no_grad():
        assert isinstance(lora_linear(case.x.as_subclass(Sub), *args, scaling=1.0), Sub)
