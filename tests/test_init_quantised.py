"""Initialisations of weights in 4 bits."""

import itertools
import types

import bitsandbytes
import peft
import pytest
import torch
from initialised import K, R, linear, nearness, product, started
from torch import nn

import lora_ops
from lora_ops import FusedLoraLinear, NF4Weight, quantize_nf4
from lora_ops.init import allocate_bits, lq_lora, lqer

WIDE = (256, 192)


def error(layer: FusedLoraLinear, base: nn.Linear) -> float:
    """Of the weight that the layer starts with, relative."""
    weight = layer.weight.dequantize(torch.float32) if isinstance(layer.weight, NF4Weight) else layer.weight
    return nearness(weight + product(layer), base.weight)


def gaussian(size: tuple[int, int] = WIDE) -> nn.Linear:
    layer = nn.Linear(size[1], size[0])
    nn.init.normal_(layer.weight, std=0.02)
    return layer


def test_loftq_repairs_more_with_every_iteration() -> None:
    base = gaussian()
    qlora = error(started(True, base, quant="nf4"), base)
    errors = [error(started(f"loftq_iter_{T}", base, quant="nf4", double_quant=False), base) for T in (1, 2, 5)]
    assert 0.08 < qlora < 0.11
    assert qlora > errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.95 * qlora


