"""NaN and infinities in any operand are in the result where eager arithmetic has them, forward and backward, and nowhere else.

test_isa.py runs this on every instruction set.
"""

import itertools

import pytest
import torch
from compare import BF16, F16, F32
from fuzzing import FACTORS, SPECIAL, Call, Spec

SHAPES = [((1,), 33, 70), ((5,), 129, 17), ((41,), 64, 33), ((3, 7), 300, 48)]
OPERANDS = ["x", "weight", "lora_A", "lora_B", "bias", "dy"]
KINDS = ["dense", "4-bit", "mixed", "mixed 4-bit"]


def spec(op: str, shape, place: str, value: str, *, factors=frozenset(), dropout_p: float, dtypes, draw: int) -> Spec:
    lead, K, N = shape
    return Spec(
        op=op, lead=lead, K=K, N=N, ranks=(4, 17) if op.startswith("mixed") else (9,), dtypes=dtypes, wide=frozenset(),
        layouts={}, bias=True, factors=factors, gate_of_rows=draw % 2 == 0,
        train=frozenset(("x", "lora_A", "lora_B", "bias", *factors)), scaling=0.75, dropout_p=dropout_p, training=True,
        prepack=draw == 1, autocast=None, special=(value, place), quant=(64, draw % 2 == 0, "nf4"), seed=draw,
    )  # fmt: skip


def check(op: str, place: str, factors: frozenset[str] = frozenset()) -> None:
    """In each dtype, with few rows and many, with the element hidden by dropout and without."""
    cases = itertools.product(range(len(SHAPES)), SPECIAL, [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F16)])
    for i, (draw, value, dtypes) in enumerate(cases):
        dropout_p = 0.9 * ((i + draw) % 2)
        Call(spec(op, SHAPES[draw], place, value, factors=factors, dropout_p=dropout_p, dtypes=dtypes, draw=draw)).check()


@pytest.mark.parametrize("place", OPERANDS)
@pytest.mark.parametrize("op", KINDS)
def test_operands(op: str, place: str) -> None:
    check(op, place)


@pytest.mark.parametrize("place", ["x", "dy", *FACTORS])
@pytest.mark.parametrize("op", ["dense", "4-bit"])
def test_general_form(op: str, place: str) -> None:
    check(op, place, frozenset(FACTORS))


def test_the_element_is_there() -> None:
    """In all of dA where dropout has hidden it from A: torch's dropout multiplies it by zero."""
    call = Call(spec("dense", SHAPES[1], "x", "inf", dropout_p=0.9, dtypes=(F32, F32), draw=3))
    y, grads = call.run()
    row = int(call.x.isinf().any(1).nonzero())
    assert not y[row].isfinite().any()
    assert y[torch.arange(5) != row].isfinite().all()
    column = int(call.x.isinf().any(0).nonzero())
    assert not grads["lora_A0"][:, column].isfinite().any()
