"""Poly and MHR beside PEFT's, with the same parameters."""

import peft
import pytest
import torch
from tiny_models import llama, tokens
from torch import nn

from lora_ops.compose import PolyLinear, add_poly, set_task_ids

TARGETS = ["q_proj", "down_proj"]
TASKS = torch.tensor([2, 0, 2])


def both(n_splits: int) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = add_poly(llama(), TARGETS, n_tasks=3, n_skills=5, r=4, n_splits=n_splits)
    torch.manual_seed(0)
    config = peft.PolyConfig(task_type="CAUSAL_LM", target_modules=TARGETS, r=4, n_tasks=3, n_skills=5, n_splits=n_splits)
    theirs = peft.get_peft_model(llama(), config)
    ours = [m for m in model.modules() if isinstance(m, PolyLinear)]
    layers = [m for m in theirs.modules() if isinstance(m, peft.tuners.poly.layer.PolyLayer)]
    for mine, layer in zip(ours, layers, strict=True):
        for p in (layer.poly_lora_A["default"], layer.poly_lora_B["default"]):
            nn.init.normal_(p, std=0.3)
        nn.init.normal_(layer.poly_router["default"].module_logits)
        mine.module_logits.data = layer.poly_router["default"].module_logits.data.view(3, n_splits, 5).clone()
        mine.lora_A.data = layer.poly_lora_A["default"].data.permute(1, 3, 0, 2).flatten(2).contiguous()
        mine.lora_B.data = layer.poly_lora_B["default"].data.permute(1, 0, 3, 2).flatten(1, 2).contiguous()
    return model.eval(), theirs.eval()


@pytest.mark.parametrize("n_splits", [1, 4], ids=["Poly", "MHR"])
def test_outputs_are_peft_s(n_splits: int) -> None:
    model, theirs = both(n_splits)
    set_task_ids(model, TASKS)
    actual, expected = model(input_ids=tokens(), labels=tokens()), theirs(input_ids=tokens(), labels=tokens(), task_ids=TASKS)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-5)
    set_task_ids(model, torch.ones_like(TASKS))
    assert not torch.allclose(model(input_ids=tokens()).logits, actual.logits, rtol=1e-2)
    actual.loss.backward()
    expected.loss.backward()
    ours = next(m for m in model.modules() if isinstance(m, PolyLinear))
    layer = next(m for m in theirs.modules() if isinstance(m, peft.tuners.poly.layer.PolyLayer))
    logits_grad = layer.poly_router["default"].module_logits.grad.view_as(ours.module_logits)
    torch.testing.assert_close(ours.module_logits.grad, logits_grad, rtol=1e-3, atol=1e-6)
    B_grad = layer.poly_lora_B["default"].grad.permute(1, 0, 3, 2).flatten(1, 2)
    torch.testing.assert_close(ours.lora_B.grad, B_grad, rtol=1e-3, atol=1e-6)


def test_training_draws_weights_for_each_sequence() -> None:
    """As torch's generator has it; PEFT draws the same numbers."""
    model, theirs = both(1)
    model.train()
    theirs.train()
    set_task_ids(model, TASKS)
    torch.manual_seed(1)
    actual = model(input_ids=tokens()).logits
    torch.manual_seed(1)
    expected = theirs(input_ids=tokens(), task_ids=TASKS).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_starts_as_the_frozen_model() -> None:
    torch.manual_seed(0)
    model = llama()
    before = model(input_ids=tokens()).logits
    add_poly(model, TARGETS, n_tasks=3)
    set_task_ids(model, TASKS)
    torch.testing.assert_close(model(input_ids=tokens()).logits, before, rtol=1e-5, atol=1e-5)
    trained = {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "module_logits"}


def test_errors() -> None:
    model = llama()
    with pytest.raises(TypeError, match=r"must be an nn\.Linear, got Embedding"):
        PolyLinear(model.model.embed_tokens, 3)
    with pytest.raises(ValueError, match="n_splits must divide K = 32 and N = 32, got 5"):
        add_poly(model, ["q_proj"], 3, n_splits=5)
    with pytest.raises(ValueError, match=r"got \['nothing'\]"):
        add_poly(model, ["nothing"], 3)
    assert all(p.requires_grad for p in model.parameters())
    add_poly(model, ["q_proj"], 3)
    with pytest.raises(ValueError, match="one for each of 3 sequences, got None"):
        model(input_ids=tokens())
    set_task_ids(model, torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match=r"task_ids must be in \[0, 3\), got \[0, 1, 3\]"):
        model(input_ids=tokens())
