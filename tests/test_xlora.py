"""X-LoRA beside PEFT's, with the same parameters."""

from pathlib import Path

import peft
import pytest
import torch
from test_routing import two_adapters
from tiny_models import llama, tokens
from torch import nn

from lora_ops import lora_layers, save_adapter
from lora_ops.compose import XLoraRouter, add_xlora, last_hidden_state, set_adapter_gate

OPTIONS = [
    {},
    {"layerwise_scalings": True, "softmax_temperature": 0.5},
    {"xlora_depth": 3, "xlora_size": 16, "global_scaling_weight": 1.5},
    {"layerwise_scalings": True, "top_k_lora": 1},
    {"top_k_lora": 1, "enable_softmax_topk": True, "enable_softmax": False},
    {"scaling_pass_value": 0.7, "layerwise_scalings": True},
]


def both(tmp_path: Path, **options) -> tuple[nn.Module, nn.Module]:
    """Ours and PEFT's. PEFT calls its adapters "0" and "1"."""
    torch.manual_seed(0)
    model = two_adapters(llama())
    folders = {str(i): save_adapter(model, tmp_path, name) for i, name in enumerate(("default", "other"))}
    torch.manual_seed(0)
    base = llama()
    base.config.use_cache = False
    adapters = {name: str(folder) for name, folder in folders.items()}
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=adapters, **options)
    theirs = peft.get_peft_model(base, config)
    add_xlora(model, ["default", "other"], **options)
    classifier = theirs.base_model.internal_xlora_classifier
    for ours, other in zip(model.lora_router.layers.parameters(), classifier.layers.parameters(), strict=True):
        nn.init.normal_(other, std=0.5)
        ours.data.copy_(other)
    return model.eval(), theirs.eval()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_outputs_are_peft_s(tmp_path: Path, options: dict) -> None:
    model, theirs = both(tmp_path, **options)
    batch = {"input_ids": tokens(), "labels": tokens()}
    actual, expected = model(**batch), theirs(**batch)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-5)
    if options.get("top_k_lora") == 1 and options.get("enable_softmax_topk"):
        return  # a softmax of one weight has no gradient
    actual.loss.backward()
    expected.loss.backward()
    classifier = theirs.base_model.internal_xlora_classifier
    for ours, other in zip(model.lora_router.layers.parameters(), classifier.layers.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-3, atol=1e-6)
        assert ours.grad.abs().sum() > 0


def test_the_gate_is_the_router_s(tmp_path: Path) -> None:
    """Token by token, of hidden states without adapters."""
    model, _ = both(tmp_path, layerwise_scalings=True)
    model(input_ids=tokens())
    hidden = last_hidden_state(model, input_ids=tokens())
    scalings = model.lora_router.scalings(hidden)
    layers = [layer for _, layer in lora_layers(model)]
    assert scalings.shape == (*tokens().shape, len(layers), 2)
    for i, layer in enumerate(layers):
        assert torch.equal(layer.adapter_gate, scalings[..., i, :])
    torch.testing.assert_close(scalings.sum(-1), torch.ones_like(scalings[..., 0]))
    assert (scalings[:, 0] - scalings[:, 1]).abs().max() > 1e-3


def test_a_certain_classifier_chooses_one_adapter(tmp_path: Path) -> None:
    model, _ = both(tmp_path)
    (last,) = model.lora_router.layers
    nn.init.zeros_(last.weight)
    last.bias.data.copy_(torch.tensor([-1e4, 1e4]))
    routed = model(input_ids=tokens()).logits
    model.lora_router = None
    model._forward_pre_hooks.clear()
    set_adapter_gate(model, torch.tensor([0.0, 1.0]))
    assert torch.equal(routed, model(input_ids=tokens()).logits)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"xlora_depth": 0}, "xlora_depth must be an integer >= 1, got 0"),
        ({"top_k_lora": 3}, r"top_k_lora must be in \[1, 2\]"),
        ({"softmax_temperature": 0.0}, "softmax_temperature must be positive"),
    ],
    ids=str,
)
def test_errors(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        XLoraRouter(32, 2, 4, **options)
