"""One adapter from several: beside PEFT where it is right, beside fp64 where it is not."""

import math

import compare
import pytest
import torch
from combining import F64, OF_ANY_RANK, OF_FACTORS, K, N, assert_as_near, delta, drawn, exact, options, ours, peft_s, wrong_by
from compare import BF16, F16, F32
from observe import LargestTensor
from tiny_models import Mlp, injected
from torch import Tensor

import lora_ops
from lora_ops import Adapter, add_weighted_adapter, combine, lora_layers
from lora_ops.adapters.combine import METHODS

# --- as PEFT ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("majority_sign_method", ["total", "frequency"])
@pytest.mark.parametrize(("method", "n"), [("linear", 1), *((method, n) for method in OF_FACTORS for n in (2, 3))])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_factors_are_peft_s(method: str, majority_sign_method: str, n: int, dtype: torch.dtype) -> None:
    """Bit for bit, random numbers too. Weights of which PEFT's fp32 roots are exact, where the factors are fp64."""
    adapters = drawn((4,) * n, (2.0, 0.5, 0.125), dtype)
    weights = (0.7, 1.3, 0.4)[:n] if dtype == F32 else (0.5, 2.0, 0.5)[:n]
    how = options(method, density=0.3, majority_sign_method=majority_sign_method)
    actual, expected = ours(adapters, weights, method, **how), peft_s(adapters, weights, method, **how)
    assert torch.equal(actual.lora_A, expected.lora_A)
    assert torch.equal(actual.lora_B, expected.lora_B)
    assert actual.scaling == expected.scaling == 1.0


@pytest.mark.parametrize("weights", [(0.7, -1.3, 0.4), (-0.7, -1.3, 0.4)])
@pytest.mark.parametrize("method", ["linear", "dare_linear", "magnitude_prune"])
def test_negative_weights_without_elections_are_peft_s(method: str, weights) -> None:
    adapters = drawn((4, 4, 4))
    actual, expected = ours(adapters, weights, method, **options(method)), peft_s(adapters, weights, method, **options(method))
    assert torch.equal(actual.lora_A, expected.lora_A)
    assert torch.equal(actual.lora_B, expected.lora_B)


@pytest.mark.parametrize("ranks", [(4, 4), (3, 7, 5)], ids=str)
@pytest.mark.parametrize("svd_rank", [None, 2, 6])
@pytest.mark.parametrize("method", ["svd", "ties_svd", "magnitude_prune_svd"])
def test_svd_is_as_near_as_peft_s(method: str, svd_rank: int | None, ranks) -> None:
    """The oracle is PEFT in fp64, whose weights, rounded to fp32, are exact here."""
    adapters, weights = drawn(ranks), (0.75, 0.5, 1.25)[: len(ranks)]
    wide = [Adapter(A.double(), B.double(), s) for A, B, s in adapters]
    how = options(method, svd_rank=svd_rank)
    actual, eager = ours(adapters, weights, method, **how), peft_s(adapters, weights, method, **how)
    assert actual.lora_A.shape == eager.lora_A.shape
    assert_as_near(actual, eager, delta(peft_s(wide, weights, method, **how)))


@pytest.mark.parametrize("method", ["dare_linear_svd", "dare_ties_svd"])
def test_svd_of_dare_draws_as_peft(method: str) -> None:
    """At full rank the result shows every mask."""
    adapters, weights = drawn(), (0.75, 0.5)
    how = options(method, svd_rank=N)
    expected = delta(peft_s([Adapter(A.double(), B.double(), s) for A, B, s in adapters], weights, method, **how))
    actual, eager = ours(adapters, weights, method, **how), peft_s(adapters, weights, method, **how)
    assert_as_near(actual, eager, expected)
    assert wrong_by(ours(adapters, weights, method, **how, seed=8), expected) > 0.1


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.7, -0.3, 0.1), (-2, -0.5, 0)], ids=str)
@pytest.mark.parametrize("ranks", [(4, 4), (1, 6, 3), (30, 30)], ids=str)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_cat_is_exact(dtype: torch.dtype, ranks, weights) -> None:
    adapters, weights = drawn(ranks, (2.0, -1.7, 0.3), dtype), weights[: len(ranks)]
    result, theirs = combine(adapters, weights, "cat"), peft_s(adapters, weights, "cat")
    assert result.lora_A.shape == (sum(ranks), K)
    assert_as_near(result, theirs, exact(adapters, weights))
    assert torch.equal(result.lora_B, theirs.lora_B)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_cat_has_peft_s_bits_where_nothing_is_rounded(dtype: torch.dtype) -> None:
    adapters, weights = drawn((4, 2), (2.0, 0.5), dtype), (0.25, -4)
    for actual, expected in zip(combine(adapters, weights, "cat"), peft_s(adapters, weights, "cat"), strict=True):
        assert torch.equal(torch.as_tensor(actual), torch.as_tensor(expected))


