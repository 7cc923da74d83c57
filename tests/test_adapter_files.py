"""Adapter files: PEFT reads what lora_ops writes, and the other way round; what is damaged is refused whole."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from no_room import full_disk, public_folder, read_only
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import lora_ops
from lora_ops import LoraConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Block(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(12, 20), nn.Linear(12, 20, bias=False), nn.Linear(20, 12)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x) * self.gate(x))


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(dtype), Block(dtype))


OPTIONS = {
    "lora": {},
    "all linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.(up|down)"},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"up": 2, r"1\.down": 7}, "alpha_pattern": {"down": 3}},
    "excluded": {"exclude_modules": ["0.up"]},
    "dropout": {"lora_dropout": 0.25},
    "lora_only": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "dora": {"use_dora": True},
    "dora, rslora, patterns": {"use_dora": True, "use_rslora": True, "rank_pattern": {"up": 2}, "alpha_pattern": {"down": 3}},
    "dora, dropout, all biases": {"use_dora": True, "lora_dropout": 0.25, "bias": "all"},
    "lora_bias": {"lora_bias": True},
    "lora_bias, rslora, patterns": {"lora_bias": True, "use_rslora": True, "rank_pattern": {"up": 2, r"1\.down": 7}},
    "lora_bias, lora_only": {"lora_bias": True, "bias": "lora_only"},
    "lora_bias, all biases": {"lora_bias": True, "bias": "all"},
    "lora_bias, no bias to merge into": {"lora_bias": True, "target_modules": ["gate"]},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def options_of(options: dict) -> dict:
    return {"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"], "init_lora_weights": False, **options}


def read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)


def assert_same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@every_option
def test_from_peft_and_back(tmp_path: Path, options: dict) -> None:
    theirs = peft.get_peft_model(model_of(), peft.LoraConfig(**options_of(options)))
    for p in theirs.parameters():  # biases, too, where they train
        if p.requires_grad:
            p.data.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lora_ops.load_adapter(model_of(), tmp_path / "theirs")
    lora_ops.save_adapter(ours, tmp_path / "ours")
    assert_same_tensors(read(tmp_path / "theirs")[1], read(tmp_path / "ours")[1])
    again = peft.PeftModel.from_pretrained(model_of(), tmp_path / "ours")
    state = {name: t for name, t in theirs.state_dict().items() if "lora_" in name or name.endswith("bias")}
    after = again.state_dict()
    assert all(torch.equal(after[name], t) for name, t in state.items())
    scalings = [
        [m.scaling["default"] for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)] for model in (theirs, again)
    ]
    assert scalings[0] == scalings[1] == [layer.scaling["default"] for _, layer in lora_ops.lora_layers(ours)]


@every_option
def test_to_peft_and_back(tmp_path: Path, options: dict) -> None:
    ours = lora_ops.add_lora(model_of(), LoraConfig(**options_of(options)))
    for p in ours.parameters():
        if p.requires_grad:
            p.data.normal_()
    lora_ops.save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(model_of(), tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_tensors(read(tmp_path / "ours")[1], read(tmp_path / "theirs")[1])
    for name, layer in lora_ops.lora_layers(ours):
        stock = theirs.base_model.model.get_submodule(name)
        assert all(getattr(layer, field) == getattr(stock, field) for field in ("r", "scaling", "use_dora", "lora_bias"))
    again = lora_ops.load_adapter(model_of(), tmp_path / "theirs")
    assert_same_tensors(dict(ours.state_dict()), dict(again.state_dict()))


def test_configuration_has_peft_s_fields(tmp_path: Path) -> None:
    peft.get_peft_model(model_of(), peft.LoraConfig(**options_of({}))).save_pretrained(tmp_path / "theirs")
    lora_ops.save_adapter(lora_ops.add_lora(model_of(), LoraConfig(**options_of({}))), tmp_path / "ours")
    theirs, ours = (read(tmp_path / name)[0] for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    differ = {field for field in theirs if theirs[field] != ours[field] and field != "target_modules"}
    assert differ <= {"auto_mapping", "peft_version"}
    assert sorted(theirs["target_modules"]) == ours["target_modules"]
    header = (tmp_path / "ours" / WEIGHTS).read_bytes()[8:60]
    assert b'"__metadata__":{"format":"pt"}' in header


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    ours = lora_ops.add_lora(model_of(dtype), LoraConfig(**options_of({})), adapter_dtype=dtype)
    lora_ops.save_adapter(ours, tmp_path)
    again = lora_ops.load_adapter(model_of(dtype), tmp_path)
    assert_same_tensors(dict(ours.state_dict()), dict(again.state_dict()))
    beside_fp32 = lora_ops.load_adapter(model_of(), tmp_path)
    assert {p.dtype for p in lora_ops.lora_parameters(beside_fp32)} == {torch.float32}


@pytest.mark.parametrize("magnitude", [torch.float32, torch.bfloat16], ids=str)
def test_magnitudes_have_a_dtype_of_their_own(tmp_path: Path, magnitude: torch.dtype) -> None:
    """fp32 beside bf16 factors, as TRL leaves them, or bf16, as PEFT makes them without `autocast_adapter_dtype`."""
    config = peft.LoraConfig(**options_of({"use_dora": True}))
    theirs = peft.get_peft_model(model_of(torch.bfloat16), config, autocast_adapter_dtype=False)
    for name, p in theirs.named_parameters():
        if "magnitude" in name:
            p.data = p.data.to(magnitude)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lora_ops.load_adapter(model_of(torch.bfloat16), tmp_path / "theirs")
    lora_ops.save_adapter(ours, tmp_path / "ours")
    saved = read(tmp_path / "theirs")[1]
    assert {t.dtype for name, t in saved.items() if name.endswith("lora_magnitude_vector")} == {magnitude}
    assert_same_tensors(saved, read(tmp_path / "ours")[1])
    beside_fp32 = lora_ops.load_adapter(model_of(), tmp_path / "theirs")
    assert {p.dtype for p in lora_ops.lora_parameters(beside_fp32)} == {torch.float32}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_conv1d(tmp_path: Path, options: dict) -> None:
    def gpt2() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=16))

    config = peft.LoraConfig(r=3, target_modules=["c_attn", "c_fc"], init_lora_weights=False, fan_in_fan_out=True, **options)
    theirs = peft.get_peft_model(gpt2(), config)
    theirs.save_pretrained(tmp_path / "theirs")
    lora_ops.save_adapter(lora_ops.load_adapter(gpt2(), tmp_path / "theirs"), tmp_path / "ours")
    assert_same_tensors(read(tmp_path / "theirs")[1], read(tmp_path / "ours")[1])


def test_several_adapters(tmp_path: Path) -> None:
    """Each in a folder of its own, added to a model, made active, given new numbers."""
    model = lora_ops.add_lora(model_of(), LoraConfig(**options_of({})))
    lora_ops.add_adapter(model, LoraConfig(**options_of({"r": 2})), "other")
    assert lora_ops.save_adapter(model, tmp_path, "other") == tmp_path / "other"
    fresh = lora_ops.add_lora(model_of(), LoraConfig(**options_of({})))
    lora_ops.load_adapter(fresh, tmp_path, "other")
    x = torch.randn(3, 12)
    before = fresh(x)
    for m in (model, fresh):
        lora_ops.set_adapter(m, "other")
    assert torch.equal(fresh(x), model(x))
    assert not torch.equal(fresh(x), before)
    for _, layer in lora_ops.lora_layers(model):
        layer.lora_B["other"].data.neg_()
    lora_ops.save_adapter(model, tmp_path, "other")
    lora_ops.load_adapter(fresh, tmp_path, "other")
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_quantised_models_take_them(tmp_path: Path, options: dict) -> None:
    def quantised(init: bool) -> nn.Module:
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=init, **options)
        return lora_ops.add_lora(nn.Sequential(nn.Linear(64, 20)), config, quant="nf4")

    model, fresh = quantised(False), quantised(True)
    lora_ops.save_adapter(model, tmp_path)
    x = torch.randn(3, 64)
    assert torch.equal(lora_ops.load_adapter(fresh, tmp_path)(x), model(x))


def test_another_kind_of_adapter_is_added_and_not_put_in_its_place(tmp_path: Path) -> None:
    for name, options in (("lora", {}), ("dora", {"use_dora": True}), ("bias", {"lora_bias": True})):
        lora_ops.save_adapter(lora_ops.add_lora(model_of(), LoraConfig(**options_of(options))), tmp_path / name)
    x, kinds = torch.randn(3, 12), ("lora", "dora", "bias")
    for inside in kinds:
        for other in kinds:
            model = lora_ops.load_adapter(model_of(), tmp_path / inside)
            if other != inside:
                field = "lora_bias" if "bias" in (inside, other) and "dora" not in (inside, other) else "use_dora"
                with pytest.raises(
                    ValueError, match=rf'0.up has an adapter "default" with {field}=\w+, and .* says \w+: delete'
                ):
                    lora_ops.load_adapter(model, tmp_path / other)
            before = model(x)
            lora_ops.load_adapter(model, tmp_path / other, "other")
            assert torch.equal(model(x), before)
            lora_ops.set_adapter(model, "other")
            assert torch.equal(model(x), lora_ops.load_adapter(model_of(), tmp_path / other)(x))


# --- what is damaged --------------------------------------------------------------------------------------------------


def config_with(**fields) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | fields))

    return change


def tensors_with(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return changed


def bytes_of(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def of_dtype(name: str, size: float) -> Callable[[Path], None]:
    """A file of one tensor of eight elements."""

    def change(folder: Path) -> None:
        header = json.dumps({KEY: {"dtype": name, "shape": [8], "data_offsets": [0, int(8 * size)]}}).encode()
        header += b" " * (-len(header) % 8)
        (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(int(8 * size)))

    return change


KEY = "base_model.model.0.up.lora_A.weight"
MAGNITUDE, BIAS = "base_model.model.0.up.lora_magnitude_vector", "base_model.model.0.up.lora_B.bias"


def put(key: str, t: Tensor) -> Callable[[Path], None]:
    return tensors_with(lambda tensors: tensors.update({key: t}))


def without(key: str) -> Callable[[Path], None]:
    return tensors_with(lambda tensors: tensors.pop(key))


def renamed(key: str, new: str) -> Callable[[Path], None]:
    return tensors_with(lambda tensors: tensors.update({new: tensors.pop(key)}))


DAMAGED = {
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), FileNotFoundError, WEIGHTS),
    "no configuration": (lambda folder: (folder / CONFIG).unlink(), FileNotFoundError, CONFIG),
    "weights cut short": (bytes_of(WEIGHTS, lambda b: b[:-5]), ValueError, "damaged"),
    "weights cut in the header": (bytes_of(WEIGHTS, lambda b: b[:40]), ValueError, "damaged"),
    "weights too long": (bytes_of(WEIGHTS, lambda b: b + b"1234"), ValueError, "damaged"),
    "weights are nothing": (bytes_of(WEIGHTS, lambda b: b""), ValueError, "damaged"),
    "weights are a pickle": (lambda folder: torch.save({}, folder / WEIGHTS), ValueError, "damaged"),
    "a dtype that torch does not have": (of_dtype("F4", 0.5), ValueError, "dtype 'F4', which torch does not have"),
    "header is not JSON": (bytes_of(WEIGHTS, lambda b: b[:8] + b"x" + b[9:]), ValueError, "damaged"),
    "configuration cut short": (bytes_of(CONFIG, lambda b: b[:-9]), ValueError, "damaged"),
    "configuration is not text": (bytes_of(CONFIG, lambda b: b"\xff\xfe" + b), ValueError, "damaged"),
    "configuration is a list": (bytes_of(CONFIG, lambda b: b"[1]"), ValueError, "object"),
    "another method": (config_with(peft_type="VERA"), ValueError, "peft_type"),
    "no targets": (config_with(target_modules=None), ValueError, "target_modules"),
    "rank is no number": (config_with(r="four"), ValueError, "r must be"),
    "another rank": (config_with(r=5), ValueError, r"0\.down\.lora_A\.weight must have shape \(5, 20\), got \(4, 20\)"),
    "scaling is not finite": (config_with(lora_alpha=float("nan")), ValueError, "lora_alpha"),
    "a later feature": (config_with(use_something_new=True), ValueError, "use_something_new"),
    "experts": (config_with(target_parameters=["w"]), ValueError, "target_parameters"),
    "base weights changed": (config_with(init_lora_weights="pissa_niter_4"), ValueError, "init_lora_weights"),
    "fewer targets": (config_with(target_modules=["up"]), ValueError, r"has .*0\.down\.lora_A\.weight"),
    "more targets": (config_with(target_modules=["up", "down", "gate"]), ValueError, r"lacks .*0\.gate\.lora_A\.weight"),
    "a tensor is missing": (without(KEY), ValueError, f"lacks {KEY}"),
    "a tensor too many": (put("base_model.model.2.up.lora_A.weight", torch.ones(4, 12)), ValueError, r"has .*2\.up"),
    "another shape": (put(KEY, torch.ones(4, 13)), ValueError, r"0\.up\.lora_A\.weight must have shape \(4, 12\)"),
    "integers": (put(KEY, torch.ones(4, 12, dtype=torch.int32)), ValueError, "int32"),
    "NaN": (put(KEY, torch.full((4, 12), float("nan"))), ValueError, f"{KEY} has values that are not finite"),
    "DoRA without magnitudes": (config_with(use_dora=True), ValueError, r"lacks .*0\.down\.lora_magnitude_vector"),
    "lora_bias without biases": (config_with(lora_bias=True), ValueError, r"lacks .*0\.down\.lora_B\.bias"),
    "a magnitude without DoRA": (put(MAGNITUDE, torch.ones(20)), ValueError, f"has {MAGNITUDE}, which"),
    "a bias of B without lora_bias": (put(BIAS, torch.ones(20)), ValueError, f"has {BIAS}, which"),
    "use_dora is no flag": (config_with(use_dora="yes"), ValueError, "use_dora must be True or False, got 'yes'"),
    "lora_bias is no flag": (config_with(lora_bias="all"), ValueError, "lora_bias must be True or False, got 'all'"),
    "DoRA with lora_bias": (config_with(use_dora=True, lora_bias=True), ValueError, "lora_bias must be False with use_dora"),
}
DAMAGED_DORA = {
    "a magnitude is missing": (without(MAGNITUDE), ValueError, f"lacks {MAGNITUDE}"),
    "a magnitude too many": (
        put("base_model.model.0.gate.lora_magnitude_vector", torch.ones(20)), ValueError, r"has .*0\.gate\.lora_magnitude",
    ),
    "a magnitude under the model's name": (renamed(MAGNITUDE, f"{MAGNITUDE}.weight"), ValueError, f"lacks {MAGNITUDE}$"),
    "a magnitude of another shape": (
        put(MAGNITUDE, torch.ones(20, 1)), ValueError, rf"{MAGNITUDE} must have shape \(20,\), got \(20, 1\)",
    ),
    "a magnitude of another layer": (put(MAGNITUDE, torch.ones(12)), ValueError, r"must have shape \(20,\), got \(12,\)"),
    "integer magnitudes": (put(MAGNITUDE, torch.ones(20, dtype=torch.int64)), ValueError, f"{MAGNITUDE} must be .*int64"),
    "an infinite magnitude": (put(MAGNITUDE, torch.full((20,), torch.inf)), ValueError, f"{MAGNITUDE} has values that are not"),
    "use_dora is off": (config_with(use_dora=False), ValueError, r"has .*0\.down\.lora_magnitude_vector, which"),
}  # fmt: skip
DAMAGED_BIAS = {
    "a bias of B is missing": (without(BIAS), ValueError, f"lacks {BIAS}"),
    "a bias of B of another shape": (put(BIAS, torch.ones(4)), ValueError, rf"{BIAS} must have shape \(20,\), got \(4,\)"),
    "a bias of A": (put("base_model.model.0.up.lora_A.bias", torch.ones(4)), ValueError, r"has .*0\.up\.lora_A\.bias, which"),
    "NaN in a bias of B": (put(BIAS, torch.full((20,), torch.nan)), ValueError, f"{BIAS} has values that are not finite"),
    "lora_bias is off": (config_with(lora_bias=False), ValueError, r"has .*0\.down\.lora_B\.bias, which"),
}
ALL_DAMAGED = [
    pytest.param(options, *case, id=name)
    for options, cases in (({}, DAMAGED), ({"use_dora": True}, DAMAGED_DORA), ({"lora_bias": True}, DAMAGED_BIAS))
    for name, case in cases.items()
]


@pytest.mark.parametrize("with_layers", [False, True], ids=["plain model", "model with LoRA"])
@pytest.mark.parametrize(("options", "damage", "kind", "words"), ALL_DAMAGED)
def test_what_is_damaged_is_refused_whole(
    tmp_path: Path, options: dict, damage: Callable[[Path], None], kind: type[Exception], words: str, with_layers: bool
) -> None:
    lora_ops.save_adapter(lora_ops.add_lora(model_of(), LoraConfig(**options_of(options))), tmp_path)
    damage(tmp_path)
    model = model_of()
    if with_layers:
        lora_ops.add_lora(model, LoraConfig(**options_of(options)))
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(kind, match=words):
        lora_ops.load_adapter(model, tmp_path)
    assert list(model.modules()) == modules
    assert_same_tensors(dict(model.state_dict()), dict(state))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def changed(model: nn.Module) -> nn.Module:
    for _, layer in lora_ops.lora_layers(model):
        layer.lora_B["default"].data.sub_(1)
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_a_full_disk_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """At either file, and nothing half written stays beside them."""
    model = lora_ops.add_lora(model_of(), LoraConfig(**options_of({})))
    lora_ops.save_adapter(model, tmp_path)
    before = contents(tmp_path)
    if file == CONFIG:  # the smaller one, which a real limit lets through
        monkeypatch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(OSError(27, "File too large")))
    words = f"{file} is not written, and what was there stays: File too large"
    with full_disk(100 if file == WEIGHTS else 1 << 30), pytest.raises(OSError, match=words):
        lora_ops.save_adapter(changed(model), tmp_path)
    assert contents(tmp_path) == before


def test_a_read_only_folder_keeps_its_files() -> None:
    model = lora_ops.add_lora(model_of(), LoraConfig(**options_of({})))
    with public_folder() as folder:
        lora_ops.save_adapter(model, folder)
        before = contents(folder)
        with read_only(folder):
            with pytest.raises(PermissionError, match=r"adapter_model.safetensors is not written, and what was there stays"):
                lora_ops.save_adapter(changed(model), folder)
            with pytest.raises(PermissionError, match=f"{folder}/new"):
                lora_ops.save_adapter(model, folder / "new")
        assert contents(folder) == before


def test_an_adapter_that_is_not_there() -> None:
    model = lora_ops.add_lora(model_of(), LoraConfig(**options_of({})))
    with pytest.raises(ValueError, match=r"adapter_name must be an adapter .* got 'other'"):
        lora_ops.save_adapter(model, "nowhere", "other")
    assert not Path("nowhere").exists()
