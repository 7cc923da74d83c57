"""A and B, a layer's own or shared by several, and what a layer puts between and around them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Factors, check_positive


class Pair(nn.Module):
    """A (r, K) and B (N, r). Layers that share one take its first K columns of A and first N rows of B.

    Args:
        lora_A, lora_B: of one dtype.
        train: which of the two train.

    Raises:
        ValueError: shapes that do not fit each other.
    """

    def __init__(self, lora_A: Tensor, lora_B: Tensor, *, train: Sequence[str] = ("lora_A", "lora_B")) -> None:
        super().__init__()
        if lora_A.dim() != 2 or lora_B.dim() != 2 or lora_A.shape[0] != lora_B.shape[1]:
            raise ValueError(
                f"lora_A must be (r, K) and lora_B (N, r), got shapes {tuple(lora_A.shape)} and {tuple(lora_B.shape)}"
            )
        self.lora_A = nn.Parameter(lora_A, requires_grad="lora_A" in train)
        self.lora_B = nn.Parameter(lora_B, requires_grad="lora_B" in train)

    @property
    def r(self) -> int:
        return self.lora_A.shape[0]

    @classmethod
    def seeded(cls, N: int, K: int, r: int, seed: int = 0, *, train: Sequence[str] = ()) -> "Pair":
        """A, then B, uniform in ±√(6 / fan in), K and r, from torch's CPU generator of that seed: PEFT's VeRA's.

        What does not train is in no state dict: the seed makes it again, the same on every device.
        """
        check_positive(N=N, K=K, r=r)
        generator = torch.Generator().manual_seed(seed)
        A, B = (torch.empty(shape).uniform_(-b, b, generator=generator) for shape, b in _kaiming((r, K), (N, r)))
        pair = cls(A, B, train=train)
        for name in {"lora_A", "lora_B"} - set(train):
            frozen = pair._parameters.pop(name)
            pair.register_buffer(name, frozen.detach(), persistent=False)  # type: ignore[union-attr]
        return pair


def _kaiming(*shapes: tuple[int, int]) -> list[tuple[tuple[int, int], float]]:
    """Each shape with the bound of Kaiming's uniform initialisation, gain √2."""
    return [(shape, math.sqrt(6 / shape[1])) for shape in shapes]


class Gated(nn.Module):
    """ΔW = diag(B_scale) B coreᵀ diag(gate) A: most of the family is a choice of what of this is there, shared, or trains.

    Args:
        pair: A and B; several layers may have the same one.
        N, K: of the layer, at most those of the pair. None: those of the pair.
        gate: (r,), between A and B.
        core: (r, r), after the gate: ((x Aᵀ) ∘ gate) core.
        B_scale: (N,), of B's rows: of the low-rank path alone, which it multiplies into B.
        out_scale: (N,), of the whole output but for the bias.
        train: which of the four train.

    Raises:
        ValueError: a shape that does not fit, by name.
    """

    gate: nn.Parameter | None  # (r,)
    core: nn.Parameter | None  # (r, r)
    B_scale: nn.Parameter | None  # (N,)
    out_scale: nn.Parameter | None  # (N,)

    def __init__(
        self,
        pair: Pair,
        N: int | None = None,
        K: int | None = None,
        *,
        gate: Tensor | None = None,
        core: Tensor | None = None,
        B_scale: Tensor | None = None,
        out_scale: Tensor | None = None,
        train: Sequence[str] = ("gate", "core", "B_scale", "out_scale"),
    ) -> None:
        super().__init__()
        r, of_pair = pair.r, (pair.lora_B.shape[0], pair.lora_A.shape[1])
        self.N, self.K = of_pair[0] if N is None else N, of_pair[1] if K is None else K
        if any(have < wanted for have, wanted in zip(of_pair, (self.N, self.K), strict=True)):
            raise ValueError(f"pair must be of at least the layer's (N, K) = {(self.N, self.K)}, got {of_pair}")
        self.whole = of_pair == (self.N, self.K)
        self.pair = pair
        shapes = {"gate": (r,), "core": (r, r), "B_scale": (self.N,), "out_scale": (self.N,)}
        for (name, shape), t in zip(shapes.items(), (gate, core, B_scale, out_scale), strict=True):
            if t is not None and t.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
            self.register_parameter(name, None if t is None else nn.Parameter(t, requires_grad=name in train))

    def forward(self, x: Tensor) -> Factors:
        A: Tensor = self.pair.lora_A
        B: Tensor = self.pair.lora_B
        if not self.whole:
            A, B = A[:, : self.K], B[: self.N]
        if self.B_scale is not None:
            B = B * self.B_scale[:, None]
        return Factors(A, B, self.gate, self.core, self.out_scale)