@pytest.mark.parametrize("weights", [(1, 1), (0.75, -0.5), (-2, -0.5)], ids=str)
@pytest.mark.parametrize("ranks", [(4, 4), (2, 9), (30, 30)], ids=str)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_svd_of_all_ranks_is_exact(dtype: torch.dtype, ranks, weights) -> None:
    adapters, rank = drawn(ranks, dtype=dtype), min(sum(ranks), N)
    result = combine(adapters, weights, "svd", svd_rank=sum(ranks))
    assert result.lora_A.shape == (rank, K)
    theirs = peft_s([Adapter(A.to(wide(dtype)), B.to(wide(dtype)), s) for A, B, s in adapters], weights, "svd", svd_rank=rank)
    theirs = Adapter(theirs.lora_A.to(dtype), theirs.lora_B.to(dtype))
    assert_as_near(result, theirs, exact(adapters, weights))


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, F32)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_svd_is_the_best_of_its_rank(rank: int) -> None:
    """What it lacks are the smaller singular values. Its factors are PEFT's: Vh, and U S."""
    adapters, weights = drawn((4, 5)), (0.7, -0.3)
    wanted = exact(adapters, weights)
    result, theirs = (make(adapters, weights, "svd", svd_rank=rank) for make in (combine, peft_s))
    values = torch.linalg.svdvals(wanted)
    lacking, eager = ((delta(adapter) - wanted).norm().float() for adapter in (result, theirs))
    assert compare.error(lacking, eager, values[rank:].norm()).within_bound
    for i, gram in enumerate((torch.eye(rank, dtype=F64), torch.diag(values[:rank] ** 2))):
        ours, eager = (t if i == 0 else t.T for t in (result[i].double(), theirs[i].double()))
        assert compare.error((ours @ ours.T).float(), (eager @ eager.T).float(), gram).within_bound


@pytest.mark.parametrize("q", [1, 3])
def test_byom_lora_lacks_the_tail(q: int) -> None:
    """One adapter cut to rank q is wrong by √Σ σ² of the singular values behind q."""
    (adapter,) = drawn((5,), dtype=F64)
    cut = combine([adapter], [1.0], "svd", svd_rank=q)
    values = torch.linalg.svdvals(delta(adapter))
    torch.testing.assert_close((delta(cut) - delta(adapter)).norm(), values[q:].norm(), rtol=1e-12, atol=0)
    assert cut.lora_A.shape == (q, K)


def test_one_adapter_s_weight_is_a_dial() -> None:
    """w = 0 is the frozen model, w = 1 the adapter, between them ΔW grows in proportion."""
    torch.manual_seed(0)
    model, x = injected(Mlp().to(F64)), torch.randn(5, 12, dtype=F64)
    deltas = {}
    for i, w in enumerate((0.0, 0.4, 1.0)):
        add_weighted_adapter(model, ["default"], [w], f"w{i}", "cat")
        lora_ops.set_adapter(model, f"w{i}")
        deltas[w] = [layer.delta_weight() for _, layer in lora_layers(model)], model(x)
    with lora_ops.disable_adapter(model):
        torch.testing.assert_close(deltas[0.0][1], model(x), rtol=1e-13, atol=1e-13)
    lora_ops.set_adapter(model, "default")
    torch.testing.assert_close(deltas[1.0][1], model(x), rtol=1e-12, atol=1e-12)
    for part, whole in zip(deltas[0.4][0], deltas[1.0][0], strict=True):
        torch.testing.assert_close(part, 0.4 * whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["cat", "svd", *OF_FACTORS])
