"""4-bit weights under fully_shard: their tensors as frozen parameters, which it shards by rows and gathers as any other."""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..nn.frozen import FrozenWeight
from ..quant import NF4Weight

Model = TypeVar("Model", bound=nn.Module)


class FourBitTensors(nn.Module):
    """The tensors of an NF4Weight under their own names, as parameters that do not train."""

    def __init__(self, weight: NF4Weight) -> None:
        super().__init__()
        self._like = weight.apply(lambda t: t.new_empty(t.shape, device="meta"))
        for name, t in weight._tensors().items():
            # fully_shard takes no scalars.
            self.register_parameter(name, nn.Parameter(t.reshape(-1) if t.dim() == 0 else t, requires_grad=False))

    def weight(self) -> NF4Weight:
        """The weight that these tensors, wherever they lie at present, are."""
        weight = copy.copy(self._like)  # checked when it was made
        for name, p in self._parameters.items():
            whole = name == "offset" and not isinstance(p, DTensor)
            object.__setattr__(weight, name, p.view(()) if whole and p is not None else p)
        return weight

    def _apply(self, fn: Any, recurse: bool = True) -> "FourBitTensors":
        def moved(t: Tensor) -> Tensor:
            new = fn(t)
            return new if new.dtype == t.dtype else t.to(new.device)  # a cast is not meant for codes and scales

        return super()._apply(moved, recurse)


class Registered4bit(FrozenWeight):
    """A layer whose 4-bit weight is a `FourBitTensors`. `weight` is made of it at every use: fully_shard puts other tensors
    there before and after every call."""

    qweight: FourBitTensors

    @property
    def weight(self) -> NF4Weight:
        return self.qweight.weight()

    @weight.setter
    def weight(self, weight: NF4Weight) -> None:
        raise RuntimeError("the weight of this layer is registered (register_4bit) and cannot be replaced")

    def merge(self, to: torch.dtype | None = None) -> None:
        raise RuntimeError(
            "merge needs a layer that is not registered (register_4bit): save the adapter and merge it elsewhere"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "Registered4bit":
        if "_norms" in vars(self):
            self._norms = None
        nn.Module._apply(self, fn, recurse)
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        nn.Module._save_to_state_dict(self, *args)

    def _load_from_state_dict(self, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, *args)


def register_4bit(model: Model) -> Model:
    """Makes the tensors of every layer's 4-bit weight frozen parameters, `<layer>.qweight.codes`, `.absmax`, ...: call it after
    `add_lora` and before `fully_shard`, which then shards 4-bit weights by rows like any other parameter and gathers 4.13 bits
    per weight. Without it they stay whole in every process, and nothing of them is ever communicated.

    A registered layer computes what it did. It cannot be merged, and its state dict has these names instead of bitsandbytes'.

    Returns:
        model.

    Raises:
        ValueError: there is no layer with a 4-bit weight, or one is merged or has an adapter with a weight of its own
            (`lora_ops.init`); nothing was changed.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, FrozenWeight) and isinstance(m.weight, NF4Weight)}
    if not layers:
        raise ValueError('model has no layer with a 4-bit weight; see add_lora(..., quant="nf4")')
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name} is merged; call unmerge_lora(model) first")
        if getattr(layer, "starts", None):
            raise ValueError(f"{name} has an adapter with a weight of its own: {next(iter(layer.starts))}")  # type: ignore[arg-type]
    for layer in layers.values():
        if isinstance(layer, Registered4bit):
            continue
        weight = vars(layer).pop("weight")
        layer.__class__ = type(f"Registered{type(layer).__name__}", (Registered4bit, type(layer)), {})
        layer.qweight = FourBitTensors(weight)
    return model
