"""What layers over a dense weight have in common beside their adapters: the weight, and what is merged into it."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .adapter import NamedAdapters
from .settings import AdapterOptions, AdapterSettings


class DenseAdapters(NamedAdapters):
    """A frozen weight W0 of any shape, with adapters whose ΔW, `delta_weight`, has that shape."""

    weight: Tensor

    def _setup(self, weight: Tensor, bias: Tensor | None) -> None:
        self._setup_adapters()
        self._setup_weight(weight, bias)

    @classmethod
    def _settings(cls, r: int, options: AdapterOptions) -> AdapterSettings:
        settings = AdapterSettings(r, **options)
        check_plain(settings.use_dora, settings.lora_bias, settings.init_lora_weights)
        return settings

    @classmethod
    def _around(cls, base: nn.Module, adapter_name: str, settings: AdapterSettings) -> Self:
        """The layer over the base layer's own weight."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._wrap(base)
        layer._new_adapter(adapter_name, settings)
        layer.active_adapters = [adapter_name]
        return layer.train(base.training)

    def _wrap(self, base: Any) -> None:
        """Takes over the base layer's weight and what else it computes with."""
        raise NotImplementedError

    @property
    def _is_frozen_layer(self) -> bool:
        """Whether the layer computes with `weight` alone."""
        return self.merged or self.adapters_disabled or not self.active_adapters

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        """B A in the weight's shape."""
        raise NotImplementedError

    @torch.no_grad()
    def delta_weight(self, adapter_name: str | None = None) -> Tensor:
        """scaling · B A in the weight's shape, in fp32 (fp64 for fp64 adapters), of an adapter, or the sum of those that are
        active.

        Raises:
            ValueError: the weight has no place for it (convolutions in groups).
        """
        names = [adapter_name] if adapter_name else self.active_adapters
        total: Any = 0
        for name in names:
            wide = torch.promote_types(self.lora_A[name].dtype, torch.float32)
            A, B = (factors[name].to(wide) for factors in (self.lora_A, self.lora_B))
            total = total + self.scaling[name] * self._delta(A, B)
        return total

    def _merged_repr(self) -> str:
        return f"{self._adapters_repr()}{', merged' if self.merged else ''}"


def check_plain(use_dora: bool, lora_bias: bool, init_lora_weights: bool | str = True) -> None:
    """Raises ValueError for what embeddings and convolutions cannot have."""
    if init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f'init_lora_weights must be True, False or "gaussian" for an embedding or a convolution, got {init_lora_weights!r}'
        )
    for field, value in (("use_dora", use_dora), ("lora_bias", lora_bias)):
        if value:
            raise ValueError(f"{field} must be False for an embedding or a convolution, got True")