@pytest.mark.parametrize("lora_alpha", [R, 3 * R])
def test_loftq_is_peft_s_but_for_the_scaling(lora_alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's code runs on GPUs only: here what it sends there stays. Its factors are the same ones at scaling 1."""
    module = peft.utils.loftq_utils
    monkeypatch.setattr(module, "is_xpu_available", lambda: True)  # compute_device = "xpu"
    to = torch.Tensor.to

    def to_cpu(self, *args, **kwargs):
        args = tuple("cpu" if a == "xpu" else a for a in args)
        return to(self, *args, **{k: "cpu" if v == "xpu" else v for k, v in kwargs.items()})

    params4bit = bitsandbytes.nn.Params4bit.to
    monkeypatch.setattr(torch.Tensor, "to", to_cpu)
    monkeypatch.setattr(
        bitsandbytes.nn.Params4bit,
        "to",
        lambda self, device: self._quantize(torch.device("cpu")) if device == "xpu" else params4bit(self, device),
    )
    monkeypatch.setattr(module, "clear_device_cache", lambda: None)
    base = linear(size=(40, 64))  # rows of whole blocks: bitsandbytes decodes others wrongly on a CPU
    Q, A, B = module.loftq_init(base.weight, num_bits=4, reduced_rank=R, num_iter=3)
    monkeypatch.undo()
    layer = FusedLoraLinear.from_linear(
        base, R, lora_alpha=lora_alpha, init_lora_weights="loftq_iter_3", quant="nf4", double_quant=False
    )
    assert isinstance(layer.weight, NF4Weight)
    assert nearness(layer.weight.dequantize(torch.float32), Q) < 1e-6
    assert nearness(product(layer), B @ A) < 1e-4
    assert error(layer, base) < 0.1
    as_peft_adds_it = nearness(Q + lora_alpha / R * (B @ A), base.weight)
    assert (as_peft_adds_it < error(layer, base) + 1e-5) == (lora_alpha == R)


def test_qpissa_loses_less_than_qlora() -> None:
    """And less than LoftQ where singular values fall."""
    base = linear()
    qlora, loftq, qpissa = (error(started(init, base, quant="nf4"), base) for init in (True, "loftq", "pissa"))
    assert qpissa < loftq < qlora
    again = started("qpissa", base, quant="nf4")
    assert nearness(again.weight.dequantize(), started("pissa", base, quant="nf4").weight.dequantize()) < 1e-6
    option = lora_ops.init.qpissa(base.weight, R, 1.0, iterations=5)
    W = base.weight.detach()
    assert nearness(option.weight.dequantize() + option.lora_B @ option.lora_A, W) < qpissa


def test_lqer_repairs_what_the_inputs_see() -> None:
    """Without inputs it is LoftQ's first iteration."""
    base, x = gaussian(), torch.randn(500, WIDE[1]) * torch.logspace(0, -2, WIDE[1])
    W = base.weight.detach()

    def lost(initial: lora_ops.init.Initial) -> float:
        return nearness(x @ (initial.weight.dequantize() + 1.5 * initial.lora_B @ initial.lora_A).T, x @ W.T)

    plain, of_inputs = lqer(W, 32, 1.5), lqer(W, 32, 1.5, X=x)
    assert lost(of_inputs) < 0.8 * lost(plain)
    loftq = lora_ops.init.loftq(W, 32, 1.5)
    assert nearness(plain.lora_B @ plain.lora_A, loftq.lora_B @ loftq.lora_A) < 1e-5
    a, lost_by_Q = x.abs().mean(0), W - of_inputs.weight.dequantize()
    missing = (lost_by_Q - 1.5 * of_inputs.lora_B @ of_inputs.lora_A) * a
    least = torch.linalg.svdvals(lost_by_Q * a)[32:].norm()  # no factors of rank 32 leave less of what the inputs see
    assert abs(missing.norm() / least - 1) < 1e-4
    model, bias = nn.Sequential(base), base.bias
    lora_ops.add_lora(model, lora_ops.LoraConfig(r=32, lora_alpha=48, target_modules=["0"]))
    lora_ops.init.initialize(model, "lqer", [x[:200], x[200:]], quant="nf4")
    assert isinstance(model[0].weight, NF4Weight)
    assert nearness(model(x) - bias, x @ W.T) < lost(plain)


def test_lq_lora_is_the_best_for_a_fisher_matrix_of_rank_one() -> None:
    base = gaussian()
    W = base.weight.detach()
    rows, columns = torch.rand(WIDE[0]) + 0.1, torch.rand(WIDE[1]) + 0.1
    G = (rows[:, None] * columns).sqrt()  # F = G ∘ G

    def lost(initial: lora_ops.init.Initial) -> float:
        return (G * (W - initial.weight.dequantize() - 2 * initial.lora_B @ initial.lora_A)).norm().item()

    weighted = lq_lora(W, 16, 2.0, G=G)
    assert lost(weighted) < lost(lq_lora(W, 16, 2.0)) < lost(lora_ops.init.loftq(W, 16, 2.0, loftq_iter=1))
    first = lq_lora(W, 16, 2.0, G=G, iterations=1)
    assert lost(weighted) < lost(first)
    # Of the last Q, no factors of rank 16 are nearer: the error is the tail of the weighted spectrum.
    Q = first.weight.dequantize()
    best = lora_ops.init.low_rank(W - Q, 16, rows.sqrt(), columns.sqrt())
    assert abs((G * (W - Q - (best[0] * best[1]) @ best[2])).norm() - torch.linalg.svdvals(G * (W - Q))[16:].norm()) < 1e-4


def test_lq_lora_of_a_model_stays_within_its_bits() -> None:
    model = nn.Sequential(gaussian((64, 64)), nn.Tanh(), gaussian((64, 64)), nn.Tanh(), gaussian((32, 64)))
    nn.init.normal_(model[2].weight, std=2.0)  # what quantising it loses counts
    batches = [torch.randn(40, 64) for _ in range(3)]
    elements = 64 * 64 * 2 + 64 * 32
    blocksizes = {}
    for bits in (4.3, 5.0):
        lora_ops.add_lora(model, lora_ops.LoraConfig(r=4, target_modules=["0", "2", "4"]))
        options = {"loss": lambda m, x: m(x).square().mean(), "quant": "nf4", "iterations": 3}
        lora_ops.init.initialize(model, "lq_lora", batches, bits=bits, **options)
        layers = [layer for _, layer in lora_ops.lora_layers(model)]
        used = sum(8 * layer.weight.nbytes for layer in layers)
        assert used <= bits * elements
        blocksizes[bits] = [layer.weight.blocksize for layer in layers]
        lora_ops.remove_lora(model)
    assert blocksizes[5.0] <= blocksizes[4.3]
    assert min(blocksizes[4.3]) < max(blocksizes[4.3])  # not all alike
    lora_ops.add_lora(model, lora_ops.LoraConfig(r=4, target_modules=["0", "2", "4"]))
    with pytest.raises(ValueError, match="budget must be at least"):
        lora_ops.init.initialize(model, "lq_lora", quant="nf4", bits=3.0)


def test_bits_are_allocated_as_full_enumeration_does() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        errors = torch.rand(4, 3, generator=g).tolist()
        bits = (torch.randint(1, 9, (4, 3), generator=g) * 4).tolist()
        least, most = sum(map(min, bits)), sum(map(max, bits))
        for budget in (least, (least + most) // 2, most):
            choice = allocate_bits(errors, bits, budget)
            assert sum(row[c] for row, c in zip(bits, choice, strict=True)) <= budget
            best = min(
                sum(row[c] for row, c in zip(errors, combination, strict=True))
                for combination in itertools.product(range(3), repeat=4)
                if sum(row[c] for row, c in zip(bits, combination, strict=True)) <= budget
            )
            assert abs(sum(row[c] for row, c in zip(errors, choice, strict=True)) - best) < 1e-12


def test_a_layer_in_4_bits_stays_in_its_format() -> None:
    base = linear()
    layer = started("pissa", base, quant="nf4", blocksize=32, double_quant=False)
    for weight in (layer.weight, layer.original_weight):
        assert isinstance(weight, NF4Weight)
        assert (weight.blocksize, weight.nested_absmax) == (32, None)
    expected = quantize_nf4(started("pissa", base).weight, 32, False)
    assert torch.equal(layer.weight.codes, expected.codes)
    x = torch.randn(5, K)
    y = layer(x)
    layer.disable_adapters()
    assert nearness(layer(x), started(True, base, quant="nf4", blocksize=32, double_quant=False)(x)) < 1e-6
    layer.enable_adapters()
    assert torch.equal(layer(x), y)
    assert isinstance(types.SimpleNamespace(w=layer.half().weight).w, NF4Weight)
    assert layer.original_weight.dtype == torch.float16


def test_what_repairs_quantisation_needs_the_weight_of_before() -> None:
    model = nn.Sequential(linear())
    lora_ops.add_lora(model, lora_ops.LoraConfig(r=R, target_modules=["0"]), quant="nf4")
    for init in ("loftq", "qpissa", "lqer", "lq_lora"):
        with pytest.raises(ValueError, match="the weight that was there before it was quantised"):
            lora_ops.init.initialize(model, init)
        with pytest.raises(ValueError, match="the weight that was there before it was quantised"):
            model[0].add_adapter("second", R, init_lora_weights=init)
    with pytest.raises(ValueError, match="quant must be None where weights are in 4 bits already, as in 0"):
        lora_ops.init.initialize(model, "pissa", quant="nf4")
