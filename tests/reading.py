"""Adapter files and 4-bit states made of any bytes: read whole, or refused with a documented error and nothing changed.

The first byte says what the others are: one of the two files, a state's JSON, or edits of a valid file or state.
"""

import copy
import json
import struct
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import lora_ops
from lora_ops import LoraConfig, NF4Weight

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OPTIONS: list[dict[str, Any]] = [
    {}, {"use_dora": True}, {"lora_bias": True, "bias": "lora_only"}, {"bias": "all", "modules_to_save": ["head"]},
    {"rank_pattern": {"up": 1}, "alpha_pattern": {r"1\.up": 3}}, {"use_rslora": True, "target_modules": r".*\.(up|table)"},
]  # fmt: skip


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act = nn.Linear(3, 5), nn.ReLU()


def fresh_model() -> nn.Module:
    model = nn.Sequential(Block(), Block())
    model.add_module("table", nn.Embedding(4, 3))
    model.add_module("head", nn.Linear(5, 2))
    return model


class Adapters:
    """What has been written for each of OPTIONS, and models without and with an adapter."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.written: dict[str, bytes] = {}
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.plain, self.files = fresh_model(), []
        for options in OPTIONS:
            config = LoraConfig(**({"r": 2, "target_modules": ["up"], "init_lora_weights": False} | options))
            lora_ops.save_adapter(lora_ops.add_lora(copy.deepcopy(self.plain), config), self.folder)
            self.files.append(((self.folder / CONFIG).read_bytes(), (self.folder / WEIGHTS).read_bytes()))
        self.parsed = [(json.loads(config), safetensors.torch.load(weights)) for config, weights in self.files]
        self.with_layers = lora_ops.add_lora(copy.deepcopy(self.plain), LoraConfig(r=2, target_modules=["up"]))
        self.models = [[model, snapshot(model)] for model in (self.plain, self.with_layers)]

    def load(self, config: bytes, weights: bytes, which: int) -> None:
        for name, content in ((CONFIG, config), (WEIGHTS, weights)):
            if self.written.get(name) != content:
                (self.folder / name).write_bytes(content)
                self.written[name] = content
        model, before = self.models[which]
        try:
            lora_ops.load_adapter(model, self.folder)
        except ValueError as error:
            assert str(error), "an error without a word"
            assert snapshot(model) == before, "refused, and changed the model"
            return
        original = (self.plain_again, self.layers_again)[which]()
        self.models[which] = [original, snapshot(original)]
        assert_loaded(model, json.loads(config), safetensors.torch.load(weights))

    def plain_again(self) -> nn.Module:
        torch.manual_seed(0)
        return fresh_model()

    def layers_again(self) -> nn.Module:
        return lora_ops.add_lora(self.plain_again(), LoraConfig(r=2, target_modules=["up"]))


def snapshot(model: nn.Module) -> list[Any]:
    found: list[Any] = [(name, id(m), m.training) for name, m in model.named_modules()]
    found += [(name, id(p), p.requires_grad, p._version, p.data_ptr()) for name, p in model.named_parameters()]
    return [*found, sorted(vars(model))]


def assert_loaded(model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Every number of the file is in the model, and every layer's scaling is the configuration's."""
    state, layers = model.state_dict(), dict(lora_ops.lora_layers(model))
    assert layers
    for name, layer in layers.items():
        r, alpha = layer.r["default"], layer.lora_alpha["default"]
        assert layer.scaling["default"] == alpha / (r**0.5 if config.get("use_rslora") else r)
        assert r == (config["r"] if not config.get("rank_pattern") else r) and layer.lora_A["default"].shape[0] == r, name
    for key, t in tensors.items():
        name = key.removeprefix("base_model.model.")
        places = [
            name, name.replace(".base_layer.", "."), name.replace(".modules_to_save.", ".modules_to_save.default."),
            name.replace("lora_A.weight", "lora_A.default"),
            name.replace("lora_B.weight", "lora_B.default"), name.replace("lora_B.bias", "lora_B_bias.default"),
            name.replace("lora_embedding_A", "lora_A.default"), name.replace("lora_embedding_B", "lora_B.default"),
            name.replace("lora_magnitude_vector", "lora_magnitude_vector.default"),
            ".".join((name.rpartition(".")[0], "modules_to_save.default", name.rpartition(".")[2])),
        ]  # fmt: skip
        found = [state[place] for place in places if place in state]
        assert any(torch.equal(place, t.to(place.dtype)) for place in found), f"{key} is not in the model"


