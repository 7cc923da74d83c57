"""Several adapters of one layer as one: Σ_i scaling_i · B_i A_i = scaling · [B_1 B_2 ...] [A_1; A_2; ...]."""

from collections.abc import Sequence

import torch
from torch import Tensor


def stack(
    lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor], scalings: Sequence[float | Tensor]
) -> tuple[Tensor, Tensor, float]:
    """The adapter whose ΔW is the sum of the given ones', its rank the sum of theirs. Differentiable.

    Args:
        lora_As: A_i, (r_i, K).
        lora_Bs: B_i, (N, r_i).
        scalings: of each, numbers or tensors without dimensions. Where all are the same number it stays one; otherwise each
            is multiplied into its B, in fp32 at least, so that no value of a scaling decides what is computed.

    Returns:
        A (Σ r_i, K), B (N, Σ r_i) and the scaling. One adapter with a number is returned as it is.
    """
    if len(lora_As) == 1 and lora_As[0].dtype == lora_Bs[0].dtype and not isinstance(scalings[0], Tensor):
        return lora_As[0], lora_Bs[0], float(scalings[0])
    with torch.autocast(lora_As[0].device.type, enabled=False):  # under which parameters of two dtypes cannot be put together
        return _stacked(lora_As, lora_Bs, scalings)


def rank_gate(gate: Tensor, ranks: Sequence[int]) -> Tensor:
    """Of a factor for each adapter, (..., n), that for each rank of what `stack` makes of them, (..., Σ r_i)."""
    if len(set(ranks)) == 1:  # repeat_interleave is an order of magnitude slower on a CPU
        return gate.unsqueeze(-1).expand(*gate.shape, ranks[0]).flatten(-2)
    columns = gate.split(1, dim=-1)
    return torch.cat([column.expand(*gate.shape[:-1], r) for column, r in zip(columns, ranks, strict=True)], dim=-1)


def _stacked(
    lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor], scalings: Sequence[float | Tensor]
) -> tuple[Tensor, Tensor, float]:
    first = scalings[0]
    if not any(isinstance(s, Tensor) for s in scalings) and all(s == first for s in scalings):
        scaling = float(first)
    else:
        wide = torch.promote_types(lora_Bs[0].dtype, torch.float32)
        lora_Bs, scaling = [B.to(wide) * s for B, s in zip(lora_Bs, scalings, strict=True)], 1.0
    if len(lora_As) == 1:
        A, B = lora_As[0], lora_Bs[0]
    else:
        A, B = torch.cat(list(lora_As)), torch.cat(list(lora_Bs), dim=1)
    dtype = torch.promote_types(A.dtype, B.dtype)
    return A.to(dtype), B.to(dtype), scaling