def test_nothing_as_large_as_the_weight_is_formed(method: str) -> None:
    adapters = drawn((8, 8), size=(1024, 512))
    with LargestTensor() as largest:
        combine(adapters, (1, -1), method, **options(method))
    assert 0 < largest.numel <= 1024 * 16


@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_is_itself(method: str) -> None:
    adapter = drawn((4,), (1.7,))
    result = ours(adapter, (1,), method, **options(method, density=1))
    assert_as_near(result, peft_s(adapter * 2, (0.5, 0.5), "svd"), exact(adapter, (1,)))


@pytest.mark.parametrize(("method", "same"), [("magnitude_prune", "linear"), ("dare_linear", "linear"), ("dare_ties", "ties")])
def test_density_1_prunes_nothing(method: str, same: str) -> None:
    adapters, weights = drawn((4, 4, 4)), (0.7, -0.3, 1)
    actual, expected = (
        combine(adapters, weights, method, density=1),
        combine(adapters, weights, same, **options(same, density=1)),
    )
    assert all(torch.equal(a, e) for a, e in zip(actual[:2], expected[:2], strict=True))


def test_density_1_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    combine(drawn(), (1, 1), "dare_ties", density=1, generator=generator)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("method", METHODS)
def test_results(method: str) -> None:
    """Dtypes, devices, memory of their own, no gradient, the arguments as before."""
    adapters = [Adapter(A.requires_grad_(), B, s) for A, B, s in drawn(dtype=BF16)]
    before = [(a.lora_A.clone(), a.lora_B.clone()) for a in adapters]
    for dtype in (None, F32):
        A, B, scaling = ours(adapters, (0.5, 0.25), method, dtype=dtype, **options(method))
        assert A.dtype == B.dtype == (dtype or BF16)
        assert scaling == 1.0
        for t in (A, B):
            assert t.is_contiguous()
            assert not t.requires_grad
            assert t.untyped_storage().nbytes() == t.numel() * t.itemsize
    for a, (A, B) in zip(adapters, before, strict=True):
        assert torch.equal(a.lora_A, A)
        assert torch.equal(a.lora_B, B)


