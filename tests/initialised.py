"""What the tests of initialisations share: layers that begin in some way, and PEFT's that begin in the same."""

import copy
import warnings
from typing import Any

import peft
import torch
from torch import Tensor, nn

from lora_ops import FusedLoraLinear

K, N, R = 48, 40, 4
F64 = torch.float64


def linear(dtype: torch.dtype = torch.float32, seed: int = 0, size: tuple[int, int] = (N, K)) -> nn.Linear:
    """With a spectrum that falls, as that of trained weights does."""
    g = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(n, min(size), generator=g, dtype=F64)).Q for n in size)
    layer = nn.Linear(size[1], size[0]).to(dtype)
    S = 2 * torch.arange(1, min(size) + 1, dtype=F64) ** -0.5
    layer.weight.data = ((U * S) @ V.T).to(dtype)
    return layer


def started(init: bool | str, base: nn.Linear | None = None, **options: Any) -> FusedLoraLinear:
    """A layer of ours with scaling 1.5."""
    return FusedLoraLinear.from_linear(base or linear(), R, lora_alpha=1.5 * R, init_lora_weights=init, **options)


def started_as_peft_s(init: str, base: nn.Linear, seed: int = 0) -> FusedLoraLinear:
    """`started` from the random numbers that are left when PEFT has made its two layers."""
    torch.manual_seed(seed)
    nn.Linear(K, R, bias=False)
    nn.Linear(R, N, bias=False)
    return started(init, base)


def product(layer: FusedLoraLinear) -> Tensor:
    """scaling · B A."""
    return layer.delta_weight("default")


def with_peft(model: nn.Module, seed: int = 0, **options: Any) -> Any:
    """PEFT's model, whose random numbers begin with `seed`."""
    config = peft.LoraConfig(**{"r": R, "lora_alpha": 1.5 * R, "target_modules": ["0"], **options})
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(copy.deepcopy(model), config)


def peft_layer(model: Any, name: str = "0") -> tuple[Tensor, Tensor, Tensor]:
    """Its weight, A and B."""
    layer = model.base_model.model.get_submodule(name)
    tensors = layer.get_base_layer().weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return tuple(t.detach() for t in tensors)  # type: ignore[return-value]


def nearness(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def same_up_to_signs(ours: Tensor, theirs: Tensor) -> float:
    """`nearness` of matrices (r, K) whose rows may have either sign."""
    signs = (ours.double() * theirs.double()).sum(1, keepdim=True).sign()
    return nearness(ours * signs, theirs)


def alignment(ours: Tensor, theirs: Tensor) -> float:
    """The cosine of the largest angle between the row spaces of two matrices (r, K)."""
    Q, P = (torch.linalg.qr(t.double().T).Q for t in (ours, theirs))
    return torch.linalg.svdvals(Q.T @ P).min().item()
