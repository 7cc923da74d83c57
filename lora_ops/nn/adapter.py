"""The adapters of a layer, by name: which there are, which are active, which train."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..stacking import stack


class NamedAdapters(nn.Module):
    """A layer whose parameters `lora_A[name]` (r, K) and `lora_B[name]` (N, r) belong to adapters with names.

    Those in `active_adapters` are added to the layer's output; they alone train. Names and meanings are PEFT's.
    """

    weight: Any
    in_features: int
    out_features: int

    def _setup_adapters(self) -> None:
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.scaling: dict[str, float] = {}
        self.active_adapters: list[str] = []
        self.adapters_disabled = False

    @property
    def active_adapter(self) -> str:
        """The active adapter's name, or the first one's.

        Raises:
            RuntimeError: none is active.
        """
        if not self.active_adapters:
            raise RuntimeError("no adapter is active; call set_adapter() first")
        return self.active_adapters[0]

    def add_adapter(
        self,
        adapter_name: str,
        r: int = 8,
        *,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        """A new adapter of its own rank, beside the others. It is not active, and does not train, before `set_adapter`.

        Args:
            adapter_name: a name that the layer does not have yet.
            r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype: as of the layer's first adapter.

        Raises:
            ValueError, TypeError: an argument out of its range, by name; a name that is taken.
        """
        check_adapter(r, lora_alpha, lora_dropout, init_lora_weights, adapter_dtype)
        check_adapter_name(adapter_name)
        if adapter_name in self.lora_A:
            raise ValueError(f"adapter_name must be a new name, got {adapter_name!r}, which {self._names()} has already")
        self._new_adapter(adapter_name, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype)
        for factors in (self.lora_A, self.lora_B):
            factors[adapter_name].requires_grad_(False)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Makes this adapter, or these, the active one, and has it train and no other.

        Raises:
            ValueError: a name that the layer does not have, or one that comes twice.
            RuntimeError: the layer is merged.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_names(names)
        self._check_not_merged("set_adapter")
        self.active_adapters = names
        for factors in (self.lora_A, self.lora_B):
            for name, factor in factors.items():
                factor.requires_grad_(name in names)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forgets an adapter. If it was active, those that are left of the active ones stay so.

        Raises:
            ValueError: a name that the layer does not have.
            RuntimeError: the layer is merged.
        """
        self._check_names([adapter_name])
        self._check_not_merged("delete_adapter")
        for of_all in (self.lora_A, self.lora_B, self.r, self.lora_alpha, self.lora_dropout, self.use_rslora, self.scaling):
            del of_all[adapter_name]
        self.active_adapters = [name for name in self.active_adapters if name != adapter_name]

    def disable_adapters(self) -> None:
        """The layer is the frozen layer alone, until `enable_adapters`. What is merged stays merged."""
        self.adapters_disabled = True

    def enable_adapters(self) -> None:
        self.adapters_disabled = False

    def set_scaling(self, adapter_name: str, lora_alpha: float, use_rslora: bool = False) -> None:
        """scaling = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`."""
        r = self.r[adapter_name]
        self.lora_alpha[adapter_name], self.use_rslora[adapter_name] = lora_alpha, use_rslora
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if use_rslora else r)

    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str = "default", init_lora_weights: bool | str = True) -> None:
        """Initialises A and B anew (see `init_lora_weights` of the layer)."""
        A, B = self.lora_A[adapter_name], self.lora_B[adapter_name]
        if A.is_meta:
            return
        if init_lora_weights == "gaussian":
            nn.init.normal_(A, std=1 / self.r[adapter_name])
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if init_lora_weights is False:
            nn.init.kaiming_uniform_(B, a=math.sqrt(5))
        else:
            nn.init.zeros_(B)

    def _new_adapter(
        self,
        name: str,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        init_lora_weights: bool | str,
        adapter_dtype: torch.dtype | None,
    ) -> None:
        half = self.weight.dtype in (torch.bfloat16, torch.float16)
        dtype = adapter_dtype or (torch.float32 if half else self.weight.dtype)
        device = self.weight.device
        A, B = (torch.empty(shape, dtype=dtype, device=device) for shape in self._factor_shapes(r))
        self.lora_A[name], self.lora_B[name] = nn.Parameter(A), nn.Parameter(B)
        self.r[name], self.lora_dropout[name] = r, lora_dropout
        self.set_scaling(name, lora_alpha, use_rslora)
        self.reset_lora_parameters(name, init_lora_weights)

    def _factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of an adapter's A and B.

        Raises:
            ValueError: the layer cannot have an adapter of that rank.
        """
        return (r, self.in_features), (self.out_features, r)

    def _matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """An adapter's A as (r, K) and B as (N, r), views.

        Raises:
            ValueError: they are no matrices (convolutions in groups).
        """
        return self.lora_A[name], self.lora_B[name]

    def _factors(self, names: Sequence[str]) -> tuple[Tensor, Tensor, float]:
        """A, B and scaling of an adapter, or of several as one."""
        if len(names) == 1:
            return self.lora_A[names[0]], self.lora_B[names[0]], self.scaling[names[0]]
        As, Bs = ([factors[name] for name in names] for factors in (self.lora_A, self.lora_B))
        return stack(As, Bs, [self.scaling[name] for name in names])

    def _together_and_apart(self) -> tuple[list[str], list[str]]:
        """The active adapters that one call can take, and the others: each adapter draws a mask of its own."""
        names = self.active_adapters
        if len(names) == 1 or not (self.training and any(self.lora_dropout[name] for name in names)):
            return names, []
        return names[:1], names[1:]

    def _low_rank(self, x: Tensor, name: str) -> Tensor:
        A, B = self.lora_A[name], self.lora_B[name]
        return F.linear(F.linear(F.dropout(x.to(A.dtype), self.lora_dropout[name], self.training), A), B) * self.scaling[name]

    def _check_names(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self.lora_A]
        if unknown:
            raise ValueError(f"adapter_name must be of {self._names()}, got {unknown[0]!r}")
        if len(set(names)) < len(names):
            raise ValueError(f"adapter_name must have every name once, got {list(names)}")

    def _check_not_merged(self, method: str) -> None:
        if getattr(self, "merged", False):
            raise RuntimeError(f"{method} needs the layer unmerged: {self._active()} is merged; call unmerge() first")

    def _names(self) -> str:
        return f"the layer's adapters {list(self.lora_A)}"

    def _active(self) -> str:
        return "adapter " + " and ".join(f'"{name}"' for name in self.active_adapters)

    def _adapters_repr(self) -> str:
        if len(self.lora_A) != 1:
            return f"adapters={dict(self.r)}, active={self.active_adapters}"
        (name,) = self.lora_A
        return f"r={self.r[name]}, lora_alpha={self.lora_alpha[name]}, lora_dropout={self.lora_dropout[name]}"


def check_adapter(
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    init_lora_weights: bool | str = True,
    adapter_dtype: torch.dtype | None = None,
) -> None:
    """Raises ValueError or TypeError naming the argument that does not fit, what it is and what it may be."""
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ValueError(f"r must be an integer >= 1, got {r!r}")
    if not isinstance(lora_alpha, int | float) or not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha must be a finite number, got {lora_alpha!r}")
    if not isinstance(lora_dropout, int | float) or not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout must be a number in [0, 1), got {lora_dropout!r}")
    if init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(f'init_lora_weights must be True, False or "gaussian", got {init_lora_weights!r}')
    if adapter_dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"adapter_dtype must be float32, bfloat16, float16, float64 or None, got {adapter_dtype!r}")


def check_adapter_name(adapter_name: str) -> None:
    """Raises ValueError for what cannot be a key of an nn.ParameterDict."""
    taken = isinstance(adapter_name, str) and hasattr(nn.ParameterDict(), adapter_name)
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name or taken:
        raise ValueError(
            "adapter_name must be a non-empty string without a dot that is no attribute of nn.ParameterDict, "
            f"got {adapter_name!r}"
        )