def test_random_numbers_are_the_generator_s() -> None:
    adapters = drawn()

    def dare(seed: int) -> Tensor:
        return ours(adapters, (1, 1), "dare_linear", density=0.5, seed=seed).lora_A

    state = torch.get_rng_state()
    assert torch.equal(dare(1), dare(1))
    assert not torch.equal(dare(1), dare(2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(combine(adapters, (1, 1), "dare_linear", density=0.5).lora_A, dare(1))


# --- where PEFT is wrong: once it is right, a test fails and the list in combine's docstring becomes shorter --------------


@pytest.mark.parametrize("method", ["ties", "dare_ties", "ties_svd", "dare_ties_svd"])
def test_a_negative_weight_is_the_negated_adapter(method: str) -> None:
    """a - b is a + (-b). PEFT elects signs as if the weights were positive."""
    a, b = drawn()
    negated = Adapter(-b.lora_A, b.lora_B, b.scaling)
    how = options(method) | ({"svd_rank": N} if method.endswith("svd") else {})
    assert torch.equal(delta(ours([a, b], (1, -1), method, **how)), delta(ours([a, negated], (1, 1), method, **how)))
    assert wrong_by(peft_s([a, b], (1, -1), method, **how), delta(peft_s([a, negated], (1, 1), method, **how))) > 0.1


def test_a_negative_scaling_is_the_negated_adapter() -> None:
    a, b = drawn()
    for method in METHODS:
        how = options(method)
        flipped = ours([a, b._replace(scaling=-b.scaling)], (1, -1), method, **how)
        assert torch.equal(delta(flipped), delta(ours([a, b], (1, 1), method, **how))), method


def test_one_adapter_is_pruned_and_cut_too() -> None:
    """PEFT takes every method for linear then."""
    adapter = drawn((4,))
    assert combine(adapter, (1,), "svd", svd_rank=2).lora_A.shape == (2, K)
    assert peft_s(adapter, (1,), "svd", svd_rank=2).lora_A.shape == (4, K)
    assert (combine(adapter, (1,), "magnitude_prune", density=0.25).lora_A != 0).sum() == 4 * K // 4
    assert (peft_s(adapter, (1,), "magnitude_prune", density=0.25).lora_A != 0).all()


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_rank_stabilised_adapters_are_not_scaled_twice(method: str) -> None:
    """PEFT's new adapter inherits use_rslora, and so has scaling r / √r."""
    adapters, weights = drawn((4, 5)), (1, 1)
    how = {"svd_rank": 9} if method == "svd" else {}
    wanted = exact(adapters, weights)
    assert_as_near(ours(adapters, weights, method, **how), peft_s(adapters, weights, method, **how), wanted)
    assert peft_s(adapters, weights, method, use_rslora=True, **how).scaling == 3.0


def test_weights_beside_fp64_are_fp64() -> None:
    """PEFT's are fp32."""
    adapters, weights = drawn(dtype=F64), (0.1, 0.3)
    wanted, in_fp32 = exact(adapters, weights), exact(adapters, torch.tensor(weights).tolist())
    right, theirs = combine(adapters, weights, "svd", svd_rank=8), peft_s(adapters, weights, "svd", svd_rank=8)
    assert wrong_by(theirs, wanted) > 1000 * wrong_by(right, wanted)
    assert wrong_by(theirs, wanted) > 1000 * wrong_by(theirs, in_fp32)


def test_half_precision_is_kept_and_rounded_once() -> None:
    """PEFT's svd rounds every ΔW to bf16 and makes an fp32 adapter of what is left."""
    adapters, weights = drawn(dtype=BF16), (0.5, 0.25)
    wanted, in_fp32 = exact(adapters, weights), [Adapter(A.float(), B.float(), s) for A, B, s in adapters]
    result, theirs = (make(adapters, weights, "svd", svd_rank=8) for make in (combine, peft_s))
    assert result.lora_A.dtype == BF16
    assert theirs.lora_A.dtype == F32
    result = combine(adapters, weights, "svd", svd_rank=8, dtype=F32)
    assert_as_near(result, peft_s(in_fp32, weights, "svd", svd_rank=8), wanted)
    assert wrong_by(theirs, wanted) > 1000 * wrong_by(result, wanted)


@pytest.mark.parametrize("method", ["svd", "magnitude_prune_svd"])
def test_small_layers_may_have_less_rank(method: str) -> None:
    """PEFT's A and B have different ranks then."""
    adapters, how = drawn(size=(3, K)), options(method, density=0.99)
    theirs = peft_s(adapters, (1, 1), method, **how)
    assert theirs.lora_A.shape == (4, K)
    assert theirs.lora_B.shape == (3, 3)
    result = combine(adapters, (1, 1), method, **how)
    assert result.lora_A.shape == (3, K)
    assert_as_near(result, theirs._replace(lora_A=theirs.lora_A[:3]), pruned(adapters, 0.99 if "prune" in method else 1))


def pruned(adapters: list[Adapter], density: float) -> Tensor:
    deltas = [delta(a) for a in adapters]
    least = [d.abs().flatten().sort(descending=True).values[int(density * d.numel()) - 1] for d in deltas]
    return sum(d * (d.abs() >= smallest) for d, smallest in zip(deltas, least, strict=True))


def test_linear_has_cross_terms() -> None:
    """In PEFT and here, as documented: the mean of an adapter and its copy is twice the adapter."""
    (adapter,) = drawn((4,))
    copies, halves = [adapter] * 2, (0.5, 0.5)
    once, twice = exact([adapter], (1,)), exact([adapter], (2,))
    assert_as_near(combine(copies, halves, "linear"), peft_s(copies, halves, "linear"), twice)
    assert wrong_by(peft_s(copies, halves, "linear"), once) > 0.9
    assert_as_near(combine(copies, halves, "svd"), peft_s(copies, halves, "svd"), once)


# --- what it refuses --------------------------------------------------------------------------------------------------

A44 = drawn()
OTHER_N, OTHER_K = drawn(size=(N + 1, K))[0], drawn(size=(N, K + 1))[0]
HUGE = [Adapter(a.lora_A.half(), a.lora_B.half(), 1e30) for a in A44]


@pytest.mark.parametrize(
    ("adapters", "weights", "method", "how", "words"),
    [
        (A44, (1, 1), "mean", {}, r"method \(combination_type\) must be one of cat, svd, linear, .*, got 'mean'"),
        ([], (), "cat", {}, "adapters must hold at least one adapter, got none"),
        (A44, (1,), "cat", {}, "weights must be one number for each of 2 adapters, got 1"),
        (A44, (1, 1, 1), "cat", {}, "weights must be one number for each of 2 adapters, got 3"),
        (A44, (1, math.nan), "cat", {}, r"weights\[1\] must be a finite number, got nan"),
        (A44, (True, 1), "cat", {}, r"weights\[0\] must be a finite number, got True"),
        (A44, (1, 1), "svd", {"svd_rank": 0}, "svd_rank must be an integer >= 1 or None, got 0"),
        (A44, (1, 1), "cat", {"svd_rank": 4}, 'svd_rank must be None for "cat", .*, got 4'),
        (A44, (1, 1), "ties", {}, r'density must be a number in \(0, 1\] for "ties", got None'),
        (A44, (1, 1), "dare_linear", {"density": 0}, r"density must be a number in \(0, 1\] .*, got 0"),
        (A44, (1, 1), "ties_svd", {"density": 1.5}, r"density must be a number in \(0, 1\] .*, got 1.5"),
        (A44, (1, 1), "ties", {"density": 1, "majority_sign_method": "x"}, 'must be "total" or "frequency", got \'x\''),
        ([A44[0], OTHER_N], (1, 1), "cat", {}, r"adapters\[1\] must have N = 24 and K = 40 as the first, got 25 and 40"),
        ([A44[0], OTHER_K], (1, 1), "svd", {}, r"adapters\[1\] must have N = 24 and K = 40 as the first, got 24 and 41"),
        ([Adapter(A44[0].lora_A, A44[0].lora_B[:, :3])], (1,), "cat", {}, r"adapters\[0\]: .* one r >= 1, got 4 and 3"),
        ([Adapter(A44[0].lora_A[0], A44[0].lora_B)], (1,), "cat", {}, r"adapters\[0\].lora_A must be a matrix, got \(40,\)"),
        ([A44[0]._replace(scaling=math.inf)], (1,), "cat", {}, r"adapters\[0\].scaling must be a finite number, got inf"),
        ([A44[0], A44[1]._replace(lora_B=A44[1].lora_B * math.nan)], (1, 1), "svd", {}, r"adapters\[1\].lora_B has values"),
        (HUGE, (1, 1), "cat", {}, "the combined adapter is not finite in torch.float16"),
    ],
)  # fmt: skip
def test_bad_arguments(adapters, weights, method: str, how: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        combine(adapters, weights, method, **how)


@pytest.mark.parametrize("method", METHODS)
def test_ranks_that_differ(method: str) -> None:
    adapters = drawn((4, 6))
    if method in OF_ANY_RANK:
        assert combine(adapters, (1, 1), method, **options(method)).lora_A.shape[0] == (10 if method == "cat" else 6)
    else:
        with pytest.raises(ValueError, match=rf'"{method}" needs adapters of one rank, got \[4, 6\]'):
            combine(adapters, (1, 1), method, **options(method))


def test_dtypes_it_does_not_take() -> None:
    with pytest.raises(TypeError, match=r"adapters\[0\].lora_A must be float32, .* got torch.int64"):
        combine([Adapter(torch.ones(1, 2, dtype=torch.int64), torch.ones(2, 1))], (1,), "cat")
    with pytest.raises(TypeError, match=r"dtype must be float32, .* got torch.int8"):
        combine(drawn(), (1, 1), "cat", dtype=torch.int8)


@pytest.mark.parametrize(
    ("call", "is_silent"),
    [
        (lambda: peft_s(drawn(), (1,), "cat"), False),
        (lambda: peft_s(drawn(), (1, 1), "dare_linear", density=0.0), True),
    ],
    ids=["weights", "density 0"],
)
def test_what_peft_lets_pass(call, is_silent: bool) -> None:
    """A weight too few, of which it makes an adapter without the last one; and density 0, of which it makes NaN."""
    result = call()
    assert result.lora_A.isnan().any() == is_silent
