"""Patched layers against PEFT's own: outputs and every gradient, in every way that PEFT's layers are used."""

import itertools
from dataclasses import replace

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
# What peft.prepare_model_for_kbit_training leaves.
SETTINGS += [
    Setting(Dtypes(F32, adapter), autocast=autocast, dropout_p=p, compute_dtype=BF16, **kind)
    for adapter, autocast, p, kind in itertools.product((F32, BF16), (None, BF16), (0.0, 0.25), KINDS)
    if kind.get("kind") == "4bit"
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_output_and_gradients(setting: Setting) -> None:
    compare.assert_within_bound(peft_layers.errors(setting))


MASKS = [(), ("x",), ("lora_A",), ("lora_B",), ("x", "lora_B"), ("lora_A", "lora_B"), ("bias",), ("x", "lora_magnitude_vector")]


@pytest.mark.parametrize("trained", MASKS, ids=lambda names: "-".join(names) or "nothing")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_requires_grad(trained: tuple[str, ...], kind: dict) -> None:
    """Gradients of those, and of nothing else."""
    compare.assert_within_bound(peft_layers.errors(Setting(Dtypes(BF16, F32), trained=trained, **kind), draws=1))


@pytest.mark.parametrize("checkpointing", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_checkpointing_draws_the_same_mask(kind: dict, checkpointing: str) -> None:
    setting = Setting(Dtypes(BF16, F32), dropout_p=0.5, **kind)
    model = peft_layers.patched(peft_layers.make(setting))
    expected = peft_layers.run(model, setting, 0)
    actual = peft_layers.run(model, replace(setting, checkpointing=checkpointing), 0)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("wrong", ["lora_A", "lora_B", "x"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_wrong_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch, kind: dict, wrong: str) -> None:
    """A gradient that is one sixteenth off."""
    setting = Setting(Dtypes(BF16, F32), **kind)
    measured = peft_layers.errors(setting, change=lambda name, t: t * 17 / 16 if wrong in name.split(".") else t)
    with pytest.raises(AssertionError, match="error"):
        compare.assert_within_bound(measured)
