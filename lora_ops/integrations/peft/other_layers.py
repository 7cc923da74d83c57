"""What `layers.py` is to PEFT's embeddings and convolutions."""

from typing import Any

import torch
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn

from ... import log
from ...convolution import CONVOLUTIONS, Geometry, lora_convolve
from ...embedding import add_low_rank
from ...stacking import stack
from .layers import (
    Fused,
    Layer,
    active,
    bias_of,
    dropout_of,
    is_plain,
    of_adapter,
    of_state,
    of_weight,
    takes,
    why_not_now,
)


class FusedConv(Fused):
    """PEFT's `lora.Conv1d`, `2d` or `3d`, where the convolution is a matrix product."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not args and not kwargs and takes(self, x) and why_not_conv(self) is None:
            return conv_forward(self, x)
        if log.ON:
            log.say(f"PEFT's forward, since {why_not_now(self, x, why_not_conv, *args, **kwargs)}")
        return super(Fused, self).forward(x, *args, **kwargs)  # type: ignore[misc]

    def _get_name(self) -> str:  # PEFT tells layers apart by it
        return type(self).__name__.removeprefix("Fused")


class FusedConv1d(FusedConv, peft_layer.Conv1d):
    pass


class FusedConv2d(FusedConv, peft_layer.Conv2d):
    pass


class FusedConv3d(FusedConv, peft_layer.Conv3d):
    pass


class FusedEmbedding(Fused, peft_layer.Embedding):
    """PEFT's `lora.Embedding`: the lookups are PEFT's, the low-rank term is one product that adds to them."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not args and not kwargs and not torch.jit.is_tracing() and why_not_embedding(self) is None:
            if log.ON:
                log.say("PEFT's lookups, one product for all that adapters add")
            return embedding_forward(self, x)
        if log.ON:
            log.say(f"PEFT's forward, since {why_not_now(self, x, why_not_embedding, *args, **kwargs)}")
        return super(Fused, self).forward(x, *args, **kwargs)

    def _get_name(self) -> str:
        return "Embedding"


def why_not_conv(layer: Layer) -> str | None:
    """`why_not` of a convolution."""
    names, base = active(layer), layer.base_layer
    if why := of_state(layer, names):
        return why
    if not is_plain(base):
        return "its base layer has hooks or another forward"
    if type(base) not in CONVOLUTIONS:
        return f"its base layer is a {type(base).__name__}"
    if not Geometry.of(base).is_product:
        return "its convolution is no matrix product: windows overlap, are padded, have holes, or are in groups"
    if why := of_weight(base):
        return why
    for name in names:
        if why := of_adapter(layer, name, type(base)):
            return f'adapter "{name}": {why}'
    return None


def conv_forward(layer: Layer, x: Tensor) -> Tensor:
    """What the layer's forward gives, for a layer of which `why_not_conv` knows no reason against it."""
    base, names = layer.base_layer, active(layer)
    dropouts = [dropout_of(layer, name) for name in names]
    first = names if not any(dropouts) else names[:1]  # a mask of its own for every adapter
    A, B, scaling = stack(
        [layer.lora_A[name].weight.flatten(1) for name in first],
        [layer.lora_B[name].weight.flatten(1) for name in first],
        [layer.scaling[name] for name in first],
    )
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    if A.dtype not in (dtype, torch.float32):  # another half, or a half beside fp32
        A, B = A.float(), B.float()
    options: dict[str, Any] = {"scaling": scaling, "dropout_p": dropouts[0], "training": layer.training}
    y = lora_convolve(x, base.weight, A, B, Geometry.of(base), bias_of(layer, first), **options)
    for name in names[len(first) :]:
        A, B = layer.lora_A[name], layer.lora_B[name]
        y = y + (B(A(layer.lora_dropout[name](x.to(A.weight.dtype)))) * layer.scaling[name]).to(y.dtype)
    return y


def why_not_embedding(layer: Layer) -> str | None:
    """`why_not` of an embedding."""
    names = [name for name in layer.active_adapters if name in layer.lora_embedding_A]
    if why := of_state(layer, names):
        return why
    for name in names:
        factors = (layer.lora_embedding_A[name], layer.lora_embedding_B[name])
        if name in layer.lora_variant:
            return f'adapter "{name}": it is a {type(layer.lora_variant[name]).__name__.removesuffix("Variant")}'
        if any(type(factor) is not nn.Parameter or factor.is_meta for factor in factors):
            return f'adapter "{name}": its factors are {type(factors[0]).__name__}, or on meta'
        if name in getattr(layer, "input_fns", {}):
            return f'adapter "{name}": it is distributed'
    return None


def embedding_forward(layer: Layer, ids: Tensor) -> Tensor:
    """What the layer's forward gives, for a layer of which `why_not_embedding` knows no reason against it."""
    names = [name for name in layer.active_adapters if name in layer.lora_embedding_A]
    y = layer.base_layer(ids)
    looked_up = [layer._embed(ids, layer.lora_embedding_A[name].T) for name in names]
    Bs, scalings = [layer.lora_embedding_B[name] for name in names], [layer.scaling[name] for name in names]
    scale = layer._get_embed_scale() if hasattr(layer, "_get_embed_scale") else None
    return add_low_rank(y, looked_up, Bs, scalings, scale)


WHY_NOT = {FusedConv1d: why_not_conv, FusedConv2d: why_not_conv, FusedConv3d: why_not_conv, FusedEmbedding: why_not_embedding}
