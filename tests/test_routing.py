"""A gate for each adapter and row in all layers of a model, and routers that compute it."""

import copy

import pytest
import torch
from tiny_models import K, N, injected, llama, make_layer, make_x, tokens
from torch import Tensor, nn

from lora_ops import LoraConfig, add_adapter, lora_layers, set_adapter
from lora_ops.compose import add_router, mean_hidden_state, remove_router, set_adapter_gate

F64 = torch.float64


def two_adapters(model: nn.Module, r: int = 3) -> nn.Module:
    """The model with adapters "default" and "other", of different ranks and scalings, in its linear layers."""
    injected(model)
    add_adapter(model, LoraConfig(r=r, lora_alpha=7, init_lora_weights=False, target_modules="all-linear"), "other")
    set_adapter(model, ["default", "other"])
    return model


class Fixed(nn.Module):
    """A router that says the same in every forward."""

    def __init__(self, gate: Tensor) -> None:
        super().__init__()
        self.gate = nn.Parameter(gate)

    def forward(self, model: nn.Module, *args: object, **kwargs: object) -> Tensor:
        return self.gate


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=tokens()).logits


@pytest.mark.parametrize("r", [5, 3], ids=lambda r: f"r={r} beside 5")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_gate_weighs_each_row_of_each_adapter(r: int, dropout: float) -> None:
    torch.manual_seed(0)
    layer = make_layer(F64)
    layer.add_adapter("other", r, lora_alpha=7, lora_dropout=dropout, init_lora_weights=False)
    layer.set_adapter(["default", "other"])
    x = torch.randn(4, 6, K, dtype=F64, requires_grad=True)
    gate = torch.rand(4, 6, 2, dtype=F64, requires_grad=True)
    layer.eval()
    layer.adapter_gate = gate
    y = layer(x)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    for k, name in enumerate(layer.active_adapters):
        expected = expected + gate[..., k : k + 1] * layer.scaling[name] * (x @ layer.lora_A[name].T @ layer.lora_B[name].T)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    wanted = [x, gate, *layer.lora_A.values(), *layer.lora_B.values()]
    upstream = torch.randn_like(y)
    for actual, exact in zip(
        torch.autograd.grad(y, wanted, upstream), torch.autograd.grad(expected, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(actual, exact, rtol=1e-11, atol=1e-11)


def test_each_adapter_s_mask_is_weighed() -> None:
    """An adapter that draws a mask of its own is added apart from the others, gate and all."""
    torch.manual_seed(0)
    layer = make_layer(F64)
    layer.add_adapter("other", 3, lora_dropout=0.5, init_lora_weights=False)
    layer.set_adapter(["default", "other"])
    x = make_x(F64)
    of_both = torch.rand(len(x), 2, dtype=F64)
    layer.adapter_gate = of_both
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    for k, (name, seen) in enumerate((("default", x), ("other", dropped))):
        expected = expected + of_both[:, k : k + 1] * layer.scaling[name] * (seen @ layer.lora_A[name].T @ layer.lora_B[name].T)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_one_hot_gates_are_the_adapters() -> None:
    torch.manual_seed(0)
    model = two_adapters(llama().to(F64))
    one_hot = torch.eye(2, dtype=F64)[torch.tensor([1, 0, 1])][:, None]
    set_adapter_gate(model, one_hot)
    mixed = logits(model)
    set_adapter_gate(model, torch.zeros(2, dtype=F64))
    none = logits(model)
    alone = {}
    for name in ("default", "other"):
        set_adapter(model, name)
        assert all(layer.adapter_gate is None for _, layer in lora_layers(model))
        alone[name] = logits(model)
    expected = torch.stack([alone["other"][0], alone["default"][1], alone["other"][2]])
    torch.testing.assert_close(mixed, expected, rtol=1e-11, atol=1e-11)
    set_adapter(model, [])
    torch.testing.assert_close(none, logits(model), rtol=1e-11, atol=1e-11)
    assert not torch.allclose(alone["other"], alone["default"], rtol=1e-3)


def test_a_router_trains_alone_or_beside_the_adapters() -> None:
    for train in (False, True):
        torch.manual_seed(0)
        model = two_adapters(llama())
        add_router(model, ["other", "default"], Fixed(torch.tensor([0.3, 0.6])), train_adapters=train)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert ("lora_router.gate" in trained) and (len(trained) > 1) == train
        logits(model).square().mean().backward()
        assert model.lora_router.gate.grad.abs().min() > 0
        assert {name for name, p in model.named_parameters() if p.grad is not None} == trained


def test_removing_a_router_leaves_nothing() -> None:
    torch.manual_seed(0)
    model = two_adapters(llama())
    before, keys = logits(model), model.state_dict().keys()
    add_router(model, ["default", "other"], Fixed(torch.tensor([0.3, 0.6])))
    assert "lora_router.gate" in model.state_dict()
    assert not torch.allclose(logits(model), before)
    remove_router(model)
    assert model.state_dict().keys() == keys
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="no router"):
        remove_router(model)


def test_checkpointing_computes_with_the_same_gate() -> None:
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = two_adapters(llama()).train()
        add_router(model, ["default", "other"], Fixed(torch.tensor([0.3, 0.6])), train_adapters=True)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        logits(model).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(grads[1], grads[0])


def test_copies_route_by_their_own_router() -> None:
    torch.manual_seed(0)
    model = two_adapters(llama())
    add_router(model, ["default", "other"], Fixed(torch.tensor([0.3, 0.6])))
    before = logits(model)  # leaves gates that hang in a graph
    other = copy.deepcopy(model)
    nn.init.zeros_(other.lora_router.gate)
    assert not torch.allclose(logits(other), before)
    assert torch.equal(logits(model), before)


def test_generate_asks_the_router_for_every_token() -> None:
    torch.manual_seed(0)
    model = two_adapters(llama()).eval()
    add_router(model, ["default", "other"], Fixed(torch.tensor([0.3, 0.6])))
    prompt, options = tokens()[:, :5], {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(prompt, use_cache=False, **options)
    expected = prompt
    for _ in range(3):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, expected)
    with pytest.raises(ValueError, match="use_cache must be False"):
        model.generate(prompt, use_cache=True, **options)


def test_the_mean_of_hidden_states_leaves_padding_out() -> None:
    torch.manual_seed(0)
    model = two_adapters(llama()).eval()
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    full = mean_hidden_state(model, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(full[0], mean_hidden_state(model, input_ids=ids[:1, :9])[0], rtol=1e-4, atol=1e-5)
    assert not full.requires_grad


def test_errors() -> None:
    torch.manual_seed(0)
    model = two_adapters(llama())
    n = len(list(lora_layers(model)))
    with pytest.raises(ValueError, match=r"n = 2, the active adapters of .*got \(3,\)"):
        set_adapter_gate(model, torch.ones(3))
    with pytest.raises(ValueError, match=f"one for each of {n} layers, got 1"):
        set_adapter_gate(model, [torch.ones(2)])
    with pytest.raises(ValueError, match="'third'"):
        add_router(model, ["default", "third"], nn.Identity())
    assert not hasattr(model, "lora_router")
    add_router(model, ["default"], nn.Identity())
    with pytest.raises(ValueError, match="a router already"):
        add_router(model, ["default"], nn.Identity())
    with pytest.raises(ValueError, match="DoRA"):
        add_router(injected(llama(), use_dora=True), ["default"], nn.Identity())
    with pytest.raises(TypeError, match=r"FusedLoraEmbedding in model.embed_tokens"):
        add_router(injected(llama(), target_modules=["embed_tokens"]), ["default"], nn.Identity())
    with pytest.raises(ValueError, match="no layer with LoRA"):
        set_adapter_gate(nn.Linear(K, N), None)