# --- edits of what is valid -------------------------------------------------------------------------------------------

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 10**30, 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "up", "0", "head", "table",
    "all-linear", "act", "(", "(?i)up", "(?x)up #", r"(a)\1", "a{9999999999}", "(" * 300, "x" * 5000, "é\ud800", [], ["up"],
    ["act"], ["head"], ["table", "up"], [""], [1], [[]], {}, {"up": 1}, {"up": 0}, {"(?i)up": 2}, {"(": 1}, {"up": 10**400},
    {"up": None}, {r"1\.up": 3},
    [0], [-1], "none", "all", "lora_only", "LORA", "gaussian", "pissa", "olora", "loftq", {"loftq_iter": 1},
    {"loftq_bits": 4, "loftq_iter": 10**9}, "pissa_niter_4", "float16", "bfloat16", "float32", "int8", [5, 3], [3, 5], [15, 1],
    [2**62, 2**62], [5.0, 3.0], 32, 64, 48, 4096, "nf4", "fp4", 256,
]  # fmt: skip
KINDS = (torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.uint8, torch.bool, torch.float8_e5m2, torch.complex64)
FIELDS = [
    "r", "target_modules", "lora_alpha", "lora_dropout", "bias", "use_rslora", "exclude_modules", "init_lora_weights",
    "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "layers_pattern", "use_dora", "lora_bias",
    "loftq_config", "peft_type", "trainable_token_indices", "use_qalora", "something_new", "ensure_weight_tying",
]  # fmt: skip
STATE_FIELDS = ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset", "more"]


def edited_tensor(t: Tensor, how: int, argument: int) -> Tensor:
    """One of some ways to damage a tensor, or not to."""
    flat = t.clone().reshape(-1)
    if how == 0:
        return t.to(KINDS[argument % len(KINDS)])
    if how == 1:
        return flat[: flat.numel() - 1 - argument % 3]
    if how == 2:
        return torch.cat([flat, flat[:1]])
    if how == 3:
        return t.unsqueeze(argument % (t.dim() + 1))
    if how == 4 and t.is_floating_point() and flat.numel():
        flat[argument % flat.numel()] = (torch.nan, torch.inf, -torch.inf, 0.0, 1e38)[argument % 5]
        return flat.view(t.shape)
    if how == 5 and t.dim() == 2:
        return t.T.contiguous()
    if how == 6 and flat.numel() and not t.is_floating_point():
        flat[argument % flat.numel()] = argument
        return flat.view(t.shape)
    return t.clone()


