"""A model of layers of every kind, ours and PEFT's with the same numbers."""

import copy

import torch
from tiny_models import with_peft
from torch import Tensor, nn

from lora_ops import LoraConfig, add_lora


class Reader(nn.Module):
    """Patches of an image, words, several convolutions, a head that is tied to the words."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.words = nn.Embedding(20, 16, padding_idx=0)
        self.mix = nn.Sequential(nn.Conv1d(16, 24, 3, padding=1), nn.ReLU(), nn.Conv1d(24, 16, 1))
        self.in_groups = nn.Conv1d(16, 16, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm1d(16)
        self.proj = nn.Linear(16, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.words.weight
        self.many = nn.ModuleList()

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        image, ids = inputs
        x = torch.cat([self.patches(image).flatten(2), self.words(ids).transpose(1, 2)], dim=2)
        x = self.norm(self.in_groups(x + self.mix(x)))
        return self.head(self.proj(x.transpose(1, 2)))


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(2, 3, 8, 12, generator=generator).to(dtype)
    return image, torch.randint(0, 20, (2, 5), generator=generator)


def reader() -> Reader:
    torch.manual_seed(0)
    return Reader()


EVERYTHING = {"target_modules": ["patches", "words", "mix.0", "mix.2", "proj"], "modules_to_save": ["norm", "in_groups"]}


def pair(fields: dict | None = None, dtype: torch.dtype = torch.float32, make=reader):
    """Our model and PEFT's, with the same numbers, none zero."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **(EVERYTHING if fields is None else fields)})
    model = make().to(dtype)
    theirs = with_peft(copy.deepcopy(model), config)
    add_lora(model, config)
    numbers = {name.replace(".base_layer", ""): p for name, p in theirs.base_model.model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                key = name if name in numbers else f"{name}.weight"
                p.copy_(numbers[key])
            elif "modules_to_save" in name:
                p.mul_(1.25)
                numbers[name].copy_(p)
    return model, theirs
