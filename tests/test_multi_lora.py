"""multi_lora_linear: every row with an adapter of its own, against fp64, separate runs and PEFT's mixed batch."""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from buffers import poisoned
from compare import BF16, F16, F32, Dtypes, Error, assert_within_bound, draws, error, every_dtype
from compiled import Graphs
from torch import Tensor, nn

import lora_ops
from lora_ops import AdapterBank, multi_lora_linear, ops, reference

RANKS = (4, 16, 1, 33, 70)
SHAPES = [(1, 33, 17), (3, 160, 97), (8, 129, 33), (9, 64, 128), (41, 300, 97), (100, 33, 129)]  # (M, K, N)


@dataclass(frozen=True)
class Mixed:
    x: Tensor
    weight: Tensor
    bank: AdapterBank
    ids: Tensor
    bias: Tensor
    dy: Tensor
    dropout_p: float = 0.0

    @property
    def adapters(self) -> list[tuple[Tensor, Tensor, float]]:
        places = [self.bank.index(name) for name in self.bank.names]
        return [(self.bank._A[i], self.bank._B[i], float(self.bank._scalings[i])) for i in places]


def mixed(M: int, K: int, N: int, dtypes: Dtypes, ranks=RANKS, dropout_p: float = 0.0, draw: int = 0) -> Mixed:
    ids = torch.randint(-1, len(ranks), (M,), generator=torch.Generator().manual_seed(M))
    g = torch.Generator().manual_seed((M * 1009 + K * 31 + N) * 31 + draw)

    def normal(*size: int, std: float = 1.0, dtype: torch.dtype = dtypes.x) -> Tensor:
        return (torch.randn(size, generator=g, dtype=torch.float64) * std).to(dtype)

    bank = AdapterBank()
    for i, r in enumerate(ranks):
        A, B = normal(r, K, std=K**-0.5, dtype=dtypes.adapter), normal(N, r, std=r**-0.5, dtype=dtypes.adapter)
        bank.add(f"adapter{i}", A.requires_grad_(), B.requires_grad_(), 0.5 + i)
    x, weight = normal(M, K).requires_grad_(), normal(N, K, std=K**-0.5)
    return Mixed(x, weight, bank, ids, normal(N).requires_grad_(), normal(M, N), dropout_p)


def results(case: Mixed, linear) -> dict[str, Tensor]:
    leaves = {"dx": case.x, "dbias": case.bias}
    for i in sorted(set(case.ids.tolist()) - {-1}):
        leaves |= {f"dA{i}": case.adapters[i][0], f"dB{i}": case.adapters[i][1]}
    y = linear(case)
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), case.dy), strict=True))}


def fused(case: Mixed) -> Tensor:
    torch.manual_seed(7)
    return multi_lora_linear(case.x, case.weight, case.bank, case.ids, bias=case.bias, dropout_p=case.dropout_p, training=True)


def eager(case: Mixed) -> Tensor:
    """PEFT's loop over adapters, with the kernel's dropout mask."""
    h = case.x
    if case.dropout_p:
        torch.manual_seed(7)
        keep = reference.dropout_keep(torch.randint(0, 2**62, (), dtype=torch.int64), case.dropout_p, *h.shape)
        h = h * (keep.to(h.dtype) / (1 - case.dropout_p))
    y = F.linear(case.x, case.weight, case.bias)
    for i, (A, B, scaling) in enumerate(case.adapters):
        rows = (case.ids == i).nonzero()[:, 0]
        y = y.index_add(0, rows, (F.linear(F.linear(h[rows].to(A.dtype), A), B) * scaling).to(y.dtype))
    return y


def in_float64(case: Mixed) -> Mixed:
    bank = AdapterBank()
    for name, (A, B, scaling) in zip(case.bank.names, case.adapters, strict=True):
        bank.add(name, A.detach().double().requires_grad_(), B.detach().double().requires_grad_(), scaling)
    x, bias = (t.detach().double().requires_grad_() for t in (case.x, case.bias))
    return replace(case, x=x, weight=case.weight.double(), bank=bank, bias=bias, dy=case.dy.double())


