"""What study.py trains: how each method is set up with lora_ops, one entry each, and the one training loop for all of them."""

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import lora_ops
from lora_ops import factors, methods, optim
from lora_ops.init import initialize

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass
class Setup:
    """What a method is told."""

    targets: str  # regular expression of the layers' names
    steps: int
    batches: Sequence[Any]  # that an initialisation may look at
    loss: Loss
    r: int = 8
    alpha: float = 16
    rank_pattern: dict[str, int] = field(default_factory=dict)
    vera_r: int = 256


@dataclass
class Start:
    """What a method asks of the training loop."""

    around: methods.TrainingMethod = field(default_factory=methods.TrainingMethod)
    ratio: float = 1.0  # learning rate of B over that of A


def lora(model: nn.Module, s: Setup, **options: Any) -> Start:
    config = lora_ops.LoraConfig(r=s.r, lora_alpha=s.alpha, target_modules=s.targets, rank_pattern=s.rank_pattern, **options)
    lora_ops.add_lora(model, config)
    return Start()


def lora_plus(model: nn.Module, s: Setup) -> Start:
    lora(model, s)
    return Start(ratio=16)


def lora_ga(model: nn.Module, s: Setup, use_rslora: bool = True, **options: Any) -> Start:
    lora(model, s, use_rslora=use_rslora)
    initialize(model, "lora_ga", s.batches, loss=s.loss, **options)
    return Start()


def vera(model: nn.Module, s: Setup) -> Start:
    shared = factors.Pair.seeded(*factors.widest(targeted(model, s)), r=s.vera_r)
    lora_ops.add_factors(model, lambda name, linear: factors.vera(linear, shared), target_modules=s.targets)
    return Start()


def lora_fa(model: nn.Module, s: Setup) -> Start:
    lora(model, s)
    return Start(optim.LoraFA(model))


def adalora(model: nn.Module, s: Setup) -> Start:
    """From 1.5 r to r."""
    r = s.r * 3 // 2
    lora_ops.add_factors(
        model,
        lambda name, linear: factors.gated(linear, r, gate=0.0, std=0.02, zero_B=False),
        target_modules=s.targets,
        scaling=s.alpha / r,
    )
    return Start(methods.adalora(model, s.r, s.steps, initial=s.steps // 10, final=s.steps // 3))


def full(model: nn.Module, s: Setup) -> Start:
    """The weights of the layers that the others adapt."""
    model.requires_grad_(False)
    for linear in targeted(model, s):
        linear.weight.requires_grad_(True)
    return Start()


def one_factor(model: nn.Module, s: Setup, init: str, frozen: str) -> Start:
    lora(model, s, init_lora_weights=init)
    optim.freeze(model, frozen)
    return Start()


METHODS: dict[str, Callable[[nn.Module, Setup], Start]] = {
    "full": full,
    "LoRA": lora,
    "rsLoRA": lambda model, s: lora(model, s, use_rslora=True),
    "LoRA+": lora_plus,
    "LoRA-GA": lora_ga,
    "PiSSA": lambda model, s: lora(model, s, init_lora_weights="pissa"),
    "MiLoRA": lambda model, s: lora(model, s, init_lora_weights="milora"),
    "OLoRA": lambda model, s: lora(model, s, init_lora_weights="olora"),
    "DoRA": lambda model, s: lora(model, s, use_dora=True),
    "VeRA": vera,
    "LoRA-FA": lora_fa,
    "AdaLoRA": adalora,
}
# Of single claims: other first values, and training one factor alone.
VARIANTS: dict[str, Callable[[nn.Module, Setup], Start]] = {
    "Gaussian": lambda model, s: lora(model, s, init_lora_weights="gaussian"),
    "Init[A]": lambda model, s: lora(model, s, init_lora_weights="init_a"),
    "Init[B]": lambda model, s: lora(model, s, init_lora_weights="init_b"),
    "+SO": lambda model, s: lora(model, s, init_lora_weights="offset", use_rslora=True),
    "+GA": lambda model, s: lora_ga(model, s, use_rslora=False, scale="unit"),
    "A only": lambda model, s: one_factor(model, s, "init_b", "lora_B"),
    "B only": lambda model, s: one_factor(model, s, "init_a", "lora_A"),
}


def targeted(model: nn.Module, s: Setup) -> list[nn.Linear]:
    return [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(s.targets, name)]


def start(model: nn.Module, method: str, s: Setup) -> tuple[Start, float]:
    """Changes the model into that of the method; and the CPU seconds that it took."""
    begin = time.process_time()
    begun = (METHODS | VARIANTS)[method](model, s)
    return begun, time.process_time() - begin


def train(
    model: nn.Module,
    begun: Start,
    lr: float,
    batches: Iterable[Any],
    loss: Loss,
    each: Callable[[int], None] = lambda step: None,
) -> dict[str, Any]:
    """AdamW without decay. A loss that is not finite ends the run.

    Args:
        each: is called after every backward.

    Returns:
        losses, of every step; gradient, the norm at the first step; params; saved_kib, what the first forward keeps for its
        backward, parameters aside; train_s, CPU seconds.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    # Ratio 1 is plain AdamW.
    optimizer = torch.optim.AdamW(optim.loraplus_groups(model, lr, begun.ratio), weight_decay=0.0)
    begun.around.attach(optimizer)
    found: dict[str, Any] = {"params": sum(p.numel() for p in trained)}
    losses: list[float] = []
    model.train()
    begin = time.process_time()
    for step, batch in enumerate(batches, start=1):
        saved = Saved(model) if step == 1 else None
        value = loss(model, batch) if saved is None else saved.during(lambda batch=batch: loss(model, batch))
        losses.append(value.item())
        if not torch.isfinite(value):
            break
        value.backward()
        if saved is not None:
            found["saved_kib"] = saved.nbytes / 1024
            found["gradient"] = sum(float(p.grad.double().square().sum()) for p in trained if p.grad is not None) ** 0.5
        each(step)
        begun.around.on_backward(step)
        optimizer.step()
        begun.around.on_step(step)
        optimizer.zero_grad()
    return found | {"losses": losses, "train_s": time.process_time() - begin}


class Saved:
    """Counts the memory of tensors that a forward keeps for the backward, each once, without parameters and buffers."""

    def __init__(self, model: nn.Module) -> None:
        self.seen = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.kept: list[Tensor] = []  # while they live no address is used twice
        self.nbytes = 0

    def during(self, forward: Callable[[], Tensor]) -> Tensor:
        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in self.seen:
                self.seen.add(storage.data_ptr())
                self.kept.append(t.detach())
                self.nbytes += storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            return forward()
