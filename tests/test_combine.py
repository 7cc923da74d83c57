"""One adapter from several: beside PEFT where it is right, beside fp64 where it is not."""

import copy
import math

import compare
import numpy as np
import peft
import pytest
import torch
from compare import BF16, F16, F32
from observe import LargestTensor
from tiny_models import Mlp, assert_as_exact, assert_untouched, gpt2, injected, llama, snapshot, tokens
from torch import Tensor, nn

import lora_ops
from lora_ops import Adapter, LoraConfig, add_weighted_adapter, combine, lora_layers
from lora_ops.adapters.combine import METHODS

F64 = torch.float64
K, N = 40, 24
OF_FACTORS = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
OF_DELTAS = ["ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"]
OF_ANY_RANK = ["cat", "svd", *OF_DELTAS]


def drawn(ranks=(4, 4), scalings=(2.0, 1.5, 0.25), dtype=F32, size=(N, K)) -> list[Adapter]:
    g = torch.Generator().manual_seed(sum(ranks))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=F64).to(dtype)

    return [Adapter(normal(r, size[1]), normal(size[0], r), s) for r, s in zip(ranks, scalings, strict=False)]


def options(method: str, density: float = 0.5, **others) -> dict:
    return others if method in ("cat", "svd", "linear") else {"density": density, **others}


def peft_s(adapters: list[Adapter], weights, method: str, *, use_rslora: bool = False, seed: int = 7, **options) -> Adapter:
    """What PEFT makes of them, in a model of one layer."""
    (n, _), (_, k), dtype = adapters[0].lora_B.shape, adapters[0].lora_A.shape, adapters[0].lora_A.dtype
    model, names = nn.Sequential(nn.Linear(k, n, dtype=dtype)), [f"a{i}" for i in range(len(adapters))]
    for name, (A, _, scaling) in zip(names, adapters, strict=True):
        r = A.shape[0]
        alpha = scaling * (math.sqrt(r) if use_rslora else r)
        config = peft.LoraConfig(r=r, lora_alpha=alpha, use_rslora=use_rslora, target_modules=["0"])
        if name == "a0":
            model = peft.get_peft_model(model, config, name, autocast_adapter_dtype=False)
        else:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
    layer, tuner = model.base_model.model[0], model.base_model
    for name, (A, B, _) in zip(names, adapters, strict=True):
        layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = A.clone(), B.clone()
    inject = tuner.inject_adapter

    def inject_then_seed(*args, **kwargs) -> None:  # the new adapter's initialisation draws random numbers, too
        inject(*args, **kwargs)
        torch.manual_seed(seed)

    tuner.inject_adapter = inject_then_seed
    tuner.add_weighted_adapter(names, list(weights), "new", combination_type=method, **options)
    return Adapter(layer.lora_A["new"].weight.data, layer.lora_B["new"].weight.data, layer.scaling["new"])


def ours(adapters: list[Adapter], weights, method: str, *, seed: int = 7, **options) -> Adapter:
    return combine(adapters, weights, method, generator=torch.Generator().manual_seed(seed), **options)


def delta(adapter: Adapter) -> Tensor:
    return adapter.scaling * (adapter.lora_B.double() @ adapter.lora_A.double())


def exact(adapters: list[Adapter], weights) -> Tensor:
    """Σ w_i s_i B_i A_i in long double, rounded once, to fp64."""
    total = np.zeros(exact_shape(adapters), np.longdouble)
    for (A, B, scaling), w in zip(adapters, weights, strict=True):
        wide_A, wide_B = (t.double().numpy().astype(np.longdouble) for t in (A, B))
        total += np.longdouble(w) * np.longdouble(scaling) * (wide_B @ wide_A)
    return torch.from_numpy(total.astype(np.float64))


def exact_shape(adapters: list[Adapter]) -> tuple[int, int]:
    return adapters[0].lora_B.shape[0], adapters[0].lora_A.shape[1]


def assert_as_near(actual: Adapter, eager: Adapter, wanted: Tensor) -> None:
    """ΔW is as near to the one wanted as PEFT's is."""
    dtype = actual.lora_A.dtype
    measured = compare.error(delta(actual).to(dtype), delta(eager).to(dtype), wanted)
    assert measured.within_bound, measured


def wrong_by(adapter: Adapter, wanted: Tensor) -> float:
    return ((delta(adapter) - wanted).norm() / wanted.norm()).item()


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


# --- models -----------------------------------------------------------------------------------------------------------


def with_two(model: nn.Module, **fields) -> nn.Module:
    """Adapters "default" and "b", which both do something."""
    torch.manual_seed(0)
    injected(model, lora_dropout=0.25, **fields)
    return lora_ops.add_adapter(model, LoraConfig(r=4, lora_alpha=2, init_lora_weights=False), "b")


