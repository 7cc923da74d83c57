"""What is timed against what: the same layer as a user would have it, five ways."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_ops

SCALING = 2.0


@dataclass(frozen=True)
class Case:
    M: int
    K: int
    N: int
    r: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    dropout: float = 0.0

    @property
    def name(self) -> str:
        dtypes = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        return f"{dtypes[self.dtype]} {self.M}x{self.K}x{self.N} r{self.r}" + (f" p{self.dropout}" if self.dropout else "")

    def flops(self, side: str, backward: bool) -> float:
        """Multiply-adds count two; the base product, and every low-rank product that the side computes."""
        base = 2.0 * self.M * self.K * self.N
        low = 0.0 if side == "linear" else 2.0 * self.M * self.r * (self.K + self.N)
        return base + low + (base + 2 * low if backward else 0.0)


def tensors(case: Case, backward: bool) -> tuple[Tensor, Tensor, nn.Linear, Tensor, Tensor]:
    """x, dy, the frozen layer, A and B."""
    torch.manual_seed(0)
    K, N, r = case.K, case.N, case.r
    x = torch.randn(case.M, K).to(case.dtype).requires_grad_(backward)
    dy = torch.randn(case.M, N).to(case.dtype)
    base = nn.Linear(K, N, bias=False, dtype=case.dtype).requires_grad_(False)
    A = (torch.randn(r, K) / K**0.5).to(case.adapter_dtype).requires_grad_(backward)
    B = torch.randn(N, r).to(case.adapter_dtype).requires_grad_(backward)
    return x, dy, base, A, B


def timed(
    forwards: dict[str, Callable[[], Tensor]], backward: bool, dy: Tensor, leaves: list[Tensor]
) -> dict[str, Callable[[], object]]:
    """What one turn runs: the forward without autograd, or forward and backward from fresh gradients."""

    def no_grad(forward: Callable[[], Tensor]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return forward()

        return run

    def step(forward: Callable[[], Tensor]) -> Callable[[], object]:
        def run() -> object:
            for leaf in leaves:
                leaf.grad = None
            return forward().backward(dy)

        return run

    return {name: (step if backward else no_grad)(forward) for name, forward in forwards.items()}


def sides(case: Case, backward: bool) -> dict[str, Callable[[], object]]:
    """`linear` is the bare frozen layer, without any adapter; `eager` LoRA in four lines of PyTorch; `peft` PEFT's layer."""
    x, dy, base, A, B = tensors(case, backward)

    def linear() -> Tensor:
        return F.linear(x, base.weight)

    def eager() -> Tensor:
        dropped = F.dropout(x.to(A.dtype), case.dropout, True) if case.dropout else x.to(A.dtype)
        return (F.linear(x, base.weight) + F.linear(F.linear(dropped, A), B) * SCALING).to(x.dtype)

    peft = peft_layer(base, case, A, B)

    def fused() -> Tensor:
        return lora_ops.lora_linear(x, base.weight, A, B, scaling=SCALING, dropout_p=case.dropout, training=True)

    forwards: dict[str, Callable[[], Tensor]] = {"linear": linear, "eager": eager, "peft": lambda: peft(x), "lora_ops": fused}
    if not backward:
        panels = lora_ops.pack_weight(base.weight, case.dtype)
        forwards["lora_ops prepack"] = lambda: lora_ops.lora_linear(x, base.weight, A, B, scaling=SCALING, panels=panels)
    return timed(forwards, backward, dy, [t for t in (x, A, B, *peft.parameters()) if t.requires_grad])


def peft_layer(base: nn.Linear, case: Case, A: Tensor, B: Tensor) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=case.r, lora_alpha=SCALING * case.r, lora_dropout=case.dropout, target_modules=["layer"], init_lora_weights=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = inject_adapter_in_model(config, nn.ModuleDict({"layer": base})).layer
    for module, value in ((layer.lora_A["default"], A), (layer.lora_B["default"], B)):
        module.weight = nn.Parameter(value.detach().clone(), requires_grad=A.requires_grad)
    return layer
