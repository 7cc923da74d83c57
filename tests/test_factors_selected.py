"""MixLoRA: factors that each instance selects."""

import pytest
import torch
from factored_layers import N, assert_close, factored, fresh, is_base, linear, make_x, trainable

from lora_ops import factors

E, R = 6, 3


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("leading", [(4, 5), (2, 3, 5)], ids=str)
def test_mixlora_is_the_lora_of_each_instance_s_selection(leading, scored):
    layer = factored(lambda base: factors.MixLora(base, E, R, scored=scored))
    f, x = layer.factors, make_x(*leading)
    y = layer(x)
    chosen = set()
    for n in range(len(x)):
        mean = x[n].flatten(0, -2).mean(0)
        logits_A = f.router_A(mean)
        i = logits_A.topk(R).indices
        from_A = sum((f.router_AB[k] @ f.lora_A[i[k]]).softmax(-1) for k in range(R))
        logits_B = f.router_B(mean).softmax(-1) + from_A.softmax(-1)
        j = logits_B.topk(R).indices
        A, B = f.lora_A[i], f.lora_B[:, j]
        if scored:
            A, B = A * logits_A[i].softmax(-1)[:, None], B * logits_B[j].softmax(-1)
        assert_close(y[n], x[n] @ (layer.weight + layer.scaling * B @ A).T + layer.bias)
        chosen.add((*i.tolist(), *j.tolist()))
    assert len(chosen) > 1
    y.square().sum().backward()
    assert all((p.grad is not None and p.grad.abs().max() > 0) == scored for p in f.router_A.parameters())
    assert f.lora_A.grad.abs().max() > 0 and f.lora_B.grad.abs().max() > 0


def test_a_router_that_always_chooses_the_same_is_a_lora():
    layer = factored(lambda base: factors.MixLora(base, R, R))
    f, x = layer.factors, make_x(3, 5)
    with torch.no_grad():  # one expert more or less likely than another whatever x is
        for router in (f.router_A, f.router_B):
            router.weight.zero_()
        f.router_AB.zero_()
    (order_A, _), (order_B, _) = f.select(x[:1])
    delta = f.lora_B[:, order_B[0]] @ f.lora_A[order_A[0]]
    assert_close(layer(x), x @ (layer.weight + layer.scaling * delta).T + layer.bias)


def test_mixlora_has_no_merged_weight():
    layer = fresh(lambda base: factors.MixLora(base, E, R))
    assert trainable(layer.factors).keys() == {"lora_A", "lora_B", "router_A.weight", "router_B.weight", "router_AB"}
    x = make_x(2, 3)
    assert_close(layer(x).detach(), x @ layer.weight.T + layer.bias)  # B = 0
    with pytest.raises(ValueError, match="each instance selects its own factors"):
        is_base(layer)
    assert not layer.merged
    with pytest.raises(ValueError, match="r must be at most experts = 6, got 7"):
        factors.MixLora(linear(), 6, 7)


def test_no_instances():
    layer = factored(lambda base: factors.MixLora(base, E, R))
    for leading in [(0, 5), (2, 0), (2, 1)]:
        assert layer(make_x(*leading)).shape == (*leading, N)
