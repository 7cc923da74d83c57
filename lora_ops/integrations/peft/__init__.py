"""PEFT models on the fused kernels.

    model = get_peft_model(model, config)
    lora_ops.integrations.peft.patch(model)

Parameters, names, files, merging and every method of PEFT's stay what they are: a patched layer is PEFT's own with another
forward, and falls back to PEFT's where it has to (`report`).
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, Linear
from torch import nn

from .layers import Fused, FusedLinear, why_not
from .other_layers import WHY_NOT, FusedConv1d, FusedConv2d, FusedConv3d, FusedEmbedding

__all__ = ["Report", "patch", "register", "report", "unpatch"]

Model = TypeVar("Model", bound=nn.Module)


def _fused_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """PEFT's layers, each with its fused form."""
    classes: dict[type[nn.Module], type[nn.Module]] = {
        Linear: FusedLinear,
        Conv1d: FusedConv1d,
        Conv2d: FusedConv2d,
        Conv3d: FusedConv3d,
        Embedding: FusedEmbedding,
    }
    if find_spec("bitsandbytes") is not None:
        from .layers_4bit import FusedLinear4bit, Linear4bit

        classes[Linear4bit] = FusedLinear4bit
    return classes


def patch(model: Model) -> Model:
    """Gives the LoRA layers of a PEFT model, in place, a fused forward and backward. Nothing else of them changes.

    Fused are `lora.Linear` over `nn.Linear` and transformers' `Conv1D`, and `lora.Linear4bit` over bitsandbytes' 4-bit layers;
    with dropout, biases (the base layer's and B's), rsLoRA, DoRA, several active adapters, adapters in fp32, bf16 or fp16,
    under autocast or not. So are `lora.Embedding` (but for DoRA), and `lora.Conv1d`, `2d` and `3d` where the convolution is a
    matrix product: kernels of size 1, or windows that do not overlap, as of patches, without padding and groups. Whatever else
    a layer is asked for goes to PEFT's forward; `report` says which and why.

    Adapters that are added later are fused, too. A 4-bit layer keeps a second copy of its codes, in the kernels' order, from
    its first call on.

    Raises:
        ValueError: the model has no layer to patch; it is left untouched.
    """
    classes = _fused_classes()
    layers = [m for m in model.modules() if type(m) in classes]
    if not layers and not any(isinstance(m, Fused) for m in model.modules()):
        raise ValueError(
            "model must have LoRA layers of PEFT's over linear layers, embeddings or convolutions (peft.get_peft_model, "
            "PeftModel.from_pretrained), got a "
            f"{type(model).__name__} without any"
        )
    for layer in layers:
        layer.__class__ = classes[type(layer)]
    return model


def unpatch(model: Model) -> Model:
    """Gives patched layers PEFT's own forward back."""
    stock = {fused: peft for peft, fused in _fused_classes().items()}
    for layer in model.modules():
        if type(layer) in stock:
            layer.__class__ = stock[type(layer)]
            for name in [name for name in layer.__dict__ if name.startswith("_lora_ops_")]:
                del layer.__dict__[name]
    return model


def register(config: LoraConfig) -> LoraConfig:
    """Has PEFT make fused layers of `nn.Linear`: `get_peft_model(model, register(config))`.

    `Conv1D` and 4-bit layers become PEFT's own, which `patch` takes. PEFT does not save it: with
    `PeftModel.from_pretrained`, give it `config=register(...)`, or `patch` the model.
    """

    def linear(target: nn.Module, adapter_name: str, *, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
        base = target.get_base_layer() if isinstance(target, LoraLayer) else target
        if kwargs.get("parameter_name") is not None or type(base) is not nn.Linear:
            return None  # PEFT goes on to its own layers
        return FusedLinear(target, adapter_name, config=config, **kwargs)

    config._register_custom_module({nn.Linear: linear})  # type: ignore[dict-item]  # called, not subclassed
    return config


@dataclass
class Report:
    """Of the LoRA layers of a model, by their names."""

    fused: list[str]
    not_fused: dict[str, str]  # and why
    bytes_4bit: int  # that second copies of 4-bit codes take

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} of {len(self.fused) + len(self.not_fused)} LoRA layers run fused"]
        lines += [f"  {name}: not fused, since {why}" for name, why in self.not_fused.items()]
        if self.bytes_4bit:
            lines.append(f"{self.bytes_4bit / 2**20:.1f} MiB of 4-bit codes in the kernels' order")
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """Which layers run fused as they are now, and why the others do not."""
    found = Report([], {}, 0)
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        of_class = WHY_NOT.get(type(layer), why_not)
        why = of_class(layer) if isinstance(layer, Fused) else f"a {type(layer).__name__} is not patched"
        if why is None:
            found.fused.append(name)
        else:
            found.not_fused[name] = why
        kept = layer.__dict__.get("_lora_ops_weight")
        found.bytes_4bit += 0 if kept is None else kept[1].codes.nbytes
    return found
