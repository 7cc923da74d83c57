"""Embeddings and convolutions with adapters: PEFT's, ours with the same numbers, PEFT's in fp64."""

import copy
from typing import Any

import compare
import torch
from compare import Dtypes, Results
from peft import LoraConfig, PeftModel, get_peft_model
from peft_layers import One
from torch import Tensor, nn

from lora_ops import FusedLoraConv1d, FusedLoraConv2d, FusedLoraConv3d, FusedLoraEmbedding

FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
CONSTRUCTORS = {
    nn.Embedding: FusedLoraEmbedding.from_embedding,
    nn.Conv1d: FusedLoraConv1d.from_conv,
    nn.Conv2d: FusedLoraConv2d.from_conv,
    nn.Conv3d: FusedLoraConv3d.from_conv,
}


def with_peft(base: nn.Module, dtypes: Dtypes, names: tuple[str, ...] = ("default",), **options: Any) -> PeftModel:
    """A model of one layer of PEFT's with adapters of different ranks and scalings, all active, that do something."""
    model: Any = One(base.to(dtypes.x))
    options = {"target_modules": ["layer"], "init_lora_weights": False, **options}
    for i, name in enumerate(names):
        config = LoraConfig(**{"r": 4 + 2 * i, "lora_alpha": 6 + 3 * i, **options})
        if i == 0:
            model = get_peft_model(model, config, autocast_adapter_dtype=False)
        else:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
    model.base_model.set_adapter(list(names))
    for part in FACTORS:
        getattr(layer_of(model), part).to(dtypes.adapter)
    return model


def layer_of(model: PeftModel) -> Any:
    return model.base_model.model.layer


def factors(layer: Any) -> dict[str, nn.Parameter]:
    """A and B of every adapter, of PEFT's layers and of ours, under the names that ours have."""
    found = {}
    for part in FACTORS:
        for name, factor in getattr(layer, part, {}).items():
            if not part.startswith("lora_emb") and isinstance(layer, FusedLoraEmbedding):
                continue
            found[f"{part}.{name}"] = factor.weight if isinstance(factor, nn.Module) else factor
    return found


def ours_like(theirs: Any) -> Any:
    """Our layer over a copy of the base layer of PEFT's, with its adapters' numbers."""
    base = copy.deepcopy(theirs.base_layer)
    make = next(make for kind, make in CONSTRUCTORS.items() if isinstance(base, kind))
    names = list(theirs.r)
    for i, name in enumerate(names):
        dropout = getattr(theirs.lora_dropout[name], "p", 0.0)
        options = {"r": theirs.r[name], "lora_alpha": theirs.lora_alpha[name], "use_rslora": theirs.use_rslora[name]}
        options |= {"lora_dropout": dropout, "adapter_dtype": next(iter(factors(theirs).values())).dtype}
        if i == 0:
            layer = make(base, adapter_name=name, **options)
        else:
            layer.add_adapter(name, **options)
    layer.set_adapter(names)
    numbers = factors(theirs)
    with torch.no_grad():
        for name, factor in factors(layer).items():
            factor.copy_(numbers[name])
    return layer


def run(layer: nn.Module, x: Tensor, draw: int = 0) -> Results:
    """y and the gradients of x, where it has one, of the factors and of a bias that trains."""
    x = x.detach().requires_grad_(x.is_floating_point())
    torch.manual_seed(draw)
    y = layer(x)
    leaves = {"x": x} if x.requires_grad else {}
    leaves |= {name: p for name, p in factors(layer).items() if p.requires_grad}
    bias = getattr(getattr(layer, "base_layer", layer), "bias", None)
    if bias is not None and bias.requires_grad:
        leaves["bias"] = bias
    generator = torch.Generator().manual_seed(draw)
    dy = torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype)  # the same for every dtype
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | {name: g.to_dense() for name, g in zip(leaves, grads, strict=True)}


def errors(layer: nn.Module, theirs: nn.Module, x: Tensor, wide: nn.Module | None = None) -> dict[str, compare.Error]:
    """Of our layer's output and gradients, beside those of PEFT's."""
    wide = copy.deepcopy(theirs).double() if wide is None else wide
    exact = run(wide, x.double() if x.is_floating_point() else x)
    actual, eager = run(layer, x), run(theirs, x)
    assert actual.keys() == eager.keys() == exact.keys()
    return {name: compare.error(actual[name], eager[name], exact[name]) for name in actual}


def assert_as_near(layer: nn.Module, theirs: nn.Module, x: Tensor, wide: nn.Module | None = None) -> None:
    compare.assert_within_bound(errors(layer, theirs, x, wide))
