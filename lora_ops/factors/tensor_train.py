"""LoRETTA: factors in tensor-train format."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import method
from .base import Factors, check_positive, shape_of


def small_factors(n: int, at_most: int = 16) -> list[int]:
    """Integers >= 2 with product n, each the largest that fits; a prime above `at_most` stays whole. [1] for 1."""
    found = []
    while n > 1:
        d = next((d for d in range(min(at_most, n), 1, -1) if n % d == 0), n)
        found.append(d)
        n //= d
    return found or [1]


class TensorTrain(nn.Module):
    """A matrix (rows, columns) as a chain of small tensors: with rows = n_1 ... n_p, columns = n_p+1 ... n_d,

        M[(i_1 ... i_p), (i_p+1 ... i_d)] = G_1[i_1] G_2[i_2] ... G_d[i_d],   G_k (rank_k-1, n_k, rank_k), rank_0 = rank_d = 1

    TT format: Oseledets 2011, https://doi.org/10.1137/090752286.

    Args:
        rows, columns: of the matrix.
        tensor_rank: of the chain, at most what its place allows.
        std: of the matrix's elements at first; cores are normal.
    """

    def __init__(self, rows: int, columns: int, tensor_rank: int = 5, *, std: float = 1.0) -> None:
        super().__init__()
        check_positive(rows=rows, columns=columns, tensor_rank=tensor_rank)
        self.rows, self.columns = rows, columns
        left, right = small_factors(rows), small_factors(columns)
        self.of_rows, dims = len(left), left + right
        most = [min(math.prod(dims[:k]), math.prod(dims[k:])) for k in range(1, len(dims))]
        ranks = [1, *(min(tensor_rank, m) for m in most), 1]
        share = std ** (1 / len(dims))
        self.cores = nn.ParameterList(
            nn.Parameter(torch.randn(a, n, b) * share / math.sqrt(b)) for a, n, b in zip(ranks, dims, ranks[1:], strict=False)
        )

    def forward(self) -> Tensor:
        left, right = (_contracted(list(part)) for part in (self.cores[: self.of_rows], self.cores[self.of_rows :]))
        return left.view(self.rows, -1) @ right.view(-1, self.columns)

    @torch.no_grad()
    def approximate(self, matrix: Tensor) -> None:
        """Takes the cores from the matrix, by one truncated SVD after the other: exact where the ranks suffice."""
        if matrix.shape != (self.rows, self.columns):
            raise ValueError(f"matrix must have shape {(self.rows, self.columns)}, got {tuple(matrix.shape)}")
        rest = matrix
        for core in self.cores[:-1]:
            a, n, b = core.shape
            U, S, Vh = torch.linalg.svd(rest.reshape(a * n, -1), full_matrices=False)
            core.copy_(U[:, :b].reshape(a, n, b))
            rest = S[:b, None] * Vh[:b]
        self.cores[-1].copy_(rest.reshape(self.cores[-1].shape))


def _contracted(cores: list[Tensor]) -> Tensor:
    """(rank before, all dimensions, rank behind) in row-major order."""
    total = cores[0]
    for core in cores[1:]:
        total = torch.tensordot(total, core, dims=1)
    return total.contiguous()


@method(
    "LoRETTA (rep)",
    equation="A and B as tensor trains of rank 5: core k (rank_k-1, n_k, rank_k)",
    use="FactoredLinear(linear, factors.LorettaRep(linear, r=8, tensor_rank=5), scaling=16 / 8)",
    changes="P",
    source="Yang et al. 2024, https://arxiv.org/abs/2402.11417; code: yifanycc/loretta",
    test="test_factors_tensor_train.py::test_a_train_is_the_product_of_its_slices",
    note="The code starts both trains at random: a layer starts away from W0.",
)
class LorettaRep(nn.Module):
    """The reparametrising form: LoRA whose factors are trains, their elements of variance 1 / (K + r) and 1 / (N + r).

    Args:
        linear: the layer that gets it.
        r: rank of the LoRA.
        tensor_rank: of the trains.
    """

    def __init__(self, linear: nn.Module, r: int = 8, *, tensor_rank: int = 5) -> None:
        super().__init__()
        check_positive(r=r)
        N, K = shape_of(linear)
        self.down = TensorTrain(K, r, tensor_rank, std=(K + r) ** -0.5)
        self.up = TensorTrain(N, r, tensor_rank, std=(N + r) ** -0.5)

    def forward(self, x: Tensor) -> Factors:
        return Factors(self.down().T.contiguous(), self.up())


@method(
    "LoRETTA (adp)",
    equation="y = x + gelu(x Dᵀ + d) Uᵀ + u, D (bottleneck, K) and U (K, bottleneck) as tensor trains",
    use="torch.nn.Sequential(linear, factors.LorettaAdp(linear.out_features))",
    changes="P",
    source="Yang et al. 2024, https://arxiv.org/abs/2402.11417; code: yifanycc/loretta",
    test="test_factors_tensor_train.py::test_an_adapter_of_trains_is_one_of_their_matrices",
    note="No update of a weight but a serial adapter: it stands behind a layer, and cannot be merged.",
)
class LorettaAdp(nn.Module):
    """The adapter form, which is put behind a layer.

    Args:
        features: K, of x and y.
        bottleneck: between D and U.
        tensor_rank: of the trains.
    """

    def __init__(self, features: int, bottleneck: int = 64, *, tensor_rank: int = 5) -> None:
        super().__init__()
        std = (features + bottleneck) ** -0.5
        self.down = TensorTrain(bottleneck, features, tensor_rank, std=std)
        self.up = TensorTrain(features, bottleneck, tensor_rank, std=std)
        self.down_bias, self.up_bias = nn.Parameter(torch.zeros(bottleneck)), nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(F.gelu(F.linear(x, self.down(), self.down_bias)), self.up(), self.up_bias)
