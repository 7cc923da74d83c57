"""MELoRA's blocks and QA-LoRA's pooled columns."""

import pytest
import torch
from factored_layers import K, M, N, assert_close, assert_computes, factored, fresh, is_base, linear, make_x

from lora_ops import factors


def test_melora_is_one_small_lora_for_each_slice():
    n, r = 4, 2
    layer = factored(lambda base: factors.MELora(base, r, minis=n))
    f, x = layer.factors, make_x()
    parts = [x[:, k * K // n : (k + 1) * K // n] @ f.lora_A[k].T @ f.lora_B[k].T for k in range(n)]
    base = x @ layer.weight.T + layer.bias
    assert_close(layer(x), base + layer.scaling * torch.cat(parts, dim=1))
    assert torch.linalg.matrix_rank(layer.delta_weight()) == n * r
    assert sum(p.numel() for p in f.parameters()) == r * (K + N)  # of rank r
    assert_computes(layer, torch.block_diag(*(b @ a for a, b in zip(f.lora_A, f.lora_B, strict=True))))
    assert is_base(fresh(lambda base: factors.MELora(base, r, minis=n)))


def test_qa_lora_merges_into_the_zero_points():
    """Codes and scales of a group-wise integer weight stay; the float zero points take ΔW."""
    L, base = 4, linear()
    codes = torch.randint(0, 16, (N, K)).double()
    scales, zeros = torch.rand(N, K // L).double() * 0.1 + 0.05, torch.randint(0, 16, (N, K // L)).double()

    def dequantised(zeros):
        return (codes - zeros.repeat_interleave(L, 1)) * scales.repeat_interleave(L, 1)

    base.weight.data.copy_(dequantised(zeros))
    layer = factored(lambda linear: factors.QALora(linear, 3, group_size=L), base)
    f, x = layer.factors, make_x()
    pooled = torch.nn.functional.avg_pool1d(x.unsqueeze(1), L).squeeze(1)
    assert pooled.shape == (M, K // L)
    y = layer(x)
    assert_close(y, x @ base.weight.T + base.bias + layer.scaling * pooled @ f.lora_A.T @ f.lora_B.T)
    merged = f.merged_zeros(zeros, scales, layer.scaling)
    assert_close(y.detach(), (x @ dequantised(merged).T + base.bias).detach())
    assert_computes(layer, (f.lora_B @ f.lora_A).repeat_interleave(L, 1) / L)
    assert is_base(fresh(lambda base: factors.QALora(base, 3, group_size=L)))
    with pytest.raises(ValueError, match="scales must have shape"):
        f.merged_zeros(zeros, scales[:1], 1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: factors.MELora(linear(), 2, minis=3), f"minis must divide N = {N}, got 3"),
        (lambda: factors.QALora(linear(), 2, group_size=5), f"group_size must divide K = {K}, got 5"),
        (lambda: factors.VBLora(linear(), factors.VectorBank(8, 5)), f"vector_length must divide K = {K}, got 5"),
        (lambda: factors.VBLora(linear(), factors.VectorBank(8, 4), topk=9), "topk must be at most the bank's num_vectors = 8"),
    ],
)
def test_refuses_what_does_not_divide(make, message):
    with pytest.raises(ValueError, match=message):
        make()
