"""What a provider returns."""

from typing import NamedTuple

from torch import Tensor


class Factors(NamedTuple):
    """Of y = out_scale ∘ (x W0ᵀ + scaling · (((x Aᵀ) ∘ gate) core) Bᵀ) + bias, all but W0, scaling and bias."""

    lora_A: Tensor  # (r, K)  # noqa: N815
    lora_B: Tensor  # (N, r)  # noqa: N815
    gate: Tensor | None = None  # (r,), or (..., r) with the leading dimensions of x
    core: Tensor | None = None  # (r, r)
    out_scale: Tensor | None = None  # (N,)