def in_peft(make, directory, names) -> peft.PeftModel:
    folders = {name: directory if name == "default" else directory / name for name in names}
    model = peft.PeftModel.from_pretrained(make(), directory, torch_device="cpu")
    for name in names[1:]:
        model.load_adapter(folders[name], name, torch_device="cpu")
    return model


@pytest.mark.parametrize("method", ["cat", "linear", "ties", "magnitude_prune", "svd"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_model_s_new_adapter_is_peft_s(tmp_path, make, method: str) -> None:
    """Layer by layer; and PEFT reads it as it is."""
    model = with_two(make(), target_modules=["q_proj", "down_proj"] if make is llama else ["c_attn"])
    weights = (0.5, 2)  # scalings 2 and 0.5: nothing that "cat" rounds
    assert add_weighted_adapter(model, ["default", "b"], weights, "new", method, **options(method)) is model
    for name in ("default", "b", "new"):
        lora_ops.save_adapter(model, tmp_path, name)
    theirs = in_peft(make, tmp_path, ["default", "b", "new"])
    theirs.add_weighted_adapter(["default", "b"], list(weights), "theirs", combination_type=method, **options(method))
    for name, layer in lora_layers(model):
        stock = theirs.base_model.model.get_submodule(name)
        new, of_peft = (
            Adapter(stock.lora_A[n].weight.data, stock.lora_B[n].weight.data, stock.scaling[n]) for n in ("new", "theirs")
        )
        assert torch.equal(layer.lora_A["new"], new.lora_A)
        assert torch.equal(layer.lora_B["new"], new.lora_B)
        assert layer.scaling["new"] == new.scaling == of_peft.scaling == 1.0
        if method == "svd":
            assert_as_near(new, of_peft, delta(svd_in_fp64(stock, weights)))
        else:
            assert torch.equal(new.lora_A, of_peft.lora_A)
            assert torch.equal(new.lora_B, of_peft.lora_B)


def svd_in_fp64(stock: nn.Module, weights) -> Adapter:
    wide = [
        Adapter(stock.lora_A[n].weight.double(), stock.lora_B[n].weight.double(), stock.scaling[n]) for n in ("default", "b")
    ]
    return peft_s([Adapter(A.detach(), B.detach(), s) for A, B, s in wide], weights, "svd")


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_cat_of_a_model_computes_what_both_do(quant: str | None) -> None:
    """The logits of both at once, with layers of different ranks, some of them in 4 bits."""
    model = with_two(llama(), quant=quant, rank_pattern={"q_proj": 7}).eval()
    lora_ops.set_adapter(model, ["default", "b"])
    both, exactly = model(tokens()).logits, copy.deepcopy(model).double()(tokens()).logits
    state = {name: t.clone() for name, t in model.state_dict().items()}
    add_weighted_adapter(model, ["default", "b"], (1, 1), "new", "cat")
    assert {layer.r["new"] for _, layer in lora_layers(model)} == {8, 11}
    assert {layer.lora_dropout["new"] for _, layer in lora_layers(model)} == {0.25}
    assert torch.equal(model(tokens()).logits, both)  # not active yet
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in state.items())
    lora_ops.set_adapter(model, "new")
    assert_as_exact([(model(tokens()).logits, both, exactly)])


def test_each_layer_draws_random_numbers_of_its_own() -> None:
    model = with_two(llama(), target_modules=["q_proj"])
    for name in ("one", "two"):
        generator = torch.Generator().manual_seed(3)
        add_weighted_adapter(model, ["default", "b"], (1, 1), name, "dare_linear", density=0.5, generator=generator)
    layers = [layer for _, layer in lora_layers(model)]
    assert all(torch.equal(layer.lora_A["one"], layer.lora_A["two"]) for layer in layers)
    assert not torch.equal(layers[0].lora_A["one"] == 0, layers[1].lora_A["one"] == 0)


@pytest.mark.parametrize(
    ("adapters", "weights", "name", "method", "how", "words"),
    [
        (["default", "c"], (1, 1), "new", "cat", {}, r"adapters must be of first's \['default', 'b'\], got 'c'"),
        (["default", "b"], (1, 1), "b", "cat", {}, "adapter_name must be a new name, got 'b', which first has already"),
        (["default", "b"], (1, 1), "a.b", "cat", {}, "adapter_name must be a non-empty string without a dot"),
        (["default", "b"], (1,), "new", "cat", {}, "first: weights must be one number for each .*, got 1; .*untouched"),
        (["default", "b"], (1, 1), "new", "ties", {}, r"first: density must be a number in \(0, 1\] for \"ties\", got None"),
        (["default", "b"], (1, 1), "new", "linear", {}, r'block.0: "linear" needs adapters of one rank, got \[6, 4\]; .*'),
        ([], (), "new", "cat", {}, "first: adapters must hold at least one adapter"),
    ],
)  # fmt: skip
def test_a_model_is_left_untouched(adapters, weights, name: str, method: str, how: dict, words: str) -> None:
    model = with_two(Mlp(), rank_pattern={"block.0": 6})
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        add_weighted_adapter(model, adapters, weights, name, method, **how)
    assert_untouched(model, before)


def test_peft_leaves_half_an_adapter_behind() -> None:
    """What the test above rules out."""
    model = peft.get_peft_model(Mlp(), peft.LoraConfig(r=4, target_modules=["first", "last"]), "a")
    model.add_adapter("b", peft.LoraConfig(r=4, target_modules=["first", "last"]))
    with pytest.raises(TypeError):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", combination_type="ties")
    assert "new" in model.peft_config


def with_biases(make) -> nn.Module:
    """Adapters "default" and "b" with biases of B, "c" without."""
    model = with_two(make(), target_modules=["first", "block.0"], lora_bias=True)
    lora_ops.delete_adapter(model, "b")
    for name, lora_bias in (("b", True), ("c", False)):
        config = LoraConfig(r=4, lora_alpha=2, init_lora_weights=False, lora_bias=lora_bias)
        lora_ops.add_adapter(model, config, name)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B_bias["default"])
    return model