def edit(fields: dict[str, Any], names: list[str], tensors: dict[str, Tensor], edits: bytes) -> None:
    """Three bytes an edit: which field, value or tensor, and how."""
    for a, b, c in struct.iter_unpack("BBB", edits[: len(edits) // 3 * 3]):
        keys = sorted(tensors)
        if a < 128:
            fields[names[a % len(names)]] = NASTY[(b * 256 + c) % len(NASTY)]
        elif a < 144:
            fields.pop(names[b % len(names)], None)
        elif keys and a < 152:
            tensors.pop(keys[b % len(keys)])
        elif keys and a < 160:
            key = keys[b % len(keys)]
            tensors[(key + "x", key.replace("0", "1"), key.replace("up", "act"), key[1:])[c % 4]] = tensors[key].clone()
        elif keys:
            key = keys[b % len(keys)]
            tensors[key] = edited_tensor(tensors[key], a % 8, c)


# --- 4-bit states -----------------------------------------------------------------------------------------------------


class States:
    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.states = [
            lora_ops.quantize_nf4(torch.randn(N, K, generator=g), blocksize, double, quant).to_bitsandbytes("a.")
            for N, K, blocksize, double, quant in ((5, 3, 64, True, "nf4"), (4, 40, 32, True, "fp4"), (2, 33, 32, False, "nf4"))
        ]

    def read(self, state: dict[str, Tensor]) -> None:
        try:
            weight = NF4Weight.from_bitsandbytes(state, "a.")
        except (KeyError, ValueError, TypeError) as error:
            assert str(error), "an error without a word"
            return
        again = weight.to_bitsandbytes("a.")
        for key, t in again.items():
            if "quant_state" in key:
                given, written = (json.loads(bytes(s[key].tolist())) for s in (state, again))
                for field, value in written.items():
                    same = given[field] == value or (field == "nested_offset" and torch.tensor(float(given[field])) == value)
                    assert same, f"{field} was {given[field]!r} and is {value!r}"
            elif key == "a.weight":
                old, new = state[key].contiguous().view(-1).view(torch.uint8), t.view(-1)
                count = weight.shape[0] * weight.shape[1]
                assert torch.equal(old[: count // 2], new[: count // 2])
                assert count % 2 == 0 or old[-1] >> 4 == new[-1] >> 4  # behind the last code there is nothing
            else:
                assert torch.equal(state[key], t) and state[key].dtype == t.dtype, key
        assert weight.dequantize().shape == weight.shape


class Reader:
    """`one(data)` raises AssertionError, or what should not have been raised."""

    def __init__(self) -> None:
        self.adapters, self.states = Adapters(), States()

    def one(self, data: bytes) -> None:
        if len(data) < 3:
            return
        kind, which, rest = data[0] % 8, data[1], data[2:]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._kinds()[kind](which, rest)

    def _kinds(self) -> list[Callable[[int, bytes], None]]:
        return [
            self.config, self.weights, self.edited_adapter, self.edited_adapter,
            self.state_json, self.state_json, self.edited_state, self.edited_state,
        ]  # fmt: skip

    def config(self, which: int, rest: bytes) -> None:
        self.adapters.load(rest, self.adapters.files[which % len(OPTIONS)][1], which >> 7)

    def weights(self, which: int, rest: bytes) -> None:
        self.adapters.load(self.adapters.files[which % len(OPTIONS)][0], rest, which >> 7)

    def edited_adapter(self, which: int, rest: bytes) -> None:
        weights = self.adapters.files[which % len(OPTIONS)][1]
        fields, tensors = (copy.copy(part) for part in self.adapters.parsed[which % len(OPTIONS)])
        edit(fields, FIELDS, tensors, rest)
        if any(a >= 144 for a in rest[::3]):
            weights = safetensors.torch.save(tensors)
        self.adapters.load(json.dumps(fields).encode(), weights, which >> 7)

    def state_json(self, which: int, rest: bytes) -> None:
        state = dict(self.states.states[which % 3])
        state[next(key for key in state if "quant_state" in key)] = torch.tensor(list(rest), dtype=torch.uint8)
        self.states.read(state)

    def edited_state(self, which: int, rest: bytes) -> None:
        state = dict(self.states.states[which % 3])
        key = next(key for key in state if "quant_state" in key)
        fields = json.loads(bytes(state.pop(key).tolist()))
        edit(fields, STATE_FIELDS, state, rest)
        state[key] = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)
        self.states.read(state)

    def seeds(self) -> list[bytes]:
        """What is valid, to begin with."""
        seeds = []
        for i, (config, weights) in enumerate(self.adapters.files):
            for which in (i, next(n for n in range(128, 256) if n % len(OPTIONS) == i)):
                seeds += [bytes([0, which]) + config, bytes([1, which]) + weights, bytes([2, which, 0, 0, 0])]
        for i, state in enumerate(self.states.states):
            key = next(key for key in state if "quant_state" in key)
            seeds += [bytes([4, i]) + bytes(state[key].tolist()), bytes([6, i, 160, 0, 7])]
        return seeds
