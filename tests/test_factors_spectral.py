"""Methods on the singular value decomposition of W0."""

import pytest
import torch
from factored_layers import K, N, R, assert_close, assert_computes, factored, fresh, is_base, linear, make_x, trainable
from quantised_layers import linear4bit

from lora_ops import FactoredLinear, factors


def test_a_weight_in_4_bits_is_decomposed_as_it_is_multiplied_by():
    layer = fresh(factors.sam_parser, linear4bit())
    weight = layer.weight.dequantize(torch.float32)
    layer.factors.gate.data.fill_(0.1)
    U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(layer.delta_weight(), 0.1 * U @ Vh, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [factors.SVDiff, factors.sam_parser])
@pytest.mark.parametrize("shape", [(N, K), (K, N)])
def test_singular_values_train(make, shape):
    """W = U diag(σ) Vᵀ with σ = S + shift, which stays >= 0 in SVDiff."""
    base = linear(*shape)
    layer = FactoredLinear(base, make(base))
    assert is_base(layer)
    ((name, (rank,)),) = trainable(layer.factors).items()
    assert rank == min(shape)
    U, S, Vh = torch.linalg.svd(base.weight, full_matrices=False)
    shift = 2 * S.detach() * torch.rand(rank, dtype=torch.float64) - 1.5 * S.detach()
    getattr(layer.factors, name).data.copy_(shift)
    sigma = S + shift
    assert sigma.min() < 0  # what relu is for
    sigma = sigma.relu() if make is factors.SVDiff else sigma
    x = make_x(k=shape[1])
    assert_close(layer(x).detach(), (x @ (U @ torch.diag(sigma) @ Vh).T + base.bias).detach())
    pair = layer.factors.pair
    parameter = getattr(layer.factors, name)
    gate = (S.detach() + parameter).relu() - S.detach() if make is factors.SVDiff else parameter
    assert_computes(layer, pair.lora_B @ torch.diag(gate) @ pair.lora_A, x)


def test_spectral_adapter_is_the_product_that_it_expands():
    layer = fresh(lambda base: factors.SpectralAdapter(base, R))
    assert is_base(layer)
    assert trainable(layer.factors) == {"dU": (N, R), "dVh": (R, K)}
    layer = factored(lambda base: factors.SpectralAdapter(base, R), scaling=1.0)
    f = layer.factors
    U, S, Vh = torch.linalg.svd(layer.weight, full_matrices=False)
    U, S, Vh = U[:, :R], torch.diag(S[:R]), Vh[:R]
    moved = (f.U + f.dU) @ S @ (f.Vh + f.dVh)
    assert_computes(layer, moved - U @ S @ Vh)
    expanded = f.dU @ S @ Vh + f.U @ S @ f.dVh + f.dU @ S @ f.dVh
    assert_close(layer.delta_weight(), expanded.detach())
    assert torch.linalg.matrix_rank(layer.delta_weight()) == 2 * R


def test_refuses_a_rank_that_the_weight_does_not_have():
    with pytest.raises(ValueError, match=f"r must be at most min\\(N, K\\) = {N}, got 99"):
        factors.SpectralAdapter(linear(), 99)
