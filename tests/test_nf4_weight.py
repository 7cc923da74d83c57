"""NF4Weight: made, moved, copied, saved, exchanged with bitsandbytes and transformers, and what it refuses."""

import copy
import json
import pickle
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import copied, pickled, saved

from lora_ops import NF4Weight, quantize_nf4, reference

N, K = 48, 192
TENSORS = ["codes", "absmax", "nested_absmax", "nested_code", "offset"]
STATE = "weight.quant_state.bitsandbytes__nf4"


def make_weight(**options):
    return quantize_nf4(torch.randn(N, K), **options)


def assert_equal(a, b):
    for name in TENSORS:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None and y is None) or (x.dtype == y.dtype and torch.equal(x, y)), name
    plain = ("shape", "dtype", "blocksize", "quant_type")
    assert [getattr(a, name) for name in plain] == [getattr(b, name) for name in plain]


def linear4bit(dtype=torch.float32, **options):
    linear = bitsandbytes.nn.Linear4bit(K, N, bias=False, quant_type="nf4", compute_dtype=torch.float32, **options)
    linear.weight.data = torch.randn(N, K, dtype=dtype)
    return linear.to("cpu")  # quantises


# --- what it is -------------------------------------------------------------------------------------------------------


def loaded_as_plain_values(weight, tmp_path):
    torch.save(weight, tmp_path / "weight.pt")
    return torch.load(tmp_path / "weight.pt", weights_only=True)


@pytest.mark.parametrize("double_quant", [True, False])
def test_copies_are_equal_and_share_nothing(double_quant, tmp_path):
    weight = make_weight(double_quant=double_quant)
    for duplicate in (copied(weight), pickled(weight), saved(weight), weight.clone(), loaded_as_plain_values(weight, tmp_path)):
        assert type(duplicate) is NF4Weight
        assert_equal(duplicate, weight)
        for name in TENSORS:
            t = getattr(weight, name)
            assert t is None or getattr(duplicate, name).data_ptr() != t.data_ptr()
        assert torch.equal(duplicate.dequantize(), weight.dequantize())


def test_weights_share_no_memory_with_each_other():
    a, b = make_weight(), make_weight()
    assert a.nested_code.data_ptr() != b.nested_code.data_ptr() != reference.nested_code().data_ptr()


def test_to():
    weight = make_weight()
    for half in (weight.to(torch.bfloat16), weight.to(dtype=torch.bfloat16), weight.to("cpu", torch.bfloat16)):
        assert half.dtype == torch.bfloat16
        assert torch.equal(half.dequantize(), weight.dequantize(torch.bfloat16))
        assert torch.equal(half.codes, weight.codes)
    assert weight.dtype == torch.float32
    meta = weight.to("meta")
    assert all(getattr(meta, name).is_meta for name in TENSORS)
    assert str(meta.device) == "meta"
    with pytest.raises(TypeError, match=r"dtype .* must be float32, bfloat16 or float16, got torch.float64"):
        weight.to(torch.float64)
    with pytest.raises(AttributeError):
        weight.blocksize = 32


def test_dequantize_rounds_once():
    weight = make_weight()
    exact = weight.dequantize(torch.float64)
    absmax = weight.dequantize_absmax().double().repeat_interleave(64).view(N, K)
    assert torch.equal(exact / absmax, (exact / absmax).float().double())  # a code
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(weight.dequantize(dtype), exact.float().to(dtype))
    assert weight.dequantize().dtype == torch.float32
    with pytest.raises(TypeError, match=r"dtype must be .* got torch.int8"):
        weight.dequantize(torch.int8)


@pytest.mark.parametrize("double_quant", [False, True])
def test_what_is_quantised_already_stays_what_it_is(double_quant):
    """Codes are the same once more, and so are scales, as far as they are kept exactly."""
    first = quantize_nf4(torch.randn(20, 256), double_quant=double_quant)
    again = quantize_nf4(first.dequantize(torch.float32), double_quant=double_quant)
    assert torch.equal(again.codes, first.codes)
    if not double_quant:
        assert torch.equal(again.absmax, first.absmax)
        assert torch.equal(again.dequantize(torch.float32), first.dequantize(torch.float32))


def test_strides_and_gradients_of_the_weight_do_not_matter():
    weight = torch.randn(K, N, requires_grad=True).T
    quantised = quantize_nf4(weight)
    assert_equal(quantised, quantize_nf4(weight.detach().contiguous()))
    assert not quantised.dequantize().requires_grad


