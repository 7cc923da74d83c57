"""Deep LoRA: the chain, and the subspace that one gradient gives."""

import functools

import pytest
import torch
from factored_layers import K, N, R, assert_close, assert_computes, factored, linear, trainable

from lora_ops import FactoredLinear, factors
from lora_ops.factors.chain import orthogonal_chain

EPS = 1e-3


def test_the_core_is_the_product_of_the_chain():
    A, B = torch.randn(R, K), torch.randn(N, R)
    layer = factored(lambda base: factors.DeepLora(A, B))
    assert trainable(layer.factors) == {f"chain.{i}": (R, R) for i in range(3)}
    W1, W2, W3 = layer.factors.chain
    assert_computes(layer, layer.factors.pair.lora_B @ W3 @ W2 @ W1 @ layer.factors.pair.lora_A)
    layer = factored(lambda base: factors.DeepLora(A, B, depth=4, train_sides=True))
    W1, W2, W3, W4 = layer.factors.chain
    assert_computes(layer, layer.factors.pair.lora_B @ W4 @ W3 @ W2 @ W1 @ layer.factors.pair.lora_A)


def moving_subspace(W1, gradient, r):
    """The projector onto what is left after what does not move: the intersection of both matrices' still subspaces."""
    U, _, Vh = torch.linalg.svd(gradient)
    still = [W1.T @ U[:, r // 2 :], Vh.T[:, r // 2 :]]
    n = len(W1)
    null = torch.linalg.svd(torch.cat([still[0], -still[1]], dim=1))[2].T[: still[0].shape[1], n:]
    basis = torch.linalg.svd(still[0] @ null)[0].flip(1)[:, :r]
    return basis @ basis.T


@pytest.mark.parametrize("shape", [(N, K), (K, N), (N, N)])
def test_deep_lora_is_the_full_chain_on_its_subspace(shape):
    n, k = shape
    gradient = torch.randn(shape, dtype=torch.float64)
    base = linear(n, k)
    provider = factors.DeepLora.from_gradient(base, gradient, R, init_scale=EPS, generator=torch.Generator().manual_seed(5))
    layer = FactoredLinear(base, provider)
    chain = orthogonal_chain(n, k, 3, gradient, torch.Generator().manual_seed(5))  # without init_scale
    full = functools.reduce(torch.matmul, reversed(chain))
    if k >= n:
        projector = moving_subspace(chain[0], (chain[2] @ chain[1]).T @ gradient, R)
        expected = full @ projector
    else:
        projector = moving_subspace(chain[2].T, chain[1] @ chain[0] @ gradient.T, R)
        expected = projector @ full
    assert torch.linalg.matrix_rank(projector) == R
    assert_close(layer.delta_weight(), EPS**3 * expected, 1e-12)
    assert_close(layer.delta_weight() / EPS**3, expected, 1e-6)  # the chain is orthogonal to fp32 only


def test_one_step_of_the_full_chain_stays_in_the_subspace():
    """What the first gradient step changes of W_1 lies in the span of A, up to the gradient's smaller singular values."""
    base, r = linear(), 8
    x = torch.randn(5, K, dtype=torch.float64)
    dy = torch.randn(5, 4, dtype=torch.float64) @ torch.randn(4, N, dtype=torch.float64)  # of rank 4 = r / 2
    gradient = dy.T @ x
    generator = torch.Generator().manual_seed(5)
    A = factors.DeepLora.from_gradient(base, gradient, r, generator=generator).pair.lora_A.double()
    chain = orthogonal_chain(N, K, 3, gradient, torch.Generator().manual_seed(5))
    of_first = (chain[2] @ chain[1]).T @ gradient
    assert_close(of_first @ A.T @ A, of_first, 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 3}, "r must be even, got 3"),
        ({"r": 2, "depth": 2}, "depth must be at least 3, got 2"),
        ({"r": 2, "gradient": torch.ones(K, N)}, "gradient must have shape"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        factors.DeepLora.from_gradient(linear(), **{"gradient": torch.ones(N, K), **options})
