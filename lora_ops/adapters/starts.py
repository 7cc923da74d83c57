"""What files say of initialisations that give an adapter a weight of its own."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..nn.linear import FusedLoraLinear
from .kinds import LoraLayer

KEEP_W0 = (True, False, "gaussian", "eva", "orthogonal")  # initialisations that leave W0 as it is
FOLLOW_FROM_W0 = ("pissa", "olora", "loftq")  # those whose weight depends on W0 alone, and is always the same

Plain = dict[str, tuple[Tensor, Tensor, int, float]]  # by layer: A, B, r and lora_alpha beside W0


def start_of(layer: LoraLayer, adapter_name: str) -> str | None:
    """The initialisation that gave the adapter a weight of its own, if one did."""
    start = layer.starts.get(adapter_name) if isinstance(layer, FusedLoraLinear) else None
    return None if start is None else start.init


def initialisation_in_file(
    layers: Mapping[str, LoraLayer], adapter_name: str, configured: bool | str
) -> tuple[dict[str, Any], Plain]:
    """What the file says of the initialisation, and of layers that it can say nothing of, what they are beside W0."""
    starts = {start_of(layer, adapter_name) for layer in layers.values()}
    init, _, iterations = next(iter(starts - {None}), "").partition("_iter_")  # type: ignore[union-attr]
    if len(starts) == 1 and init in FOLLOW_FROM_W0:
        loftq = {"loftq_bits": 4, "loftq_iter": int(iterations or 1)}
        return {"init_lora_weights": init, "loftq_config": loftq if init == "loftq" else {}}, {}
    kept = configured if starts == {None} and configured in KEEP_W0 else True
    plain = {
        name: layer.plain_lora(adapter_name)
        for name, layer in layers.items()
        if isinstance(layer, FusedLoraLinear) and adapter_name in layer.starts
    }
    return {"init_lora_weights": kept, "loftq_config": {}}, plain