def test_storage():
    for double_quant, bits in ((True, 4.13), (False, 4.5)):
        weight = quantize_nf4(torch.randn(2048, 2048, dtype=torch.bfloat16), double_quant=double_quant)
        extra = 1024 + 4 if double_quant else 0  # nested_code and offset
        assert round((weight.nbytes - extra) * 8 / 2048**2, 2) == bits
        assert weight.nbytes == sum(getattr(weight, name).nbytes for name in TENSORS if getattr(weight, name) is not None)
    assert quantize_nf4(torch.randn(3, 130)).codes.shape == (3, 64 + 32)


# --- bitsandbytes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_linear4bit(dtype, double_quant, storage):
    linear = linear4bit(dtype, compress_statistics=double_quant, quant_storage=storage)
    state = linear.state_dict(prefix="model.layer.")
    read = NF4Weight.from_bitsandbytes(state, prefix="model.layer.")
    assert_equal(read, NF4Weight.from_params4bit(linear.weight))
    assert read.dtype == dtype

    exported = read.to_bitsandbytes("model.layer.", quant_storage=storage)
    assert list(exported) == list(state)
    for key, t in state.items():
        assert exported[key].dtype == t.dtype
        assert torch.equal(exported[key].view(torch.uint8), t.contiguous().view(torch.uint8)), key

    stats = {key.removeprefix("model.layer.weight."): t for key, t in exported.items() if not key.endswith(".weight")}
    param = bitsandbytes.nn.Params4bit.from_prequantized(exported["model.layer.weight"], stats, device="cpu")
    assert param.quant_state == linear.weight.quant_state
    assert torch.equal(bitsandbytes.functional.dequantize_4bit(param.data, param.quant_state), read.dequantize())


def test_nothing_is_shared_with_what_was_read():
    linear = linear4bit()
    before = {key: t.clone() for key, t in linear.state_dict().items()}
    for weight in (NF4Weight.from_params4bit(linear.weight), NF4Weight.from_bitsandbytes(linear.state_dict())):
        for name in TENSORS:
            getattr(weight, name).zero_()
    for key, t in linear.state_dict().items():
        assert torch.equal(t, before[key]), key


def test_safetensors_take_what_is_exported(tmp_path):
    weights = [make_weight(), make_weight()]
    save_file(weights[0].to_bitsandbytes("a.") | weights[1].to_bitsandbytes("b."), tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    for prefix, weight in zip(("a.", "b."), weights, strict=True):
        assert_equal(NF4Weight.from_bitsandbytes(state, prefix), weight)


def test_params4bit_that_bitsandbytes_has_repacked_is_refused():
    linear = bitsandbytes.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16).to("cpu").eval()
    before = NF4Weight.from_params4bit(linear.weight)
    linear.weight.quant_state.packing_format_for_cpu = True  # as a forward pass in eval mode leaves it, where AVX-512 has bf16
    with pytest.raises(ValueError, match="packing_format_for_cpu"):
        NF4Weight.from_params4bit(linear.weight)
    linear.weight.quant_state.packing_format_for_cpu = False
    assert_equal(NF4Weight.from_params4bit(linear.weight), before)


def test_params4bit_that_is_not_quantised_is_refused():
    for param in (bitsandbytes.nn.Params4bit(torch.randn(N, K)), torch.nn.Parameter(torch.randn(N, K))):
        with pytest.raises(TypeError, match="param must be a quantised bitsandbytes Params4bit, got P"):
            NF4Weight.from_params4bit(param)


