"""torch.utils.flop_counter counts for every operator what it counts for the same layer in eager mode."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import lora_ops
from lora_ops import AdapterBank, FusedLoraConv2d, FusedLoraLinear, multi_lora_linear, quantize_nf4

SHAPE = M, K, N, r = 12, 70, 33, 4


def flops(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def passes(function, leaves) -> int:
    """Forward and backward."""

    def run():
        y = function(*leaves)
        if y.requires_grad:
            y.sum().backward()

    return flops(run)


def trained(needs, *shapes) -> list[torch.Tensor]:
    return [torch.randn(shape, requires_grad=need) for shape, need in zip(shapes, needs, strict=True)]


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("four_bits", [False, True])
def test_lora_linear(needs, four_bits):
    W, leaves = torch.randn(N, K), trained(needs, (2, M // 2, K), (r, K), (N, r))
    qweight = quantize_nf4(W)

    def fused(x, A, B):
        if four_bits:
            return lora_ops.qlora_linear(x, qweight, A, B, scaling=0.5)
        return lora_ops.lora_linear(x, W, A, B, scaling=0.5)

    assert passes(fused, leaves) == passes(lambda x, A, B: F.linear(x, W) + 0.5 * F.linear(F.linear(x, A), B), leaves)


def test_the_numbers():
    W, leaves = torch.randn(N, K), trained((True, True, True), (M, K), (r, K), (N, r))
    forward = 2 * M * N * K + 2 * M * r * (K + N)
    assert flops(lambda: lora_ops.lora_linear(leaves[0], W, *leaves[1:], scaling=0.5)) == forward
    # dx costs what y does; dA and dB as much as S and S Bᵀ.
    assert passes(lambda *t: lora_ops.lora_linear(t[0], W, *t[1:], scaling=0.5), leaves) == 2 * forward + 2 * M * r * (K + N)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=6)), ids=str)
def test_the_general_form(needs):
    W, leaves = torch.randn(N, K), trained(needs, (M, K), (r, K), (N, r), (r,), (r, r), (N,))

    def fused(x, A, B, gate, core, out_scale):
        return lora_ops.lora_linear(x, W, A, B, scaling=0.5, gate=gate, core=core, out_scale=out_scale)

    def eager(x, A, B, gate, core, out_scale):
        return out_scale * (x @ W.T + 0.5 * ((x @ A.T) * gate) @ core @ B.T)

    assert passes(fused, leaves) == passes(eager, leaves)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=2)), ids=str)
def test_mixed_batches(needs):
    """Every row costs its own adapter's rank."""
    ids, ranks = torch.tensor([1, 0, -1, 1, 1, 0, 2, -1, 1, 0, 1, 1]), (2, 5, 3)
    W, x = torch.randn(N, K), torch.randn(M, K, requires_grad=needs[0])
    factors = [trained((needs[1], True), (r, K), (N, r)) for r in ranks]
    bank = AdapterBank()
    for i, (A, B) in enumerate(factors):
        bank.add(str(i), A, B, 0.5)

    def eager():
        y = x @ W.T
        for i, (A, B) in enumerate(factors):
            y = y.index_add(0, (ids == i).nonzero()[:, 0], x[ids == i] @ A.T @ B.T)
        y.sum().backward()

    assert passes(lambda x: multi_lora_linear(x, W, bank, ids), [x]) == flops(eager)


def test_a_mixed_batch_without_numbers_costs_the_largest_rank():
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        As, Bs = [torch.empty(n, K) for n in (2, 5)], [torch.empty(N, n) for n in (2, 5)]
        arguments = [torch.empty(N, K)], K, 0, "", As, Bs, torch.empty(2), torch.empty(M, dtype=torch.int64), None, None, 0.0
        counted = flops(lambda: torch.ops.lora_ops.multi_lora_forward(torch.empty(M, K), *arguments))
    assert counted == 2 * M * N * K + 2 * M * 5 * (K + N)


def test_modules_have_their_own_line():
    """A convolution counts as torch's does, DoRA's norm costs W0 Aᵀ and B (A Aᵀ), and a module is named."""
    conv = FusedLoraConv2d(4, 6, 2, r, stride=2, init_lora_weights=False)
    x = torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        base = flops(lambda: F.conv2d(x, conv.weight, stride=2))
        windows = 3 * 4 * 4
        assert flops(lambda: conv(x)) == base + 2 * windows * r * (4 * 2 * 2 + 6)

        dora, plain = (FusedLoraLinear(K, N, r=r, use_dora=use_dora) for use_dora in (True, False))
        x = torch.randn(M, K)
        assert flops(lambda: dora(x)) == flops(lambda: plain(x)) + 2 * r * N * K + 2 * r * K * r + 2 * N * r * r

        model = nn.Sequential(plain, nn.ReLU(), nn.Linear(N, 3))
        with FlopCounterMode(display=False) as counter:
            model(x)
    assert counter.flop_counts["Sequential.0"] == {torch.ops.lora_ops.lora_forward: flops(lambda: plain(x))}
