"""Tuned models as one: task arithmetic, Fisher merging, RegMean, BYOM."""

import copy

import pytest
import torch
from tiny_models import Mlp, injected
from torch import Tensor, nn

from lora_ops import LoraConfig, add_adapter, add_weighted_adapter, lora_layers, merge_and_unload, set_adapter
from lora_ops.compose import fisher_diagonal, fisher_merge, input_grams, regmean, sparse_rest, task_arithmetic

F64 = torch.float64
States = dict[str, Tensor]


def tuned(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Mlp().to(F64)


def tuned_states(n: int = 2) -> tuple[States, list[States]]:
    base = tuned(0).state_dict()
    return base, [tuned(i).state_dict() for i in range(1, n + 1)]


def with_two_adapters() -> nn.Module:
    torch.manual_seed(0)
    model = injected(Mlp().to(F64))
    return add_adapter(model, LoraConfig(r=3, init_lora_weights=False), "other")


def merged_state(model: nn.Module, name: str) -> States:
    set_adapter(model, name)
    return merge_and_unload(copy.deepcopy(model)).state_dict()


def test_task_arithmetic_is_affine() -> None:
    base, others = tuned_states()
    for name, t in task_arithmetic(base, others, 0.4).items():
        expected = base[name] + 0.4 * (others[0][name] - base[name]) + 0.4 * (others[1][name] - base[name])
        torch.testing.assert_close(t, expected, rtol=1e-13, atol=1e-13)
    assert all(torch.equal(t, base[name]) for name, t in task_arithmetic(base, others, 0.0).items())
    one = task_arithmetic(base, others[:1], 1.0)
    torch.testing.assert_close(one, dict(others[0]), rtol=1e-13, atol=1e-13)


def test_task_arithmetic_of_adapters_is_their_cat() -> None:
    model = with_two_adapters()
    base = merged_state_without(model)
    states = [merged_state(model, name) for name in ("default", "other")]
    add_weighted_adapter(model, ["default", "other"], [0.4, 0.4], "sum", "cat")
    torch.testing.assert_close(task_arithmetic(base, states, 0.4), dict(merged_state(model, "sum")), rtol=1e-12, atol=1e-12)


def merged_state_without(model: nn.Module) -> States:
    set_adapter(model, "default")
    plain = copy.deepcopy(model)
    for _, layer in lora_layers(plain):
        nn.init.zeros_(layer.lora_B["default"])
    return merge_and_unload(plain).state_dict()


def test_half_precision_is_rounded_once() -> None:
    base, others = tuned_states(3)
    half = [{name: t.bfloat16() for name, t in state.items()} for state in (base, *others)]
    exact = task_arithmetic(
        {n: t.double() for n, t in half[0].items()}, [{n: t.double() for n, t in s.items()} for s in half[1:]]
    )
    for name, t in task_arithmetic(half[0], half[1:]).items():
        assert t.dtype == torch.bfloat16
        assert (t.double() - exact[name]).abs().max() <= 2**-8 * exact[name].abs().max()


def test_fisher_merge() -> None:
    """Equal Fishers give the mean, a Fisher of zero leaves a model out, and every other is a weighted mean."""
    _, (a, b) = tuned_states()
    ones = {name: torch.full_like(t, 0.7) for name, t in a.items()}
    mean = {name: (t + b[name]) / 2 for name, t in a.items()}
    torch.testing.assert_close(fisher_merge([a, b], [ones, ones]), mean, rtol=1e-13, atol=1e-13)
    none = {name: torch.zeros_like(t) for name, t in a.items()}
    torch.testing.assert_close(fisher_merge([a, b], [ones, none], floor=0.0), dict(a), rtol=1e-13, atol=1e-13)
    g = torch.Generator().manual_seed(0)
    F1, F2 = ({name: torch.rand(t.shape, generator=g, dtype=F64) for name, t in a.items()} for _ in range(2))
    expected = {n: (2 * F1[n] * a[n] + 0.5 * F2[n] * b[n]) / (2 * F1[n] + 0.5 * F2[n]) for n in a}
    torch.testing.assert_close(fisher_merge([a, b], [F1, F2], [2.0, 0.5]), expected, rtol=1e-12, atol=1e-12)
    del F1["last.weight"], F2["last.weight"]
    expected["last.weight"] = (2 * a["last.weight"] + 0.5 * b["last.weight"]) / 2.5
    torch.testing.assert_close(fisher_merge([a, b], [F1, F2], [2.0, 0.5]), expected, rtol=1e-12, atol=1e-12)


def test_the_fisher_is_the_mean_square_of_gradients() -> None:
    """Of logistic regression: (y - p)² x xᵀ's diagonal, example by example."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 1, bias=False, dtype=F64), torch.randn(5, 3, dtype=F64), torch.tensor([0.0, 1, 1, 0, 1])

    def log_likelihood(model: nn.Module, i: int) -> Tensor:
        return -nn.functional.binary_cross_entropy_with_logits(model(x[i])[0], y[i].double())

    p = (x @ model.weight.detach().T)[:, 0].sigmoid()
    expected = ((y - p)[:, None] * x).square().mean(0)
    torch.testing.assert_close(fisher_diagonal(model, range(5), log_likelihood)["weight"][0], expected, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="at least one example"):
        fisher_diagonal(model, [], log_likelihood)


def run(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def test_regmean_is_the_joint_least_squares_solution() -> None:
    models, inputs = [tuned(1), tuned(2)], [torch.randn(50, 12, dtype=F64) for _ in range(2)]
    grams = [input_grams(m, [x[:20], x[20:]], run) for m, x in zip(models, inputs, strict=True)]
    merged = regmean([m.state_dict() for m in models], grams, off_diagonal=1.0)
    targets = torch.cat([x @ m.first.weight.T for m, x in zip(models, inputs, strict=True)])
    solution = torch.linalg.lstsq(torch.cat(inputs), targets).solution.T
    torch.testing.assert_close(merged["first.weight"], solution, rtol=1e-9, atol=1e-10)
    assert set(grams[0]) == {"first.weight", "block.0.weight", "block.2.weight", "last.weight"}
    bias = torch.stack([m.first.bias for m in models]).mean(0)
    torch.testing.assert_close(merged["first.bias"], bias, rtol=1e-13, atol=1e-13)


def test_regmean_shrinks_the_off_diagonal() -> None:
    models, inputs = [tuned(1), tuned(2)], [torch.randn(50, 12, dtype=F64) for _ in range(2)]
    grams = [input_grams(m, [x], run) for m, x in zip(models, inputs, strict=True)]
    shrunk = [x.T @ x * (0.9 + 0.1 * torch.eye(12, dtype=F64)) for x in inputs]
    weighted = sum(m.first.weight @ g for m, g in zip(models, shrunk, strict=True))
    merged = regmean([m.state_dict() for m in models], grams)
    torch.testing.assert_close(merged["first.weight"], weighted @ torch.linalg.inv(sum(shrunk)), rtol=1e-9, atol=1e-10)
    diagonal = regmean([m.state_dict() for m in models], grams, off_diagonal=0.0)["first.weight"]
    d = [x.square().sum(0) for x in inputs]
    expected = sum(m.first.weight * v for m, v in zip(models, d, strict=True)) / sum(d)
    torch.testing.assert_close(diagonal, expected, rtol=1e-9, atol=1e-10)


def test_grams_of_a_model_with_lora_are_those_of_the_merged_one() -> None:
    model, x = with_two_adapters(), torch.randn(9, 12, dtype=F64)
    unmerged = input_grams(model, [x], run)
    merged = input_grams(merge_and_unload(copy.deepcopy(model)), [x], run)
    torch.testing.assert_close(unmerged, merged, rtol=1e-11, atol=1e-11)


def test_the_sparse_rest_restores_what_merging_lost() -> None:
    base, others = tuned_states()
    merged = task_arithmetic(base, others)
    everything = sparse_rest(merged, others[0], 1.0)
    torch.testing.assert_close({n: t + everything[n] for n, t in merged.items()}, dict(others[0]), rtol=1e-12, atol=1e-12)
    rest = {name: t.to_dense() for name, t in sparse_rest(merged, others[0], 0.1).items()}
    lost = torch.cat([(others[0][n] - t).flatten() for n, t in merged.items()])
    kept = torch.cat([t.flatten() for t in rest.values()])
    assert (kept != 0).sum() == int(0.1 * lost.numel())
    assert torch.equal(kept[kept != 0], lost[kept != 0])
    assert lost[kept != 0].abs().min() >= lost[kept == 0].abs().max()


def test_errors() -> None:
    base, (a, b) = tuned_states()
    del b["last.weight"]
    for call in (
        lambda: task_arithmetic(base, [a, b]),
        lambda: fisher_merge([a, b], [{}, {}]),
        lambda: regmean([a, b], [{}, {}]),
    ):
        with pytest.raises(ValueError, match=r"same names and shapes, got 'last\.weight' as \(4, 16\) and None"):
            call()
    with pytest.raises(ValueError, match="at least one state dict"):
        regmean([], [])
    with pytest.raises(ValueError, match="grams must be one for each of 1 models, got 2"):
        regmean([a], [{}, {}])
    with pytest.raises(ValueError, match="fishers and coefficients"):
        fisher_merge([a], [{}, {}])
    with pytest.raises(ValueError, match="density must be in"):
        sparse_rest(a, a, 0.0)
