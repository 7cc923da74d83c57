"""Small networks with LoRA, plain or gated, and how they train."""

import copy

import torch
from torch import Tensor, nn

import lora_ops
from lora_ops.factors import Gated, Pair

F64 = torch.float64
WIDTHS = (12, 16, 16, 6)


def mlp(dtype: torch.dtype = F64) -> nn.Sequential:
    a, b, c, d = WIDTHS
    return nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, c), nn.Tanh(), nn.Linear(c, d)).to(dtype)


def gated(r: int = 4, dtype: torch.dtype = F64, **options) -> nn.Sequential:
    model = mlp(dtype).requires_grad_(False)
    for i in (0, 2, 4):
        K, N = model[i].in_features, model[i].out_features
        A, B = torch.randn(r, K, dtype=dtype) / K**0.5, torch.randn(N, r, dtype=dtype) / r**0.5
        model[i] = lora_ops.FactoredLinear(model[i], Gated(Pair(A, B), gate=torch.ones(r, dtype=dtype)), **options)
    return model


def plain(r: int = 4, dtype: torch.dtype = F64, *, trained: bool = True, **options) -> nn.Sequential:
    """`trained`: B is not zero."""
    config = lora_ops.LoraConfig(r=r, target_modules=["0", "2", "4"], **options)
    model = lora_ops.add_lora(mlp(dtype), config)
    for _, layer in lora_ops.lora_layers(model) if trained else ():
        for B in layer.lora_B.values():
            nn.init.normal_(B, std=0.3)
    return model


def layers(model: nn.Module) -> list:
    return [model[i] for i in (0, 2, 4)]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def batch(rows: int = 32, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, WIDTHS[0], dtype=dtype), torch.randn(rows, WIDTHS[-1], dtype=dtype)


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    x, y = data
    return (model(x) - y).square().mean()


def train(model, optimizer, data, steps: int, *methods, first: int = 1) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, data).backward()
        for m in methods:
            m.on_backward(step)
        optimizer.step()
        for m in methods:
            m.on_step(step)


def values(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy({name: p.detach() for name, p in model.named_parameters()})
