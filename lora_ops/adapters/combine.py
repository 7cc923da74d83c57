"""Adapter algebra: one adapter of a layer from several."""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..registry import method

Model = TypeVar("Model", bound=nn.Module)

# How tasks, n tensors of one shape, become one. The first part of a method's name; "_svd" applies it to ΔW.
_OF_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
_OF_DELTAS = ("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
METHODS = ("cat", "svd", *_OF_FACTORS, *_OF_DELTAS)


class Adapter(NamedTuple):
    """What one adapter adds to one layer's weight: ΔW = scaling · B A."""

    lora_A: Tensor  # (r, K)  # noqa: N815
    lora_B: Tensor  # (N, r)  # noqa: N815
    scaling: float = 1.0


@method(
    "Combination: cat",
    equation="A = [w_1 s_1 A_1; ...], B = [B_1 ...]: Σ w_i s_i B_i A_i itself",
    use='add_weighted_adapter(model, ["law", "chemistry"], [0.7, 0.3], "both", "cat")',
    changes="C",
    source="PEFT, https://github.com/huggingface/peft",
    test="test_combine.py::test_cat_is_exact",
)
@method(
    "Combination: svd",
    equation="the best rank-r approximation of Σ w_i s_i B_i A_i, from QR decompositions of the factors",
    use='add_weighted_adapter(model, ["law", "chemistry"], [0.7, 0.3], "both", "svd", svd_rank=8)',
    changes="C",
    source="PEFT, https://github.com/huggingface/peft",
    test="test_combine.py::test_svd_is_the_best_of_its_rank",
    note="PEFT scales twice when the first adapter is rank-stabilised, and forms ΔW.",
)
@method(
    "BYOM-LoRA",
    equation="B A cut to rank q",
    use='combine([adapter], [1.0], "svd", svd_rank=4)',
    changes="C",
    source="Jiang et al. 2023, https://arxiv.org/abs/2310.01886",
    test="test_combine.py::test_byom_lora_lacks_the_tail",
)
@method(
    "Combination: linear",
    equation="A = Σ √(w_i s_i) A_i, B = Σ √(w_i s_i) B_i",
    use='add_weighted_adapter(model, ["law", "chemistry"], [0.7, 0.3], "both", "linear")',
    changes="C",
    source="PEFT, https://github.com/huggingface/peft",
    test="test_combine.py::test_linear_has_cross_terms",
    note="Not the sum of the ΔW_i: the products of different adapters come on top.",
)
@method(
    "TIES",
    equation="prune to density; elect a sign; mean of those that have it",
    use='add_weighted_adapter(model, ["law", "chemistry"], [1, 1], "both", "ties", density=0.2)',
    changes="C",
    source="Yadav et al. 2023, https://arxiv.org/abs/2306.01708",
    test="test_combine.py::test_factors_are_peft_s",
    note="PEFT elects signs before it looks at negative weights.",
)
@method(
    "DARE",
    equation="each element stays with probability density, divided by it; then linear or ties",
    use='add_weighted_adapter(model, ["law", "chemistry"], [1, 1], "both", "dare_linear", density=0.2)',
    changes="C",
    source="Yu et al. 2023, https://arxiv.org/abs/2311.03099",
    test="test_combine.py::test_factors_are_peft_s",
)
@method(
    "Combination: magnitude_prune",
    equation="the density · numel elements of largest magnitude stay; then linear",
    use='add_weighted_adapter(model, ["law", "chemistry"], [1, 1], "both", "magnitude_prune", density=0.2)',
    changes="C",
    source="PEFT, https://github.com/huggingface/peft",
    test="test_combine.py::test_factors_are_peft_s",
)
@torch.no_grad()
def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: str = "svd",
    *,
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """One adapter of a layer from n, by one of the methods of PEFT's `add_weighted_adapter`.

    With ΔW_i = s_i B_i A_i and the target ΔW = Σ w_i ΔW_i:

        cat     A = [w_1 s_1 A_1; w_2 s_2 A_2; ...], B = [B_1 B_2 ...]: ΔW itself, of rank R = Σ r_i
        svd     the best approximation of ΔW of rank r = `svd_rank` in the Frobenius norm (Eckart and Young 1936): A has
                orthonormal rows, B orthogonal columns. From the QR decompositions of the stacked factors and the SVD of an
                R x R matrix; ΔW is never formed
        linear  A = Σ ± √|w_i s_i| A_i, B = Σ √|w_i s_i| B_i. Not ΔW: the products B_i A_j of different adapters come on top, so
                that the mean of an adapter and its copy is twice the adapter. Exact for one adapter

    The others merge tensors T_i into Σ w_i T_i of changed T_i, element by element:

        magnitude_prune   the `density` · numel elements of T_i of largest magnitude stay
        dare_linear       each element of T_i stays with probability `density`, divided by it
                          (Yu et al. 2023, https://arxiv.org/abs/2311.03099)
        ties, dare_ties   pruned as in magnitude_prune or dare_linear; then the mean over those elements of a place that have
                          the sign elected there (Yadav et al. 2023, https://arxiv.org/abs/2306.01708)

    As they are, they take T_i = A_i, then T_i = B_i, with √|w_i s_i| for w_i: cross terms as in `linear`. With "_svd" they take
    T_i = ΔW_i, which therefore is formed for every adapter, (n, N, K) in all, and cut to rank r by a full SVD.

    Results are PEFT's, except where PEFT 0.21 is wrong:

    * A negative weight means the negated adapter, also where signs are elected; PEFT elects before it looks at weights.
    * One adapter is treated as several are; PEFT ignores `svd_rank`, `density` and the method then.
    * The result has scaling 1, also if the first adapter is rank-stabilised; PEFT's is too large by √r then.
    * ΔW_i and w_i are not rounded to half precision or fp32 on the way, and the result has the dtype that it should have.
    * `svd_rank` may be more than N or K, where PEFT's A and B do not fit each other.

    Args:
        adapters: lora_A (r_i, K), lora_B (N, r_i), float32, bfloat16, float16 or float64, and a scaling. Of
            different ranks with "cat", "svd" and what ends so.
        weights: w_i, one for each adapter, of either sign.
        method: see above.
        svd_rank: r of "svd" and of what ends so, None: the largest r_i. The result has rank min(r, N, K), that of "svd" also at
            most R: further rows would be zero.
        density: in (0, 1], needed by ties, dare and magnitude_prune.
        majority_sign_method: "total": the sign of Σ T_i is elected; "frequency": the sign that most T_i have.
        generator: of dare's random numbers. None: torch's default, from which PEFT draws the same ones in the same order.
        dtype: of the result. None: that of the first lora_A.

    Returns:
        The adapter, its scaling 1, computed in fp64 ("cat", "svd", all of fp64 adapters) or fp32 and rounded once to `dtype`.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name; a result that is not finite.
    """
    adapters = [Adapter(*adapter) for adapter in adapters]
    _check(adapters, weights, method, svd_rank, density, majority_sign_method)
    _check_dtype(dtype)
    scaled = [w * a.scaling for w, a in zip(weights, adapters, strict=True)]
    r = svd_rank or max(a.lora_A.shape[0] for a in adapters)
    rule = _Rule(method.removesuffix("_svd"), density, majority_sign_method, generator)
    fp64 = any(t.dtype == torch.float64 for a in adapters for t in (a.lora_A, a.lora_B))
    wide = torch.float64 if fp64 else torch.float32  # what fp32 rounds decides elections: PEFT's results need PEFT's arithmetic
    if method in ("cat", "svd"):
        A = torch.cat([a.lora_A.double() * ws for a, ws in zip(adapters, scaled, strict=True)])
        B = torch.cat([a.lora_B.double() for a in adapters], dim=1)
        if method == "svd":
            A, B = _truncated_product(A, B, r)
    elif method in _OF_FACTORS:
        roots = [math.sqrt(abs(ws)) for ws in scaled]
        A = rule.merge([math.copysign(1, ws) * a.lora_A.to(wide) for a, ws in zip(adapters, scaled, strict=True)], roots)
        B = rule.merge([a.lora_B.to(wide) for a in adapters], roots)
    else:
        deltas = [
            (a.lora_B.to(wide) @ a.lora_A.to(wide)) * (math.copysign(1, w) * a.scaling)
            for a, w in zip(adapters, weights, strict=True)
        ]
        A, B = _truncated(rule.merge(deltas, [abs(w) for w in weights]), r)
    dtype = dtype or adapters[0].lora_A.dtype
    result = Adapter(A.to(dtype).contiguous(), B.to(dtype).contiguous())
    if not (torch.isfinite(result.lora_A).all() and torch.isfinite(result.lora_B).all()):
        raise ValueError(
            f"the combined adapter is not finite in {dtype}: weights {list(weights)}, scalings and factors too large"
        )
    return result


class _Rule(NamedTuple):
    """What becomes of n tensors, element by element."""

    name: str
    density: float | None
    majority_sign_method: str
    generator: torch.Generator | None

    def merge(self, tasks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        stacked = torch.stack([self._pruned(task) for task in tasks])
        weighted = stacked * torch.tensor(weights, dtype=stacked.dtype, device=stacked.device).view(-1, 1, 1)
        if not self.name.endswith("ties"):
            return weighted.sum(0)
        votes = stacked if self.majority_sign_method == "total" else stacked.sign()
        elected = torch.where(votes.sum(0) >= 0, 1, -1)
        agree = stacked.sign() == elected
        return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)

    def _pruned(self, task: Tensor) -> Tensor:
        if self.density is None or self.density == 1:
            return task
        if self.name.startswith("dare"):
            return task * torch.bernoulli(torch.full_like(task, self.density), generator=self.generator) / self.density
        kept = torch.topk(task.abs().flatten(), int(self.density * task.numel())).indices
        mask = torch.zeros(task.numel(), dtype=torch.bool, device=task.device)
        mask[kept] = True
        return task * mask.view_as(task)


def _truncated_product(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """B A cut to rank r. With Aᵀ = Q_A R_A and B = Q_B R_B, its right singular vectors are those of R_B R_Aᵀ, times Q_Aᵀ."""
    Q_A, R_A = torch.linalg.qr(A.T)
    _, R_B = torch.linalg.qr(B, mode="r")
    core, _ = _truncated(R_B @ R_A.T, r)
    Vh = core @ Q_A.T
    return Vh, B @ (A @ Vh.T)  # U S, nearer than from the singular values


def _truncated(delta: Tensor, r: int) -> tuple[Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return Vh[:r], U[:, :r] * S[:r]


def _check(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: str,
    svd_rank: int | None,
    density: float | None,
    majority_sign_method: str,
) -> None:
    if method not in METHODS:
        raise ValueError(f"method (combination_type) must be one of {', '.join(METHODS)}, got {method!r}")
    if not adapters:
        raise ValueError("adapters must hold at least one adapter, got none")
    if len(weights) != len(adapters):
        raise ValueError(f"weights must be one number for each of {len(adapters)} adapters, got {len(weights)}")
    for i, w in enumerate(weights):
        if isinstance(w, bool) or not isinstance(w, int | float) or not math.isfinite(w):
            raise ValueError(f"weights[{i}] must be a finite number, got {w!r}")
    for i, adapter in enumerate(adapters):
        _check_adapter(i, adapter, adapters[0])
    if svd_rank is not None and (not isinstance(svd_rank, int) or isinstance(svd_rank, bool) or svd_rank < 1):
        raise ValueError(f"svd_rank must be an integer >= 1 or None, got {svd_rank!r}")
    if svd_rank is not None and not method.endswith("svd"):
        raise ValueError(f'svd_rank must be None for "{method}", whose rank follows from the adapters, got {svd_rank}')
    pruned = method not in ("cat", "svd", "linear")
    number = isinstance(density, int | float) and not isinstance(density, bool)
    if pruned and not (number and 0 < density <= 1):  # type: ignore[operator]
        raise ValueError(f'density must be a number in (0, 1] for "{method}", got {density!r}')
    if majority_sign_method not in ("total", "frequency"):
        raise ValueError(f'majority_sign_method must be "total" or "frequency", got {majority_sign_method!r}')
    ranks = [adapter.lora_A.shape[0] for adapter in adapters]
    if method in _OF_FACTORS and len(set(ranks)) > 1:
        raise ValueError(f'"{method}" needs adapters of one rank, got {ranks}; "cat" and all that ends in "svd" take any')


def _check_adapter(i: int, adapter: Adapter, first: Adapter) -> None:
    for name, t in (("lora_A", adapter.lora_A), ("lora_B", adapter.lora_B)):
        if not isinstance(t, Tensor) or t.dim() != 2:
            got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"adapters[{i}].{name} must be a matrix, got {got}")
        _check_dtype(t.dtype, f"adapters[{i}].{name}")
        if t.device != first.lora_A.device:
            raise ValueError(f"adapters[{i}].{name} must be on {first.lora_A.device}, as adapters[0].lora_A is, got {t.device}")
        if not torch.isfinite(t).all():
            raise ValueError(f"adapters[{i}].{name} has values that are not finite")
    shapes = (adapter.lora_A.shape, adapter.lora_B.shape)
    (r, K), (N, columns), (_, first_K), (first_N, _) = *shapes, first.lora_A.shape, first.lora_B.shape
    if r != columns or r < 1:
        raise ValueError(f"adapters[{i}]: lora_A (r, K) and lora_B (N, r) must have one r >= 1, got {r} and {columns}")
    if (first_N, first_K) != (N, K):
        raise ValueError(f"adapters[{i}] must have N = {first_N} and K = {first_K} as the first, got {N} and {K}")
    if not math.isfinite(adapter.scaling):
        raise ValueError(f"adapters[{i}].scaling must be a finite number, got {adapter.scaling!r}")


def _check_dtype(dtype: torch.dtype | None, name: str = "dtype") -> None:
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {dtype}")
