"""Shapes and numbers of the cases of dense products: one error among hundreds of products shows in an exact result."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import compare
import torch
from compare import F32, Dtypes, make_case

from lora_ops import reference

from .case import Kernel, odd, one_of_each_row, whole


class Shape(NamedTuple):
    M: int
    wide: int  # columns of out
    deep: int
    r: int
    adapter: torch.dtype


def shapes(kernel: Kernel) -> Iterator[Shape]:
    """Beyond whole tiles: up to three tiles each way, an end in each eighth of a tile, and rings that go round."""
    rows, columns, depth, _, stages = kernel.sizes
    for i in range(16):
        M = rows * (i % 3) + rows // 8 * (i % 8) + i % 5 + 1
        wide = columns * (i // 3 % 3) + columns // 8 * (5 * i % 8) + 3 * i % 8 + 1
        deep = depth * (7 * i % (stages + 2)) + 11 * i % depth + 1
        yield Shape(M, wide, deep, (5 * i + 3) % 24 + 1, (F32, kernel.type)[i // 4 % 2])
    for i in range(8):  # whole tiles of out, every end of four ranks
        yield Shape(rows, columns, 9, i % 4 + 13, (F32, kernel.type)[i // 4])
    yield Shape(9 * rows + 3, columns + 1, 9, 4, kernel.type)  # more than a group of rows of tiles
    for i in range(columns // 2):  # out ends twice in each four columns, behind an even one and behind an odd one
        yield Shape(3, 2 * i + i % 2 + 1, 8, 4, kernel.type)


def ends(kernel: Kernel) -> Iterator[Shape]:
    """For copies element by element: every end of a chunk, in each of the ring's copies."""
    rows, columns, depth, _, stages = kernel.sizes
    for i in range(8 * stages):
        end, stage = i % 8, i // 8
        deep = depth * stage + 8 * ((3 * end + stage) % (depth // 8)) + end + 1
        wide = 8 * ((5 * end + stage) % (columns // 8)) + (end + stage) % 8 + 1
        yield Shape(rows * 5 // 8 + i % 8, wide, deep, i % 20 + 1, (F32, kernel.type)[i % 2])


def of_whole_numbers(case: compare.Case, is_dx: bool) -> compare.Case:
    """And S, or dS, as small as they are."""
    A, B = whole(case.lora_A), whole(case.lora_B)
    if is_dx:
        B = one_of_each_row(B.shape[1], B.shape[0]).T * B.sign()
    else:
        A = one_of_each_row(*A.shape) * A.sign()
    numbers = {name: whole(getattr(case, name)) for name in ("x", "weight", "dy")}
    bias = None if case.bias is None else whole(case.bias)
    return replace(case, **numbers, lora_A=A, lora_B=B, bias=bias, scaling=2.0)


def of_parts(case: compare.Case, is_dx: bool) -> compare.Case:
    """What is left of the low-rank product are the products of a higher and a lower part of fp32 adapters, exactly, or nothing.

    The higher parts' product is what the main product takes away. They have odd last bits where there is no lower part.
    """
    (M, K), (N, r) = case.x.shape, case.lora_B.shape
    deep, wide = (N, K) if is_dx else (K, N)
    row, column, rank = torch.arange(deep)[:, None], torch.arange(wide)[:, None], torch.arange(r)

    odd = (row + row // r) % 2  # of a row's only rank, too, both numbers come
    in_higher, column_higher = (1 + 2.0**-7 * i for i in (odd, column % 2))
    higher = column_higher * (1 - column // 2 % 2 * 2) * 2.0 ** ((column + 2 * rank + rank // 4) % 3)
    left = (row % r == rank) * (1 + (1 - odd) * (7 * row % 13 + 1) * 2.0**-16)
    right = higher * (1 + (1 - column % 2) * ((3 * column + 5 * rank) % 11 + 1) * 2.0**-16)
    of_in = (one_of_each_row(M, deep) * in_higher.T).to(case.x.dtype)  # S = of_in left
    weight = -higher[:, row[:, 0] % r].to(case.x.dtype)
    left, right = left.to(case.lora_A.dtype), right.to(case.lora_A.dtype)
    if is_dx:
        numbers = {"dy": of_in, "weight": weight.T.contiguous(), "lora_B": left, "lora_A": right.T.contiguous()}
    else:
        numbers = {"x": of_in, "weight": weight, "lora_A": left.T.contiguous(), "lora_B": right}
    return replace(case, **numbers, bias=None, scaling=1.0)


def of_last_bits(case: compare.Case, is_dx: bool) -> compare.Case:
    """The base product is an element of the weight, odd in its last bit, everywhere."""
    of_in = case.dy if is_dx else case.x
    only = one_of_each_row(*of_in.shape).to(of_in.dtype)
    return replace(case, **{"dy" if is_dx else "x": only}, weight=odd(case.weight))


def without_adapter(case: compare.Case) -> compare.Case:
    return replace(case, lora_A=case.lora_A[:0], lora_B=case.lora_B[:, :0])


def make(kernel: Kernel, shape: Shape, is_dx: bool, **options) -> compare.Case:
    M, wide, deep, r, adapter = shape
    K, N = (wide, deep) if is_dx else (deep, wide)
    return make_case((M, K, N, r), Dtypes(kernel.type, adapter), **options)


def of_low_rank(case: compare.Case) -> compare.Case:
    """Of dx, 2 r everywhere, without a main product: 1 / (1 - p) is then the only thing that rounds."""
    first = torch.zeros_like(case.lora_B)
    first[0] = 1
    weight, dy, A = torch.zeros_like(case.weight), torch.ones_like(case.dy), torch.ones_like(case.lora_A)
    return replace(case, weight=weight, dy=dy, lora_A=A, lora_B=first, scaling=2.0)


def tile_of(kernel: Kernel) -> str:
    return {128: "large", 64: "medium", 32: "small"}[kernel.sizes[0]]


def at_thresholds(kernel: Kernel, of: Callable[[float], compare.Case]) -> Iterator[compare.Case]:
    """of(p) for every element of a thread's fragments, with p the very number that this element has, an odd one where one of
    eight threads has one."""
    rows, columns, _, warps_m, _ = kernel.sizes
    case = of(0.5)
    bits = reference.dropout_bits(case.seed, *case.x.shape)
    for row in range(0, rows // warps_m, 8):
        for col in (c for c in range(columns) if c % 32 < 8 * warps_m and c % 8 < 2):
            numbers = bits[row : row + 8, col].tolist()
            yield replace(case, dropout_p=next((n for n in numbers if n % 2), numbers[0]) / 65536)
