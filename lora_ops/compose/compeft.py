"""ComPEFT: an adapter as signs, most of them 0, and one scale."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..adapters.injection import lora_layers
from ..adapters.writing import write_files
from ..registry import method

Model = TypeVar("Model", bound=nn.Module)

_PER_BYTE = 5  # of three values each: 3⁵ = 243
_POWERS = [3**i for i in range(_PER_BYTE)]


@dataclass(frozen=True)
class TernaryTensors:
    """Tensors by name, each element of which is -scale, 0 or scale. Five elements are one byte."""

    scale: float
    packed: Tensor  # (ceil(numel / 5),) uint8: Σ (sign_i + 1) 3^i
    shapes: dict[str, tuple[int, ...]]

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def bits(self) -> int:
        """What is stored: 1.6 bits an element, and 32 of the scale."""
        return 8 * self.packed.numel() + 32

    @property
    def entropy_bits(self) -> float:
        """What a perfect code of independent elements would store: n (H(k) + k) + 32, with k the density."""
        k = self._signs().count_nonzero().item() / max(self.numel, 1)
        entropy = -sum(p * math.log2(p) for p in (k, 1 - k) if p > 0)
        return self.numel * (entropy + k) + 32

    def decompress(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The tensors."""
        values = self._signs().to(dtype) * self.scale
        parts = values.split([math.prod(shape) for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file. Raises OSError where it cannot be written; an old one is as it was."""
        shapes = json.dumps([[name, list(shape)] for name, shape in self.shapes.items()])
        tensors = {"packed": self.packed, "scale": torch.tensor([self.scale])}
        write_files({Path(path): lambda to: save_file(tensors, to, metadata={"shapes": shapes})})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TernaryTensors":
        """Reads what `save` wrote. Raises ValueError for another file, or one whose parts do not belong together."""
        with safe_open(path, "pt") as file:
            shapes = (file.metadata() or {}).get("shapes")
            if shapes is None or set(file.keys()) != {"packed", "scale"}:
                raise ValueError(f"{os.fspath(path)} must hold packed, scale and shapes, as TernaryTensors.save writes them")
            packed, scale = file.get_tensor("packed"), file.get_tensor("scale").item()
        loaded = cls(scale, packed, {name: tuple(shape) for name, shape in json.loads(shapes)})
        if packed.dtype != torch.uint8 or packed.numel() != -(-loaded.numel // _PER_BYTE) or bool((packed > 242).any()):
            raise ValueError(f"{os.fspath(path)} is damaged: {packed.numel()} bytes for {loaded.numel} elements")
        return loaded

    def _signs(self) -> Tensor:
        powers = torch.tensor(_POWERS, dtype=torch.int16)
        digits = self.packed.to(torch.int16)[:, None] // powers % 3
        return digits.flatten()[: self.numel] - 1


@method(
    "ComPEFT",
    equation="τ → α std(τ) sign(τ) where |τ| is among the largest k of all elements, else 0; τ: all of an adapter's A and B",
    use='compose.compress(compose.adapter_tensors(model), density=0.2).save("adapter.ternary.safetensors")',
    changes="CQ",
    source="Yadav et al. 2023, https://arxiv.org/abs/2311.13171",
    test="test_compeft.py::test_ternary_with_one_scale",
    note="The official code keeps one element more than k; its STC baseline takes the mean of signed values for the scale.",
)
def compress(tensors: Mapping[str, Tensor], density: float, alpha: float = 1.0) -> TernaryTensors:
    """α std(τ) sign(τ) where |τ| is among the largest, else 0, over all tensors together.

    ComPEFT: Yadav et al. 2023 (https://arxiv.org/abs/2311.13171).

    Args:
        tensors: of an adapter, which starts from zero (`adapter_tensors`), or differences to where training started.
        density: which part of all elements stays, in (0, 1]: int(density · n) of them. 0.05 to 0.5 in the paper.
        alpha: times the standard deviation of all elements is the scale. Both are chosen on validation data in the paper.

    Raises:
        ValueError: density, alpha or a tensor that is out of its range, or no tensors.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be a positive number, got {alpha}")
    task = torch.cat([t.detach().float().flatten().cpu() for t in tensors.values()]) if tensors else torch.empty(0)
    if task.numel() < 2 or not torch.isfinite(task).all():
        raise ValueError(f"tensors must hold finite values, at least two in all, got {task.numel()}")
    signs = torch.zeros(-(-task.numel() // _PER_BYTE) * _PER_BYTE, dtype=torch.int16)
    kept = task.abs().topk(int(density * task.numel())).indices
    signs[kept] = task[kept].sign().to(torch.int16)
    packed = ((signs.view(-1, _PER_BYTE) + 1) * torch.tensor(_POWERS, dtype=torch.int16)).sum(1)
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    return TernaryTensors(alpha * task.std().item(), packed.to(torch.uint8), shapes)


def adapter_tensors(model: nn.Module, adapter_name: str = "default") -> dict[str, nn.Parameter]:
    """A and B of all layers, by the layer's name: the model's own parameters.

    Raises:
        ValueError: no layer has an adapter of that name.
    """
    layers = {name: layer for name, layer in lora_layers(model) if adapter_name in layer.lora_A}
    if not layers:
        raise ValueError(f"adapter_name must be an adapter of the model's LoRA layers, got {adapter_name!r}")
    pairs = {n: (layer.lora_A[adapter_name], layer.lora_B[adapter_name]) for n, layer in layers.items()}
    return {f"{name}.{factor}": t for name, pair in pairs.items() for factor, t in zip(("lora_A", "lora_B"), pair, strict=True)}


@torch.no_grad()
def set_adapter_tensors(model: Model, tensors: Mapping[str, Tensor], adapter_name: str = "default") -> Model:
    """Copies A and B of all layers, named as `adapter_tensors` names them, into the adapter.

    Raises:
        ValueError: a name or shape that does not fit; nothing is changed.
    """
    parameters = adapter_tensors(model, adapter_name)
    if parameters.keys() != tensors.keys():
        raise ValueError(
            f"tensors must be those of the adapter, {sorted(parameters.keys() ^ tensors.keys())[0]} is not in both"
        )
    for name, p in parameters.items():
        if p.shape != tensors[name].shape:
            raise ValueError(f"tensors[{name!r}] must have shape {tuple(p.shape)}, got {tuple(tensors[name].shape)}")
    for name, p in parameters.items():
        p.copy_(tensors[name])
    return model
