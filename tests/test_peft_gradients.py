"""Patched layers against PEFT's own: outputs and every gradient, in every way that PEFT's layers are used."""

import itertools

import compare
import peft_layers
import pytest
import torch
from compare import BF16, F16, F32, Dtypes
from peft_layers import Setting

DTYPES = [*compare.DTYPES, Dtypes(BF16, F16), Dtypes(F32, BF16)]
DORA, LORA_BIAS, RSLORA = ((name, True) for name in ("use_dora", "lora_bias", "use_rslora"))
KINDS = [
    {},
    {"bias": False},
    {"options": (RSLORA,)},
    {"options": (LORA_BIAS,)},
    {"options": (DORA,)},
    {"adapters": 2},
    {"adapters": 2, "options": (LORA_BIAS, RSLORA)},
    {"kind": "conv1d"},
    {"kind": "conv1d", "options": (DORA,)},
    {"kind": "4bit"},
    {"kind": "4bit", "options": (DORA,)},
    {"kind": "4bit", "adapters": 2, "bias": False},
]
SETTINGS = [
    Setting(dtypes, autocast=autocast, dropout_p=p, **kind)
    for dtypes, autocast, p, kind in itertools.product(DTYPES, (None, BF16), (0.0, 0.25), KINDS)
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_output_and_gradients(setting: Setting) -> None:
    compare.assert_within_bound(peft_layers.errors(setting))
