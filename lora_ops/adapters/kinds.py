"""The kinds of layers that get adapters: what stands in for each, and its adapter's names and shapes."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..nn.conv import FusedLoraConv, FusedLoraConv1d, FusedLoraConv2d, FusedLoraConv3d, conv_factor_shapes, is_conv
from ..nn.dense import DenseAdapters, check_plain
from ..nn.embedding import FusedLoraEmbedding, is_embedding
from ..nn.linear import FusedLoraLinear, is_conv1d

LoraLayer = FusedLoraLinear | DenseAdapters


def from_layer(module: nn.Module) -> Callable[..., LoraLayer]:
    """The constructor of the layer that stands in for the module. Those of layers that are not linear know no 4-bit weights."""
    if is_embedding(module):
        return FusedLoraEmbedding.from_embedding
    for fused in (FusedLoraConv1d, FusedLoraConv2d, FusedLoraConv3d):
        if is_conv(module) and isinstance(module, fused.conv_class):
            return fused.from_conv
    return FusedLoraLinear.from_linear


def check_variants(module: nn.Module, use_dora: bool, lora_bias: bool, init_lora_weights: bool | str = True) -> None:
    """Raises ValueError for what only linear layers can have."""
    if isinstance(module, DenseAdapters) or is_embedding(module) or is_conv(module):
        check_plain(use_dora, lora_bias, init_lora_weights)


def factor_names(module: nn.Module) -> tuple[str, str]:
    """Of A and B in PEFT's files, behind the module's name."""
    if isinstance(module, nn.Embedding | FusedLoraEmbedding):
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


def factor_shapes(module: Any, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of A and B of a layer, or of the one that stands in for it.

    Raises:
        ValueError: the layer cannot have an adapter of that rank.
    """
    if isinstance(module, FusedLoraConv) or is_conv(module):
        return conv_factor_shapes(module, r)
    if isinstance(module, nn.Embedding | FusedLoraEmbedding):
        K, N = module.num_embeddings, module.embedding_dim
    elif is_conv1d(module):
        K, N = module.nx, module.nf
    else:
        K, N = module.in_features, module.out_features
    return (r, K), (N, r)


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Puts new modules in all the places of old ones."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in new:
                setattr(parent, name, new[child])
