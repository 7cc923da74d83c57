"""Adapters by nearness to the data that they were trained on."""

import math

import pytest
import torch
from test_routing import logits, two_adapters
from tiny_models import llama, tokens

from lora_ops import AdapterBank, lora_layers, multi_lora_linear, set_adapter
from lora_ops.compose import CentroidRouter, PrototypeRouter, add_router, kmeans, mean_hidden_state, remove_router

F64 = torch.float64


def test_token_level_weights() -> None:
    """softmax of cosines of which the largest alone is multiplied."""
    e = torch.tensor([3.0, 4.0], dtype=F64)
    centroids = torch.tensor([[10.0, 0.0], [0.0, 2.0], [-1.0, 0.0]], dtype=F64)
    parts = [math.exp(0.6), math.exp(4.0 * 0.8), math.exp(-0.6)]
    expected = torch.tensor(parts, dtype=F64) / sum(parts)
    torch.testing.assert_close(CentroidRouter(centroids).weights(e), expected, rtol=1e-12, atol=0)
    parts[1] = math.exp(2.0 * 0.8)
    expected = torch.tensor(parts, dtype=F64) / sum(parts)
    torch.testing.assert_close(CentroidRouter(centroids, temperature=2.0).weights(e[None])[0], expected, rtol=1e-12, atol=0)
    assert CentroidRouter(centroids[:1]).weights(-e) == 1.0


def test_token_level_weighs_each_sequence() -> None:
    torch.manual_seed(0)
    model = two_adapters(llama().to(F64))
    features = mean_hidden_state(model, input_ids=tokens())
    router = CentroidRouter(features[:2])
    add_router(model, ["default", "other"], router)
    routed = logits(model)
    weights = router.weights(features)
    assert weights[0, 0] > 0.8
    assert weights[1, 1] > 0.8
    remove_router(model)
    for i in range(3):
        for _, layer in lora_layers(model):
            layer.adapter_gate = weights[i]
        torch.testing.assert_close(routed[i], model(input_ids=tokens()[i : i + 1]).logits[0], rtol=1e-10, atol=1e-10)


def test_one_adapter_is_added_whole() -> None:
    torch.manual_seed(0)
    model = two_adapters(llama().to(F64))
    set_adapter(model, "other")
    alone = logits(model)
    add_router(model, ["other"], CentroidRouter(torch.randn(1, 32, dtype=F64)))
    torch.testing.assert_close(logits(model), alone, rtol=1e-11, atol=1e-11)


def test_prototypes_choose_as_a_mixed_batch() -> None:
    """Each sequence has the adapter with the nearest prototype, whole, as `multi_lora_linear` gives it to its rows."""
    torch.manual_seed(0)
    model = two_adapters(llama().to(F64))
    features = mean_hidden_state(model, input_ids=tokens())
    far = torch.full((1, 32), 100.0, dtype=F64)
    router = PrototypeRouter([torch.cat([far, features[1:2]]), torch.cat([features[2:], -far, features[:1]])])
    assert router.select(features + 1e-3).tolist() == [1, 0, 1]
    add_router(model, ["default", "other"], router)
    seen = {}
    _, layer = next(iter(lora_layers(model)))
    handle = layer.register_forward_hook(lambda _, args, y: seen.update(x=args[0], y=y))
    logits(model)
    handle.remove()
    bank = AdapterBank()
    for adapter in ("default", "other"):
        bank.add(adapter, layer.lora_A[adapter], layer.lora_B[adapter], layer.scaling[adapter])
    expected = multi_lora_linear(seen["x"], layer.weight, bank, ["other", "default", "other"])
    torch.testing.assert_close(seen["y"], expected, rtol=1e-11, atol=1e-11)


def test_kmeans_finds_clusters() -> None:
    g = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    features = centres.repeat(20, 1) + torch.randn(60, 2, generator=g) * 0.1
    found = kmeans(features, 3, generator=g)
    means = torch.stack([features[i::3].mean(0) for i in range(3)])
    order = torch.cdist(means, found).argmin(-1)
    assert sorted(order.tolist()) == [0, 1, 2]
    torch.testing.assert_close(found[order], means)
    assert torch.equal(kmeans(features[:1].repeat(4, 1), 3), features[:1].repeat(3, 1))
    with pytest.raises(ValueError, match=r"k must be in \[1, 60\]"):
        kmeans(features, 61)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"got shape \(4,\)"):
        CentroidRouter(torch.ones(4))
    with pytest.raises(ValueError, match=r"got \[\(2, 4\), \(2, 5\)\]"):
        PrototypeRouter([torch.ones(2, 4), torch.ones(2, 5)])
