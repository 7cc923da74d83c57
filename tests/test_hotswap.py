"""Another adapter in the place of one, in the shapes of the one."""

from pathlib import Path

import pytest
import torch
from tiny_models import Mlp, injected, make_layer, make_x
from torch import nn

from lora_ops import FusedLoraConv2d, hotswap_adapter, load_adapter, lora_layers, merge_lora, pad_adapter, save_adapter


def model_of(r: int, seed: int = 0, **fields) -> nn.Module:
    torch.manual_seed(0)
    model = Mlp()
    torch.manual_seed(seed)
    return injected(model, r=r, **fields)


@pytest.mark.parametrize("fields", [{}, {"lora_alpha": 3}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("r", [2, 6])
def test_a_swapped_adapter_computes_what_a_loaded_one_does(r: int, fields: dict, tmp_path: Path) -> None:
    x, other = torch.randn(5, 12), model_of(r, seed=1, **fields)
    save_adapter(other, tmp_path)
    torch.manual_seed(0)
    loaded = load_adapter(Mlp(), tmp_path)
    model = pad_adapter(model_of(3), 6)
    assert all(layer.scaling["default"] == 8 / 3 and layer.r["default"] == 6 for _, layer in lora_layers(model))
    before = model(x)
    torch.testing.assert_close(before, model_of(3)(x))
    parameters = list(model.parameters())
    hotswap_adapter(model, tmp_path)
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    torch.testing.assert_close(model(x), loaded(x))
    assert not torch.allclose(model(x), before, rtol=1e-2)


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}], ids=str)
def test_a_padded_adapter_is_saved_as_it_computes(fields: dict, tmp_path: Path) -> None:
    x, model = torch.randn(5, 12), model_of(3, **fields)
    before = model(x)
    save_adapter(pad_adapter(model, 7), tmp_path)
    torch.manual_seed(0)
    torch.testing.assert_close(load_adapter(Mlp(), tmp_path)(x), before)


def test_no_compilation_follows(tmp_path: Path) -> None:
    x, other = torch.randn(5, 12), model_of(2, seed=1, lora_alpha=5)
    save_adapter(other, tmp_path)
    model = pad_adapter(model_of(4), 8).requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        hotswap_adapter(model, tmp_path)
        torch.testing.assert_close(compiled(x), other(x))


def test_padding_keeps_output_scaling_and_flags() -> None:
    layer, x = make_layer(torch.float64, lora_alpha=3), make_x(torch.float64)
    before, scaling = layer(x), layer.scaling["default"]
    pad_adapter(nn.Sequential(layer), 9)
    torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)
    assert layer.scaling["default"] == scaling
    assert layer.lora_A["default"].shape[0] == layer.lora_B["default"].shape[1] == layer.r["default"] == 9
    assert layer.lora_A["default"].requires_grad
    layer.requires_grad_(False)
    pad_adapter(nn.Sequential(layer), 10)
    assert not layer.lora_A["default"].requires_grad


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 5}, "r must be at most 4 as in first, got 5; see pad_adapter"),
        ({"use_dora": True}, "use_dora must be False"),
        ({"bias": "all"}, "bias must be 'none'"),
        ({"modules_to_save": ["norm"]}, "modules_to_save must be None"),
        ({"target_modules": ["first"]}, r"layers with adapter 'default' differ in block\.0"),
    ],
    ids=str,
)
def test_what_does_not_fit_changes_nothing(fields: dict, words: str, tmp_path: Path) -> None:
    save_adapter(model_of(**{"r": 4, **fields}), tmp_path)
    model = model_of(4, seed=2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=words):
        hotswap_adapter(model, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_errors(tmp_path: Path) -> None:
    model = model_of(4)
    with pytest.raises(ValueError, match="r must be at least 4, the adapter's rank in first, got 3"):
        pad_adapter(model, 3)
    with pytest.raises(ValueError, match="got 'other'"):
        pad_adapter(model, 8, "other")
    with pytest.raises(FileNotFoundError):
        hotswap_adapter(model, tmp_path)
    merge_lora(model)
    with pytest.raises(RuntimeError, match="is merged; call unmerge"):
        hotswap_adapter(model, tmp_path)
    grouped = nn.Sequential(FusedLoraConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=2), 2))
    with pytest.raises(ValueError, match="0 is a convolution in groups"):
        pad_adapter(grouped, 4)
