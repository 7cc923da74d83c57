"""Calls of the public operators that hypothesis makes up (fuzzing.py), and files and states that chance has damaged
(reading.py): the same ones every time. tools/fuzz.py runs more of both.
"""

import json
import random
import warnings
from collections.abc import Callable

import pytest
import safetensors.torch
import torch
from fuzzing import Call, Spec, specs
from hypothesis import HealthCheck, given, settings
from reading import Reader
from torch import Tensor

import lora_ops

SHORT = settings(max_examples=300, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


@SHORT
@given(specs())
def test_operators(spec: Spec) -> None:
    Call(spec).check()


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader()


def test_what_is_valid_is_read(reader: Reader) -> None:
    for data in reader.seeds():
        reader.one(data)


@pytest.mark.parametrize("seed", range(4))
def test_readers(reader: Reader, seed: int) -> None:
    drawn, seeds = random.Random(seed), reader.seeds()
    for _ in range(300):
        data = bytearray(drawn.choice(seeds))
        if data[0] in (2, 6):  # edits
            data[2:] = drawn.randbytes(3 * drawn.randint(1, 3))
        else:
            for _ in range(drawn.randint(1, 3)):
                data[drawn.randrange(2, len(data))] = drawn.randrange(256)
        data[1] ^= drawn.choice((0, 128))
        reader.one(bytes(data))


# --- what fuzzing has found -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["config", "state"])
def test_json_that_is_too_deep(reader: Reader, field: str) -> None:
    reader.one(bytes([{"config": 0, "state": 4}[field], 0]) + b"[" * 100_000)


EXPRESSIONS = ["(?i)up", "(?x)up #", "a{9999999999}", "(" * 5000, "(?P<index>a)"]


@pytest.mark.parametrize("regex", EXPRESSIONS, ids=lambda regex: regex[:12])
def test_expressions_that_do_not_fit_where_they_are_put(regex: str) -> None:
    fields = [{"rank_pattern": {regex: 1}}, {"modules_to_save": [regex]}]
    fields += [{"layers_pattern": [regex], "layers_to_transform": 0}, {"target_modules": regex}]
    refused = 0
    for field in fields:
        try:
            lora_ops.LoraConfig(**({"target_modules": ["up"]} | field))
        except ValueError as error:
            assert "must be a regular expression, got" in str(error)
            refused += 1
    assert refused == {"(?i)up": 3, "(?x)up #": 3, "(?P<index>a)": 1}.get(regex, 4)


@pytest.mark.parametrize("alpha", [10**400, -(10**400)])
def test_a_number_that_no_float_holds(alpha: int) -> None:
    with pytest.raises(ValueError, match="lora_alpha must be a finite number, got"):
        lora_ops.LoraConfig(lora_alpha=alpha)


def test_an_offset_that_no_float_holds() -> None:
    for offset in ("1" + "0" * 400, "1e300"):
        state = lora_ops.quantize_nf4(torch.randn(4, 40)).to_bitsandbytes()
        key = next(key for key in state if "quant_state" in key)
        text = bytes(state[key].tolist()).decode().partition('"nested_offset": ')
        state[key] = torch.tensor(list(f"{text[0]}{text[1]}{offset}}}".encode()), dtype=torch.uint8)
        with pytest.raises(ValueError, match="offset must be finite in float32, got"):
            lora_ops.NF4Weight.from_bitsandbytes(state)


def test_codes_in_another_dtype() -> None:
    state = lora_ops.quantize_nf4(torch.randn(4, 40)).to_bitsandbytes()
    state["weight.quant_map"] = state["weight.quant_map"].double()
    with pytest.raises(ValueError, match="quant_map must be the 16 values of nf4 in float32"):
        lora_ops.NF4Weight.from_bitsandbytes(state)


def edited(reader: Reader, which: int, change: Callable[..., object]) -> None:
    """Refused by load_adapter, with the model as it was."""
    fields, tensors = (dict(part) for part in reader.adapters.parsed[which])
    change(fields, tensors)
    config, weights = json.dumps(fields).encode(), safetensors.torch.save(tensors)
    for model in (0, 1):
        reader.adapters.load(config, weights, model)


@pytest.mark.parametrize("target", ["act", "0", ""])
def test_targets_that_cannot_have_adapters(reader: Reader, target: str) -> None:
    edited(reader, 0, lambda fields, _: fields.update(target_modules=[target]))


def test_a_bias_that_is_saved_twice_and_differs(reader: Reader) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        edited(reader, 3, lambda _, tensors: tensors["base_model.model.head.bias"].add_(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("K", "N"), [(1, 9), (9, 1)])
def test_one_column_may_lie_anywhere(K: int, N: int, dtype: torch.dtype) -> None:
    """torch gives it any stride. Gradients were once made of what lies between x's elements, or dy's."""
    x, weight, A, B, dy = (torch.randn(s).to(dtype) for s in ((17, K), (N, K), (3, K), (N, 3), (17, N)))

    def gradients(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (x, A, B)]
        return torch.autograd.grad(lora_ops.lora_linear(leaves[0], weight, *leaves[1:], scaling=1.0), leaves, dy)

    apart = (torch.stack([t, torch.full_like(t, torch.nan)], -1).flatten(-2)[:, ::2] for t in (x, dy))
    assert all(map(torch.equal, gradients(*apart), gradients(x, dy)))


def test_a_single_row_of_a_mixed_batch_without_dimensions() -> None:
    bank = lora_ops.AdapterBank()
    bank.add("a", torch.randn(2, 5), torch.randn(3, 2), 1.0)
    x, weight = torch.randn(5), torch.randn(3, 5)
    y = lora_ops.multi_lora_linear(x, weight, bank, torch.tensor(0))
    assert torch.equal(y, lora_ops.multi_lora_linear(x[None], weight, bank, ["a"])[0])


def test_a_mixed_batch_of_meta_tensors() -> None:
    bank = lora_ops.AdapterBank()
    bank.add("a", *(torch.empty(s, device="meta") for s in ((2, 5), (3, 2))), 1.0)
    x, weight, ids = (torch.empty(s, device="meta") for s in ((4, 5), (3, 5), (4,)))
    assert lora_ops.multi_lora_linear(x, weight, bank, ids.long()).shape == (4, 3)


def test_autocast_rounds_nothing_within_the_reference() -> None:
    """What an operator does where there is no kernel: its own dtypes, once autocast has acted on its arguments."""
    x, weight, A, B = (torch.randn(s) for s in ((6, 40), (30, 40), (4, 40), (30, 4)))
    expected = lora_ops.reference.lora_forward(x, weight, A, B, None, 0.5)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lora_ops.reference.lora_forward(x, weight, A, B, None, 0.5)[0], expected)
