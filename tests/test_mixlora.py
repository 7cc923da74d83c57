"""MixLoRA's blocks beside their experts, written out."""

import pytest
import torch
from tiny_models import bert, injected, llama, tokens
from torch import Tensor, nn

from lora_ops import LoraConfig, add_lora
from lora_ops.compose import MixLoraFFN, add_mixlora, balance_of, load_balancing_loss

F64 = torch.float64
EXPERTS, R = 5, 3


def block(top_k: int = 2) -> MixLoraFFN:
    torch.manual_seed(0)
    mlp = llama().to(F64).model.layers[0].mlp
    ffn = MixLoraFFN(mlp, EXPERTS, top_k, R, lora_alpha=2.0, lora_dropout=0.0).to(F64)
    for p in [*ffn.lora_B.values(), ffn.router]:
        nn.init.normal_(p)
    return ffn


def expert(ffn: MixLoraFFN, e: int, x: Tensor) -> Tensor:
    def layer(name: str, x: Tensor) -> Tensor:
        W = getattr(ffn.mlp, name).weight + ffn.scaling * ffn.lora_B[name][e] @ ffn.lora_A[name][e]
        return x @ W.T

    return layer("down_proj", nn.functional.silu(layer("gate_proj", x)) * layer("up_proj", x))


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_is_the_weighted_sum_of_its_experts(top_k: int) -> None:
    ffn = block(top_k)
    x = torch.randn(2, 7, 32, dtype=F64, requires_grad=True)
    p = (x @ ffn.router.T).softmax(-1)
    kept = torch.zeros_like(p).scatter(-1, p.topk(top_k).indices, 1.0)
    g = p * kept / (p * kept).sum(-1, keepdim=True)
    expected = sum(g[..., e : e + 1] * expert(ffn, e, x) for e in range(EXPERTS))
    y = ffn(x)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    trained = [x, *(p for p in ffn.parameters() if p.requires_grad)]
    upstream = torch.randn_like(y)
    actual, exact = (torch.autograd.grad(out, trained, upstream) for out in (y, expected))
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)
    chosen = p.topk(top_k).indices
    torch.testing.assert_close(ffn.balance, load_balancing_loss(p, chosen), rtol=1e-12, atol=0)


def test_one_expert_is_an_adapted_block() -> None:
    torch.manual_seed(0)
    model = llama().to(F64)
    mlp = model.model.layers[0].mlp
    ffn = MixLoraFFN(mlp, 1, 1, R, lora_dropout=0.0).to(F64)
    x = torch.randn(7, 32, dtype=F64)
    torch.testing.assert_close(ffn(x), mlp(x), rtol=1e-12, atol=1e-12)
    nn.init.normal_(ffn.lora_B["down_proj"])
    torch.testing.assert_close(ffn(x), expert(ffn, 0, x), rtol=1e-12, atol=1e-12)


def test_a_model_starts_as_it_was_and_trains_its_experts() -> None:
    torch.manual_seed(0)
    model = llama()
    add_lora(model, LoraConfig(target_modules=["q_proj"]))
    before = model(input_ids=tokens()).logits
    add_mixlora(model, 4, lora_dropout=0.0)
    torch.testing.assert_close(model(input_ids=tokens()).logits, before, rtol=1e-5, atol=1e-5)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[3] for name in trained} == {"self_attn", "mlp"}
    assert not any("gate_proj.weight" in name for name in trained)
    loss = model(input_ids=tokens(), labels=tokens()).loss + 0.001 * balance_of(model)
    loss.backward()
    assert all(m.router.grad.abs().sum() > 0 for m in model.modules() if isinstance(m, MixLoraFFN))


def test_half_precision() -> None:
    torch.manual_seed(0)
    model = add_mixlora(llama().bfloat16(), 4)
    model(input_ids=tokens(), labels=tokens()).loss.backward()


def test_errors() -> None:
    mlp = llama().model.layers[0].mlp
    with pytest.raises(ValueError, match=r"top_k must be in \[1, 2\]"):
        MixLoraFFN(mlp, 2, 3)
    with pytest.raises(ValueError, match="mlp must have gate_proj"):
        MixLoraFFN(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="BertForSequenceClassification has none"):
        add_mixlora(bert())
    with pytest.raises(ValueError, match="LlamaForCausalLM has none"):
        add_mixlora(injected(llama()))