def test_a_transformers_model_in_4_bits(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "whole")
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole", quantization_config=quantization, dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "quantised")
    state = load_file(tmp_path / "quantised" / "model.safetensors")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert len(layers) == 14
    for name, layer in layers.items():
        weight = NF4Weight.from_bitsandbytes(state, f"{name}.")
        expected = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert weight.dtype == expected.dtype == torch.bfloat16
        assert torch.equal(weight.dequantize().view(torch.int16), expected.view(torch.int16))
        for key, t in weight.to_bitsandbytes(f"{name}.").items():
            assert torch.equal(t, state[key]), key


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "options", "error", "message"),
    [
        (torch.randn(8), {}, ValueError, r"weight must be \(N, K\), got shape \(8,\)"),
        (torch.randn(2, 3, 4), {}, ValueError, r"weight must be \(N, K\), got shape \(2, 3, 4\)"),
        (torch.randn(0, 4), {}, ValueError, r"N, K >= 1, got \(0, 4\)"),
        (torch.randn(4, 0), {}, ValueError, r"N, K >= 1, got \(4, 0\)"),
        (torch.randn(2, 2).double(), {}, TypeError, r"must be float32, bfloat16 or float16, got torch.float64"),
        (torch.ones(2, 2, dtype=torch.uint8), {}, TypeError, r"must be float32, .* got torch.uint8"),
        (torch.randn(2, 2), {"blocksize": 16}, ValueError, r"blocksize must be one of 32, 64, .*4096, got 16"),
        (torch.randn(2, 2), {"blocksize": 64.0}, ValueError, r"blocksize must be one of .* got 64.0"),
        (torch.randn(2, 2), {"blocksize": 8192}, ValueError, r"blocksize must be one of .* got 8192"),
        (torch.randn(2, 2), {"quant_type": "int4"}, ValueError, r'quant_type must be "nf4" or "fp4", got \'int4\''),
    ],
)
def test_bad_arguments(weight, options, error, message):
    with pytest.raises(error, match=message):
        quantize_nf4(weight, **options)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(value, dtype, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr("lora_ops.quant.layout.has_kernel", lambda t: False)
    for n, k in ((0, 0), (2, 70), (4, 98)):
        weight = torch.randn(5, 99).to(dtype)
        weight[n, k] = weight[4, 98] = value
        with pytest.raises(ValueError, match=rf"weight must be finite, got {value} at \({n}, {k}\)"):
            quantize_nf4(weight)


def edited(**fields):
    """The quant_state's JSON with fields changed, or taken out where None."""

    def edit(state):
        values = json.loads(bytes(state[STATE].tolist())) | fields
        text = json.dumps({key: v for key, v in values.items() if v is not None})
        state[STATE] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return edit


def put(key, make):
    def edit(state):
        state[key] = make(state[key])

    return edit


def with_value(value):
    def make(t):
        t = t.clone()
        t.view(-1)[0] = value
        return t

    return make


def renamed(state):
    state[STATE.replace("nf4", "af4")] = state.pop(STATE)


def of_unknown_type(state):
    edited(quant_type="af4")(state)
    renamed(state)


def doubled(state):
    state[STATE.replace("nf4", "fp4")] = state[STATE]


NAN, INF = float("nan"), float("inf")
DAMAGE = [
    (put("weight", lambda t: t[:-1]), ValueError, "packed codes of a weight .* must be 4608 bytes, got 4607"),
    (put("weight", lambda t: t.view(torch.uint8)[:0]), ValueError, "must be 4608 bytes, got 0"),
    (put("weight.absmax", lambda t: t[:-1]), ValueError, r"absmax .* must have shape \(144,\), got \(143,\)"),
    (put("weight.absmax", lambda t: t.float()), TypeError, "absmax must be torch.uint8, got torch.float32"),
    (put("weight.nested_absmax", lambda t: t.repeat(2)), ValueError, r"nested_absmax .* shape \(1,\), got \(2,\)"),
    (put("weight.nested_absmax", lambda t: t.half()), TypeError, "nested_absmax must be torch.float32, got torch.float16"),
    (put("weight.nested_absmax", with_value(NAN)), ValueError, "nested_absmax must be finite, got nan"),
    (put("weight.nested_absmax", with_value(-INF)), ValueError, "nested_absmax must be finite, got -inf"),
    (put("weight.nested_quant_map", lambda t: t[:255]), ValueError, r"nested_code .* shape \(256,\), got \(255,\)"),
    (put("weight.nested_quant_map", with_value(INF)), ValueError, "nested_code must be finite, got inf"),
    (put("weight.quant_map", with_value(-0.9)), ValueError, "quant_map must be the 16 values of nf4"),
    (put("weight.quant_map", lambda t: t[:15]), ValueError, "quant_map must be the 16 values of nf4"),
    (put("weight.quant_map", list), TypeError, "weight.quant_map must be a tensor, got list"),
    (edited(nested_offset=NAN), ValueError, "offset must be finite, got nan"),
    (edited(nested_offset="0.1"), ValueError, "nested_offset in the quant_state must be a number, got '0.1'"),
    (edited(nested_blocksize=128), ValueError, "absmax must be quantised in blocks of 256 .* got nested_blocksize 128"),
    (edited(nested_dtype="float16"), ValueError, "absmax must be quantised .* from float32, .* nested_dtype torch.float16"),
    (edited(quant_type="fp4"), ValueError, "quant_type is 'fp4' in .*bitsandbytes__nf4"),
    (edited(blocksize=48), ValueError, "blocksize must be one of .* got 48"),
    (edited(blocksize=32), ValueError, r"absmax .* must have shape \(288,\), got \(144,\)"),
    (edited(blocksize="64"), ValueError, "blocksize must be one of .* got '64'"),
    (edited(dtype="int8"), TypeError, "dtype .* must be float32, bfloat16 or float16, got 'int8'"),
    (edited(dtype=[]), TypeError, r"dtype .* must be float32, bfloat16 or float16, got \[\]"),
    (edited(shape=[N, K, 1]), ValueError, r"shape .* must be \(N, K\) .* got \(48, 192, 1\)"),
    (edited(shape=[N, 2 * K]), ValueError, "must be 9216 bytes, got 4608"),
    (edited(shape=[-N, -K]), ValueError, r"must be \(N, K\) with N, K >= 1, got \(-48, -192\)"),
    (edited(shape="48x192"), ValueError, r"must be \(N, K\) .* got '48x192'"),
    (renamed, ValueError, "quant_type is 'nf4' in .*bitsandbytes__af4"),
    (of_unknown_type, ValueError, 'quant_type must be "nf4" or "fp4", got \'af4\''),
    (doubled, ValueError, "there must be one quant_state, got"),
    (put(STATE, lambda t: t[:-1]), ValueError, "quant_state is no JSON"),
    (put(STATE, lambda t: t + 128), ValueError, "quant_state is no JSON"),
    (put(STATE, lambda t: torch.tensor(list(b"[1]"), dtype=torch.uint8)), ValueError, r"must be a JSON object, got \[1\]"),
    (put(STATE, lambda t: t.float()), TypeError, "quant_state must be JSON in a vector of uint8, got .* torch.float32"),
]


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGE)
def test_a_damaged_state_is_refused(damage, error, message):
    state = make_weight().to_bitsandbytes()
    damage(state)
    with pytest.raises(error, match=message) as raised:
        NF4Weight.from_bitsandbytes({f"layers.3.{key}": t for key, t in state.items()}, "layers.3.")
    assert str(raised.value).startswith("layers.3.weight"), "which of a model's weights it is"


