"""LoRETTA: matrices as tensor trains."""

import math

import pytest
import torch
import torch.nn.functional as F
from factored_layers import K, N, R, assert_close, assert_computes, factored, make_x, randomised
from torch import nn

from lora_ops import factors
from lora_ops.factors.tensor_train import small_factors


@pytest.mark.parametrize("n", [1, 2, 17, 24, 576, 768, 11008, 49152])
def test_small_factors(n):
    found = small_factors(n)
    assert math.prod(found) == n
    assert all(f <= 16 or all(f % d for d in range(2, f)) for f in found)


def test_a_train_is_the_product_of_its_slices():
    rows, columns = 15 * 4, 24
    train = factors.TensorTrain(rows, columns, 3).double()
    dims = [*small_factors(rows), *small_factors(columns)]
    assert [core.shape[1] for core in train.cores] == dims
    assert [core.shape[2] for core in train.cores[:-1]] == [3, 3, 2]
    assert sum(p.numel() for p in train.parameters()) == sum(a * n * b for a, n, b in (c.shape for c in train.cores))
    matrix = train()
    assert matrix.shape == (rows, columns)
    for i, j in [(0, 0), (7, 3), (59, 23)]:
        flat = i * columns + j
        indices = torch.unravel_index(torch.tensor(flat), dims)
        product = torch.eye(1, dtype=torch.float64)
        for core, index in zip(train.cores, indices, strict=True):
            product = product @ core[:, index]
        assert_close(matrix[i, j], product.squeeze())
    layer = factored(lambda base: factors.LorettaRep(base, R, tensor_rank=3))
    assert_computes(layer, layer.factors.up() @ layer.factors.down().T)


def test_full_ranks_reproduce_any_matrix():
    matrix = torch.randn(24, 20, dtype=torch.float64)
    train = factors.TensorTrain(24, 20, 10**6).double()
    train.approximate(matrix)
    assert_close(train().detach(), matrix)
    small = factors.TensorTrain(24, 20, 2).double()
    small.approximate(matrix)
    assert 0.1 < (small() - matrix).norm() / matrix.norm() < 1
    with pytest.raises(ValueError, match="matrix must have shape \\(24, 20\\)"):
        train.approximate(matrix.T)


def test_elements_have_the_deviation_asked_for():
    trains = [factors.TensorTrain(64, 32, 5, std=0.3)() for _ in range(60)]
    assert torch.stack(trains).std().item() == pytest.approx(0.3, rel=0.15)


def test_an_adapter_of_trains_is_one_of_their_matrices():
    adapter = randomised(factors.LorettaAdp(N, 8, tensor_rank=3).double())
    model = nn.Sequential(nn.Linear(K, N, dtype=torch.float64), adapter)
    x = make_x()
    h = model[0](x)
    D, U = adapter.down(), adapter.up()
    assert (D.shape, U.shape) == ((8, N), (N, 8))
    assert_close(model(x), h + F.gelu(h @ D.T + adapter.down_bias) @ U.T + adapter.up_bias)
