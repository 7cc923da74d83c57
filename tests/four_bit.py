"""compare.py's cases with the weight in 4 bits: what each side of the comparison takes for W.

oracle   W = code · absmax, exactly, in float64
eager    what a user of bitsandbytes runs: W rounded to x's dtype, then PEFT's arithmetic
"""

import functools
from dataclasses import dataclass, replace

import torch
from compare import Case, Dtypes, Error, Results, Shape, draws, eager_lora, error, make_case, oracle, run
from torch import Tensor

from lora_ops import NF4Weight, qlora_linear, quantize_nf4

# Block size, double quantisation, code.
SETTINGS = [
    (64, True, "nf4"),
    (64, False, "nf4"),
    (32, True, "nf4"),
    (128, True, "fp4"),
    (256, False, "nf4"),
    (4096, True, "nf4"),
]

# (M, K, N, r): whole chunks of 128 codes and every kind of rest; rows shorter than a block, blocks across rows.
SHAPES_4BIT = [
    (0, 64, 16, 4), (1, 1, 1, 1), (1, 31, 3, 4), (1, 64, 129, 16), (1, 128, 64, 8), (1, 300, 33, 100), (1, 576, 300, 8),
    (2, 65, 31, 8), (3, 127, 48, 16), (4, 192, 65, 3), (5, 256, 17, 8), (7, 200, 130, 16), (8, 576, 64, 4), (9, 48, 576, 64),
    (13, 129, 16, 64), (14, 33, 127, 4), (15, 576, 576, 16), (16, 320, 96, 8), (33, 448, 40, 8), (41, 300, 129, 100),
    (64, 128, 128, 16), (100, 48, 3, 1), (100, 385, 65, 8), (257, 129, 32, 1), (50, 2048, 500, 16), (300, 1000, 33, 8),
]  # fmt: skip
FEW_4BIT = [(1, 300, 33, 4), (3, 65, 17, 1), (6, 128, 64, 8), (15, 48, 129, 16), (41, 191, 33, 100), (100, 64, 65, 8)]


@dataclass(frozen=True)
class QuantisedCase(Case):
    """`weight` is what eager multiplies by: qweight rounded to x's dtype."""

    qweight: NF4Weight = None  # type: ignore[assignment]

    def exact(self) -> Case:
        return replace(self, weight=self.qweight.dequantize(torch.float64))


def settings_of(shape: Shape) -> tuple[int, bool, str]:
    return SETTINGS[(SHAPES_4BIT.index(shape) if shape in SHAPES_4BIT else sum(shape)) % len(SETTINGS)]


def make_quantised_case(
    shape: Shape, dtypes: Dtypes, settings: tuple[int, bool, str] | None = None, **options
) -> QuantisedCase:
    case = make_case(shape, dtypes, **options)
    qweight = quantize_nf4(case.weight.float(), *(settings or settings_of(shape)))
    return QuantisedCase(**{**vars(case), "weight": qweight.dequantize(dtypes.x)}, qweight=qweight)


def fused_qlora(x: Tensor, case: QuantisedCase, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> Tensor:
    torch.manual_seed(case.generator)
    return qlora_linear(
        x, case.qweight, lora_A, lora_B, scaling=case.scaling, bias=bias, dropout_p=case.dropout_p, training=True
    )


def exact_results(case: QuantisedCase, *, backward: bool) -> Results:
    return oracle(case.exact(), backward=backward)


def errors_4bit(case: QuantisedCase, *, backward: bool) -> dict[str, Error]:
    actual, eager = run(fused_qlora, case, backward=backward), run(eager_lora, case, backward=backward)
    exact = exact_results(case, backward=backward)
    assert actual.keys() == eager.keys()
    return {name: error(actual[name], eager[name], exact[name]) for name in actual}


@functools.cache
def shape_errors_4bit(shape: Shape, dtypes: Dtypes, *, backward: bool, dropout_p: float = 0.0) -> dict[str, Error]:
    """The largest errors over a shape's cases."""
    cases = [make_quantised_case(shape, dtypes, dropout_p=dropout_p, draw=i) for i in range(draws(shape))]
    drawn = [errors_4bit(case, backward=backward) for case in cases]
    return {name: Error(*map(max, zip(*(e[name] for e in drawn), strict=True))) for name in drawn[0]}
