"""Operands that are copied for a kernel live as long as its call, and what a kernel would read behind is refused."""

import pytest
import torch
from torch import Tensor, nn

import lora_ops
from lora_ops import dora

M, K, N, R = 24, 72, 56, 4
A, B = torch.randn(R, K), torch.randn(N, R)
GATE = torch.randn(R)


def strided(*shape: int) -> Tensor:
    """No stride is 1: the kernels read a copy."""
    t = torch.randn([2 * n for n in shape])[tuple(slice(None, None, 2) for _ in shape)]
    assert all(s != 1 for s in t.stride())
    return t


def bank() -> lora_ops.AdapterBank:
    bank = lora_ops.AdapterBank()
    bank.add("a", A, B, 2.0)
    return bank


CALLS = {
    "plain": lambda x, W, b: lora_ops.lora_linear(x, W, A, B, scaling=2.0, bias=b),
    "gate": lambda x, W, b: lora_ops.lora_linear(x, W, A, B, scaling=2.0, bias=b, gate=GATE),
    "mixed": lambda x, W, b: lora_ops.multi_lora_linear(x, W, bank(), ["a"] * len(x), bias=b),
    "dora": lambda x, W, b: lora_ops.dora_linear(x, W, A, B, torch.ones(N), scaling=2.0, bias=b),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("rows", [M, 1])
def test_strided_weight_and_bias(call, rows: int) -> None:
    for _ in range(5):
        x, W, b = torch.randn(rows, K).requires_grad_(), strided(N, K), strided(N)
        other = x.detach().clone().requires_grad_()
        y, wanted = call(x, W, b), call(other, W.contiguous(), b.contiguous())
        y.sum().backward()
        wanted.sum().backward()
        assert torch.equal(y, wanted)
        assert torch.equal(x.grad, other.grad)  # type: ignore[arg-type]


def test_norm_of_a_strided_weight() -> None:
    W = strided(N, K)
    torch.testing.assert_close(dora.weight_norm(W, A, B, 2.0), (W + 2.0 * B @ A).norm(dim=1), rtol=1e-5, atol=1e-5)


def test_dora_refuses_another_width_before_it_reads() -> None:
    with pytest.raises(ValueError, match="lora_A must be"):
        lora_ops.dora_linear(torch.randn(3, K), torch.randn(N, K), torch.randn(R, 1000 * K), B, torch.ones(N), scaling=1.0)


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        ({"S": None}, "S must have 96 elements"),
        ({"S": torch.zeros(M, R, dtype=torch.float64)}, "S must be float32"),
        ({"x": None}, "x must have 1728 elements"),
        ({"gate": torch.ones(R - 1)}, "gate must be"),
        ({"z": None}, "z must have 1344 elements"),
    ],
)
def test_a_backward_refuses_what_it_lacks(lacking: dict, words: str) -> None:
    given = {
        "dy": torch.randn(M, N), "x": torch.randn(M, K), "gate": GATE, "out_scale": torch.ones(N), "S": torch.zeros(M, R),
        "z": torch.zeros(M, N),
    }  # fmt: skip
    dy, x, gate, out_scale, S, z = (given | lacking).values()
    with pytest.raises((ValueError, TypeError), match=words):
        torch.ops.lora_ops.lora_general_backward(
            dy, x, [torch.randn(N, K)], 0, "", A, B, gate, None, out_scale, S, z, None, 1.0, 0.0,
            True, True, True, True, True, False, True,
        )  # fmt: skip


@pytest.mark.parametrize(("x", "S"), [(None, torch.zeros(M, R)), (torch.randn(M, K), None)])
def test_a_plain_backward_refuses_what_it_lacks(x: Tensor | None, S: Tensor | None) -> None:
    dy, W = torch.randn(M, N), torch.randn(N, K)
    with pytest.raises(ValueError, match="elements for the gradients that are asked for, got None"):
        torch.ops.lora_ops.lora_backward(dy, x, W, A, B, S, None, 1.0, 0.0, True, True, True, False)


def test_z_is_kept_without_an_output_scale() -> None:
    x, W = torch.randn(M, K), torch.randn(N, K)
    y, _, z = torch.ops.lora_ops.lora_general_forward(x, [W], 0, "", A, B, None, GATE, None, None, None, None, 1.0, 0.0, True)
    assert torch.equal(y, z)


def test_a_gate_is_not_merged_away() -> None:
    model = lora_ops.add_lora(nn.Sequential(nn.Linear(K, N)), lora_ops.LoraConfig(r=R, target_modules=["0"]))
    lora_ops.compose.set_adapter_gate(model, torch.tensor([0.5]))
    before = model[0].weight
    with pytest.raises(RuntimeError, match="a gate weighs the adapters"):
        model[0].merge()
    assert model[0].weight is before
    lora_ops.compose.set_adapter_gate(model, None)
    model[0].merge()


@pytest.mark.parametrize("variant", ["use_dora", "lora_bias"])
def test_what_has_no_gate_is_refused(variant: str) -> None:
    config = lora_ops.LoraConfig(r=R, target_modules=["0"], **{variant: True})
    model = lora_ops.add_lora(nn.Sequential(nn.Linear(K, N)), config)
    with pytest.raises(ValueError, match="neither DoRA nor have a bias of B"):
        lora_ops.compose.set_adapter_gate(model, torch.tensor([0.5]))


def test_dropout_below_its_resolution_scales_both_ways() -> None:
    """p < 2^-17 hides nothing, and 1 / (1 - p) is in the output and in the gradients alike."""
    x, W, p = torch.randn(M, K), torch.randn(N, K), 7e-6
    grads = []
    for gate in (None, torch.ones(R)):
        a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
        y = lora_ops.lora_linear(x, W, a, b, scaling=1.0, dropout_p=p, training=True, gate=gate)
        y.backward(torch.ones_like(y))
        grads.append(a.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=2e-6, atol=0)


def test_dropout_out_of_range_is_refused_outside_training_too() -> None:
    with pytest.raises(ValueError, match="dropout_p must be"):
        lora_ops.lora_linear(torch.randn(M, K), torch.randn(N, K), A, B, scaling=1.0, dropout_p=2.0, gate=GATE)