@pytest.mark.parametrize("method", METHODS)
def test_biases_of_b_are_summed(method: str) -> None:
    """Times weights and scalings; the adapter without one has none to add."""
    model = with_biases(Mlp)
    add_weighted_adapter(model, ["default", "c", "b"], (0.5, 3, -2), "new", method, **options(method))
    for _, layer in lora_layers(model):
        of = layer.lora_B_bias
        expected = 0.5 * layer.scaling["default"] * of["default"].double() - 2 * layer.scaling["b"] * of["b"].double()
        assert torch.equal(of["new"], expected.float())
        assert not of["new"].requires_grad
    add_weighted_adapter(model, ["c"], (1,), "without", method, **options(method))
    assert not any(layer.lora_bias["without"] for _, layer in lora_layers(model))


def test_cat_of_adapters_with_biases_computes_what_both_do() -> None:
    model, x = with_biases(Mlp).eval(), torch.randn(9, 12)
    lora_ops.set_adapter(model, ["default", "b"])
    both, exactly = model(x), copy.deepcopy(model).double()(x.double())
    add_weighted_adapter(model, ["default", "b"], (1, 1), "new", "cat")
    lora_ops.set_adapter(model, "new")
    assert_as_exact([(model(x), both, exactly)])


def test_a_combined_bias_must_be_finite() -> None:
    model = with_biases(Mlp)
    nn.init.constant_(model.block[0].lora_B_bias["default"], 3e38)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"block\.0: the combined bias of B is not finite in torch\.float32: .*untouched"):
        add_weighted_adapter(model, ["default", "c"], (2, 1), "new", "cat")
    assert_untouched(model, before)


def test_dora_is_not_combined() -> None:
    model = with_two(Mlp())
    lora_ops.add_adapter(model, LoraConfig(r=4, use_dora=True), "dora")
    before = snapshot(model)
    with pytest.raises(
        ValueError, match="adapters must be without DoRA, whose magnitudes cannot be combined, got 'dora' in fi"
    ):
        add_weighted_adapter(model, ["default", "dora"], (1, 1), "new", "cat")
    assert_untouched(model, before)


@pytest.mark.parametrize("field", ["use_dora", "lora_bias"])
def test_peft_forgets_biases_and_magnitudes(field: str) -> None:
    """What lora_ops sums or refuses: the combination of one adapter, with weight 1, is another one."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Mlp(), peft.LoraConfig(r=4, target_modules=["first"], **{field: True}), "a").eval()
    layer, x = model.base_model.model.first, torch.randn(3, 12)
    for p in layer.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    model.add_weighted_adapter(["a"], [1.0], "new", combination_type="linear")
    before = layer(x)
    model.set_adapter("new")
    if field == "use_dora":
        norms = torch.linalg.vector_norm(layer.base_layer.weight, dim=1)
        assert torch.equal(layer.lora_magnitude_vector["new"].weight, norms)
    else:
        assert not layer.lora_B["new"].bias.any()
    assert not torch.allclose(layer(x), before)


def test_a_model_without_lora() -> None:
    with pytest.raises(ValueError, match="model has no layer with LoRA; see add_lora"):
        add_weighted_adapter(Mlp(), ["a"], (1,), "new")