def errors(case: Mixed) -> dict[str, Error]:
    actual, loop, exact = results(case, fused), results(case, eager), results(in_float64(case), fused)
    return {name: error(actual[name], loop[name], exact[name]) for name in actual}


def largest(shape: tuple[int, int, int], errors_of: Callable[[int], dict[str, Error]]) -> dict[str, Error]:
    """Over as many draws as compare.py gives a case of as few rows as an adapter has."""
    M, K, N = shape
    drawn = [errors_of(draw) for draw in range(draws((-(-M // len(RANKS)), K, N, min(RANKS))))]
    return {name: Error(*map(max, zip(*(e[name] for e in drawn), strict=True))) for name in drawn[0]}


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_error(shape, dtypes, dropout_p):
    assert_within_bound(largest(shape, lambda draw: errors(mixed(*shape, dtypes, dropout_p=dropout_p, draw=draw))))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_error_over_blocks(dropout_p):
    """Reductions and rows that are split into blocks, and more rows of an adapter than are summed at once."""
    assert_within_bound(errors(mixed(640, 5000, 33, Dtypes(F32, F32), (3, 17), dropout_p)))


def test_the_float64_path_is_autograd_of_the_equation():
    case = in_float64(mixed(13, 33, 17, Dtypes(F32, F32)))
    actual, expected = results(case, fused), results(case, eager)
    assert all(torch.allclose(actual[name], expected[name], rtol=1e-12, atol=1e-12) for name in expected)


@every_dtype
def test_rows_are_those_of_separate_runs(dtypes):
    """Every row's y and dx, and every adapter's gradients, are as near to fp64 as a run of that adapter alone."""
    case = mixed(41, 129, 65, dtypes, RANKS[:3])
    actual, exact = results(case, fused), results(in_float64(case), fused)
    for i, (A, B, scaling) in enumerate(case.adapters):
        rows = case.ids == i
        x = case.x.detach()[rows].requires_grad_()
        y = lora_ops.lora_linear(x, case.weight, A, B, scaling=scaling, bias=case.bias)
        alone = dict(zip(("dx", f"dA{i}", f"dB{i}"), torch.autograd.grad(y, (x, A, B), case.dy[rows]), strict=True))
        alone["y"] = y.detach()
        for name, value in alone.items():
            here, there = (t[name][rows] if name in ("y", "dx") else t[name] for t in (actual, exact))
            assert_within_bound({name: error(here, value, there)})


def test_is_one_stacked_adapter_with_one_hot_gates():
    """Of rank Σ r_i, in which each row's gate is 1 at its own adapter's ranks, 0 elsewhere."""
    case = in_float64(mixed(41, 129, 65, Dtypes(F32, F32)))
    factors = case.adapters
    A = torch.cat([a for a, _, _ in factors])
    B = torch.cat([s * b for _, b, s in factors], dim=1)
    owner = torch.cat([torch.full((len(a),), i) for i, (a, _, _) in enumerate(factors)])
    gate = (case.ids[:, None] == owner).double()

    def stacked(case: Mixed) -> Tensor:
        return lora_ops.lora_linear(case.x, case.weight, A, B, scaling=1.0, bias=case.bias, gate=gate)

    actual, expected = results(case, fused), results(case, stacked)
    assert all(torch.allclose(actual[name], expected[name], rtol=1e-11, atol=1e-11) for name in expected)


def test_adapters_that_do_not_occur_get_no_gradient():
    case = mixed(9, 33, 17, Dtypes(F32, F32), (4, 8, 2))
    case = replace(case, ids=torch.tensor([-1, 1] * 4 + [1]))
    fused(case).backward(case.dy)
    assert [A.grad is None for A, _, _ in case.adapters] == [B.grad is None for _, B, _ in case.adapters] == [True, False, True]


@pytest.mark.parametrize("M", [0, 1, 9, 41])
def test_rows_without_an_adapter(M):
    """Have the base layer's output and gradient, however many there are."""
    case = mixed(M, 33, 17, Dtypes(F32, F32))
    assert_within_bound(errors(replace(case, ids=torch.full((M,), -1))))
    y = multi_lora_linear(case.x, case.weight, AdapterBank(), [None] * M)
    assert y.shape == (M, 17)


def test_names_indices_and_sequences():
    case = mixed(12, 33, 17, Dtypes(F32, F32), (4, 8))
    x, ids = case.x.detach().view(3, 4, 33), torch.tensor([1, -1, 0])
    by_row = multi_lora_linear(x, case.weight, case.bank, ids[:, None].expand(3, 4))
    for given in (ids, ["adapter1", None, "adapter0"], [1, -1, 0]):
        assert torch.equal(multi_lora_linear(x, case.weight, case.bank, given), by_row)


def test_a_removed_adapter_leaves_its_place_to_the_next():
    bank = AdapterBank()
    for name in "abc":
        bank.add(name, torch.ones(2, 3), torch.ones(4, 2), 1.0)
    bank.remove("b")
    x, weight = torch.ones(1, 3), torch.zeros(4, 3)
    with pytest.raises(ValueError, match="adapter_ids has 1, whose adapter was removed"):
        multi_lora_linear(x, weight, bank, torch.tensor([1]))
    assert (bank.names, len(bank), "b" in bank) == (["a", "c"], 2, False)
    assert bank.add("d", torch.ones(1, 3), torch.ones(4, 1), 2.0) == 1
    assert [bank.index(name) for name in "acd"] == [0, 2, 1]
    assert torch.equal(multi_lora_linear(x, weight, bank, ["d"]), torch.full((1, 4), 6.0))


@pytest.mark.parametrize("dtypes", [Dtypes(F32, F32), Dtypes(BF16, F32)], ids=str)
@pytest.mark.parametrize("M", [3, 41])
def test_nothing_outside_the_buffers_is_used(dtypes, M):
    """Inputs lie in NaN: results are those of contiguous copies."""
    case = mixed(M, 129, 33, dtypes)
    bank = AdapterBank()
    for name, (A, B, scaling) in zip(case.bank.names, case.adapters, strict=True):
        bank.add(name, poisoned(A.detach()).requires_grad_(), poisoned(B.detach()).requires_grad_(), scaling)
    x, weight = poisoned(case.x.detach()).requires_grad_(), poisoned(case.weight)
    bias, dy = poisoned(case.bias.detach()[None])[0].requires_grad_(), poisoned(case.dy)
    inside = results(replace(case, x=x, weight=weight, bank=bank, bias=bias, dy=dy), fused)
    expected = results(case, fused)
    assert all(torch.isfinite(t).all() for t in inside.values())
    if not ops.base_on_torch(dtypes.x):
        assert all(torch.equal(inside[name], expected[name]) for name in expected)


def test_a_row_of_nan_stays_one():
    case = mixed(41, 129, 33, Dtypes(F32, F32))
    x = case.x.detach().clone()
    x[5] = torch.nan
    y = multi_lora_linear(x, case.weight, case.bank, case.ids)
    assert y.isnan().any(1).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("M", [3, 41])
@pytest.mark.parametrize("size", [1.0, 1e38, float("inf")], ids=str)
@pytest.mark.parametrize("dtypes", [Dtypes(F32, F32), Dtypes(BF16, BF16), Dtypes(F16, F16)], ids=str)
def test_a_row_alone_with_its_adapter_is_that_row_beside_its_like(dtypes, size, M):
    """It meets A and B where they lie, several rows packed copies of them: S is in fp32, and the sum rounded once, for both."""
    if size == 1e38 and dtypes.x == F16:
        pytest.skip("beyond float16")
    K, N = 160, 80
    case = mixed(M, K, N, dtypes, [16] * M)
    x, weight = case.x.detach().clone(), torch.zeros_like(case.weight)
    x[1, :5] *= size
    ids = torch.arange(M)
    with torch.no_grad():
        alone = multi_lora_linear(x, weight, case.bank, ids)
        beside = multi_lora_linear(x.repeat_interleave(2, 0), weight, case.bank, ids.repeat_interleave(2))[::2]
    assert torch.equal(alone.isfinite(), beside.isfinite())
    alone, beside = (torch.where(beside.isfinite(), y, 0).double() for y in (alone, beside))
    one_rounding = 2 * torch.finfo(dtypes.x).eps * beside.abs()
    sums = 1e-5 * beside.abs().amax(1, keepdim=True)  # of fp32, in another order
    assert ((alone - beside).abs() <= one_rounding + sums).all()


@pytest.mark.parametrize("shape", [(9, 700, 520), (100, 300, 257), (640, 2100, 33)], ids=str)
@pytest.mark.parametrize("adapter", [F32, BF16], ids=str)
def test_result_does_not_depend_on_the_threads(shape, adapter):
    if ops.base_on_torch(F32):
        pytest.skip("torch's own products depend on the threads")
    case = mixed(*shape, Dtypes(BF16, adapter), dropout_p=0.2 if adapter == F32 else 0.0)
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(results(case, fused))
    assert all(torch.equal(runs[0][name], run[name]) for run in runs[1:] for name in run)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("M", [1, 3, 41])
def test_4_bit_weight(M, dtype):
    """As near to fp64 over the dequantised weight as eager is over it in x's dtype."""

    def errors_of(draw: int) -> dict[str, Error]:
        case = mixed(M, 128, 96, Dtypes(dtype, F32), draw=draw)
        qweight = lora_ops.quantize_nf4(case.weight.float())
        wide = qweight.dequantize(F32)
        loop = results(replace(case, weight=wide.to(dtype)), eager)
        exact = results(in_float64(replace(case, weight=wide)), fused)
        actual = results(replace(case, weight=qweight), fused)
        return {name: error(actual[name], loop[name], exact[name]) for name in actual}

    assert_within_bound(largest((M, 128, 96), errors_of))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_peft_mixed_batch(dtype):
    """A real PEFT layer's adapter_names give the same, up to what PEFT loses."""
    from peft import LoraConfig, inject_adapter_in_model

    base = nn.Linear(65, 33, dtype=dtype)
    model, bank = nn.ModuleDict({"layer": base}), AdapterBank()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, r in enumerate((4, 8, 3)):
            config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=["layer"], init_lora_weights=False)
            model = inject_adapter_in_model(config, model, adapter_name=f"a{i}")
    layer = model.layer.eval()
    for name in ("a0", "a1", "a2"):
        bank.add(name, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
    names = ["a1", "__base__", "a0", "a2", "a1", "__base__", "a0"]
    x = torch.randn(7, 5, 65).to(dtype)
    ids = [None if name == "__base__" else name for name in names]
    with torch.no_grad():
        expected = layer(x, adapter_names=names)
        actual = multi_lora_linear(x, base.weight, bank, ids, bias=base.bias)
        wide = AdapterBank()
        for name in bank.names:
            wide.add(name, layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double(), layer.scaling[name])
        exact = multi_lora_linear(x.double(), base.weight.double(), wide, ids, bias=base.bias.double())
    assert_within_bound({"y": error(actual, expected, exact)})


@pytest.mark.parametrize("train", [False, True])
def test_opcheck(train):
    case = mixed(9, 33, 17, Dtypes(F32, F32), (4, 8))
    (A0, B0, s0), (A1, B1, s1) = case.adapters
    As, Bs = ([t.detach().requires_grad_(train) for t in ts] for ts in ((A0, A1), (B0, B1)))
    scalings = torch.tensor([s0, s1], dtype=torch.float64)
    arguments = (case.x, [case.weight], 33, 0, "", As, Bs, scalings, case.ids, case.bias, None, 0.0)
    torch.library.opcheck(torch.ops.lora_ops.multi_lora_forward, arguments)


@pytest.mark.usefixtures("no_compiled_code")
def test_compile_without_a_graph_break_or_another_compilation():
    """Other rows and other adapters of the same shapes run the same graph, with eager's results."""
    graphs, case = Graphs(), mixed(9, 33, 17, Dtypes(F32, F32), (4, 8, 8))
    layer = torch.compile(lambda x, ids: multi_lora_linear(x, case.weight, case.bank, ids), fullgraph=True, backend=graphs)
    for _ in range(3):
        with torch.no_grad():
            for ids in (case.ids, torch.full((9,), -1), case.ids.flip(0)):
                assert torch.equal(layer(case.x, ids), multi_lora_linear(case.x, case.weight, case.bank, ids))
        A, B, _ = case.adapters[1]
        case.bank.remove("adapter1")
        case.bank.add("adapter1", A.detach() + 1, B.detach() - 1, 3.0)
    assert graphs.count <= 2  # the second without the requires_grad that the first adapter had


def bank_of(K: int = 3, N: int = 4, r: int = 2, dtype: torch.dtype = F32) -> AdapterBank:
    bank = AdapterBank()
    bank.add("a", torch.zeros(r, K, dtype=dtype), torch.zeros(N, r, dtype=dtype), 1.0)
    return bank


GOOD = {"x": torch.zeros(2, 3), "weight": torch.zeros(4, 3), "bank": bank_of(), "adapter_ids": torch.tensor([0, -1])}
BAD = {
    "x": ({"x": torch.zeros(2, 5)}, ValueError, "x must be (..., K) with K = 3", "(2, 5)"),
    "name": ({"adapter_ids": ["a", "b"]}, ValueError, "adapter_ids: there is no adapter 'b'", "['a']"),
    "large id": ({"adapter_ids": torch.tensor([0, 1])}, ValueError, "adapter_ids must be -1 or the index", "got 1"),
    "negative id": ({"adapter_ids": torch.tensor([0, -2])}, ValueError, "adapter_ids must be -1 or the index", "got -2"),
    "ids' dtype": ({"adapter_ids": torch.zeros(2)}, TypeError, "adapter_ids must be int64", "torch.float32"),
    "ids' shape": ({"adapter_ids": torch.tensor([0])}, ValueError, "adapter_ids must have a leading part", "(1,)"),
    "bank's K": ({"bank": bank_of(K=5)}, ValueError, "lora_A must be (r, K) with K = 3", "(2, 5)"),
    "bank's N": ({"bank": bank_of(N=5)}, ValueError, "lora_B must be (N, r) = (4, 2)", "(5, 2)"),
    "bank's dtype": ({"bank": bank_of(dtype=BF16)}, TypeError, "lora_A must have x's dtype", "torch.bfloat16"),
    "bias": ({"bias": torch.zeros(3)}, ValueError, "bias must be (N,)", "(3,)"),
    "dropout_p": ({"dropout_p": 1.0, "training": True}, ValueError, "dropout_p must be in [0, 1)", "1.0"),
    "weight": ({"weight": torch.zeros(4, 3).requires_grad_()}, ValueError, "weight requires grad", "frozen"),
}


def test_the_operator_itself_holds_its_K_against_x():
    A, B = torch.randn(2, 8), torch.randn(4, 2)
    rest = 9, 0, "", [A], [B], torch.ones(1, dtype=torch.float64), torch.zeros(3, dtype=torch.int64), None, None, 0.0
    with pytest.raises(ValueError, match="K = 9"):
        torch.ops.lora_ops.multi_lora_forward(torch.randn(3, 8), [torch.randn(4, 8)], *rest)


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_named_with_its_value(bad):
    wrong, kind, what, value = BAD[bad]
    with pytest.raises(kind, match=f"{re.escape(what)}.*{re.escape(value)}"):
        multi_lora_linear(**{**GOOD, **wrong})


@pytest.mark.parametrize(
    ("A", "B", "scaling", "kind", "what"),
    [
        (torch.zeros(0, 3), torch.zeros(4, 0), 1.0, ValueError, "lora_A must be (r, K) with r >= 1"),
        (torch.zeros(2, 3), torch.zeros(4, 3), 1.0, ValueError, "lora_B must be (N, r) with r = 2"),
        (torch.zeros(2, 5), torch.zeros(4, 2), 1.0, ValueError, "(K, N) = (3, 4)"),
        (torch.zeros(2, 3), torch.zeros(4, 2).bfloat16(), 1.0, TypeError, "one floating dtype"),
        (torch.zeros(2, 3), torch.zeros(4, 2), float("inf"), ValueError, "scaling must be finite"),
    ],
    ids=str,
)
def test_a_bank_takes_nothing_that_does_not_fit(A, B, scaling, kind, what):
    bank = bank_of()
    with pytest.raises(kind, match=re.escape(what)):
        bank.add("new", A, B, scaling)
    with pytest.raises(ValueError, match="'a' is taken"):
        bank.add("a", torch.zeros(2, 3), torch.zeros(4, 2), 1.0)
    assert bank.names == ["a"]