def test_absmax_that_is_not_finite():
    for value in (NAN, INF):
        state = make_weight(double_quant=False).to_bitsandbytes()
        state["weight.absmax"][5] = value
        with pytest.raises(ValueError, match=f"absmax must be finite, got {value}"):
            NF4Weight.from_bitsandbytes(state)


@pytest.mark.parametrize(
    "field", ["quant_type", "blocksize", "dtype", "shape", *(f"nested_{f}" for f in ("offset", "dtype", "blocksize"))]
)
def test_a_missing_field_is_named(field):
    state = make_weight().to_bitsandbytes()
    edited(**{field: None})(state)
    with pytest.raises(KeyError, match=f"{field} is missing in the quant_state"):
        NF4Weight.from_bitsandbytes(state)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_missing_key_is_named(double_quant):
    state = make_weight(double_quant=double_quant).to_bitsandbytes("layer.")
    for key in state:
        with pytest.raises(KeyError, match=f"{key} is missing"):
            NF4Weight.from_bitsandbytes({k: t for k, t in state.items() if k != key}, "layer.")


def test_damage_in_a_params4bit():
    linear = linear4bit()
    state = linear.weight.quant_state
    damaged = SimpleNamespace(**vars(state))
    damaged.absmax = state.absmax[:-1]
    param = copy.copy(linear.weight)
    param.quant_state = damaged
    with pytest.raises(ValueError, match=r"absmax .* must have shape \(144,\), got \(143,\)"):
        NF4Weight.from_params4bit(param)


def test_tensors_that_do_not_belong_together():
    weight = make_weight()
    fields = vars(weight)
    for change, message in [
        ({"offset": None}, "nested_absmax, nested_code and offset go together"),
        ({"nested_absmax": None}, "nested_absmax, nested_code and offset go together"),
        ({"absmax": weight.absmax.to("meta")}, "absmax must be on codes' device cpu, got meta"),
        ({"codes": weight.codes[:, :-1]}, r"codes .* must have shape \(48, 96\), got \(48, 95\)"),
        ({"shape": (N, K + 1)}, "codes .* must have shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            NF4Weight(**{**fields, **change})


def test_pickles_hold_nothing_but_the_tensors():
    weight = make_weight()
    assert len(pickle.dumps(weight)) < weight.nbytes + 3000
