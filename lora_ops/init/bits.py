"""Which layer gets how many bits: an exact choice under a budget."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..quant import quantize_nf4
from .weighted import weighted_norm

Format = tuple[int, bool]  # blocksize, double_quant
FORMATS: list[Format] = [(blocksize, double) for blocksize in (32, 64, 128, 256, 512) for double in (False, True)]


def choose_formats(layers: Iterable[tuple[Tensor, dict[str, Tensor]]], bits: float, quant: str) -> list[Format]:
    """Of `FORMATS` one for each layer, so that the squared errors of all quantised weights sum up to the least that at most
    `bits` per weight allow.

    Args:
        layers: each layer's weight (N, K), and row_w (N,) and col_w (K,) of its error, by these names, where it is weighted.
        bits: of all layers together, on average.
        quant: "nf4" or "fp4".

    Raises:
        ValueError: too few bits for any choice.
    """
    errors, sizes, elements = [], [], 0
    for weight, by in layers:
        W = weight.detach().float()
        candidates = [quantize_nf4(W, *format, quant) for format in FORMATS]
        lost = (W - Q.dequantize(torch.float32) for Q in candidates)
        errors.append([weighted_norm(M, by.get("row_w"), by.get("col_w")) ** 2 for M in lost])
        sizes.append([8 * Q.nbytes for Q in candidates])
        elements += W.numel()
    return [FORMATS[c] for c in allocate_bits(errors, sizes, int(bits * elements))]


def allocate_bits(errors: Sequence[Sequence[float]], bits: Sequence[Sequence[int]], budget: int) -> list[int]:
    """The choice c_l of a format for every layer l that minimises `Σ errors[l][c_l]` with `Σ bits[l][c_l] <= budget`: LQ-LoRA's
    integer programme (Guo et al. 2023, https://arxiv.org/abs/2311.12023), by dynamic programming.

    Exact, in O(layers · formats · budget / unit) where unit is the greatest common divisor of all differences of bits.

    Args:
        errors: (layers, formats), such as squared errors.
        bits: (layers, formats), whole numbers, such as bytes.
        budget: in the same unit as bits.

    Raises:
        ValueError: the budget does not even allow every layer its smallest format.
    """
    least = [min(row) for row in bits]
    extra = [[b - low for b in row] for row, low in zip(bits, least, strict=True)]
    room = budget - sum(least)
    if room < 0:
        raise ValueError(f"budget must be at least {sum(least)}, what the smallest formats take, got {budget}")
    unit = math.gcd(*(e for row in extra for e in row)) or 1
    slots = min(room // unit, sum(max(row) for row in extra) // unit)
    best = torch.zeros(slots + 1, dtype=torch.float64)
    chosen: list[torch.Tensor] = []
    for row_errors, row in zip(errors, extra, strict=True):
        table = torch.full((len(row), slots + 1), torch.inf, dtype=torch.float64)
        for c, (error, e) in enumerate(zip(row_errors, row, strict=True)):
            e //= unit
            if e <= slots:
                table[c, e:] = best[: slots + 1 - e] + error
        best, choice = table.min(0)
        chosen.append(choice)
    picks: list[int] = []
    at = slots
    for choice, row in zip(reversed(chosen), reversed(extra), strict=True):
        c = int(choice[at])
        picks.append(c)
        at -= row[c] // unit
    return picks[::-1]
