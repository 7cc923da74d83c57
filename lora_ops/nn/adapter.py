"""The adapters of a layer, by name: which there are, which are active, which train."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from ..autograd import transformed
from ..dora import row_norms, weight_norm
from ..quant import NF4Weight
from ..stacking import stack
from .frozen import FrozenWeight, adapter_dtype_for
from .quantized import frozen_linear
from .settings import AdapterOptions, AdapterSettings, check_adapter_name


class NamedAdapters(FrozenWeight):
    """A layer whose parameters `lora_A[name]` (r, K) and `lora_B[name]` (N, r) belong to adapters with names, as do the
    `lora_B_bias[name]` (N,) of those with `lora_bias` and the `lora_magnitude_vector[name]` (N,) of those that are DoRA.

    Those in `active_adapters` are added to the layer's output; they alone train. Names and meanings are PEFT's.
    """

    def _setup_adapters(self) -> None:
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.lora_B_bias = nn.ParameterDict()
        self.lora_magnitude_vector = nn.ParameterDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.scaling: dict[str, float] = {}
        self.active_adapters: list[str] = []
        # (..., n): what multiplies the output of each of the n active adapters, row by row, in their order. None: nothing does.
        self.adapter_gate: Tensor | None = None
        self._norms: tuple[Any, ...] | None = None

    @property
    def use_dora(self) -> dict[str, bool]:
        """Which adapters are DoRA."""
        return {name: name in self.lora_magnitude_vector for name in self.lora_A}

    @property
    def lora_bias(self) -> dict[str, bool]:
        """Which adapters have a bias of B."""
        return {name: name in self.lora_B_bias for name in self.lora_A}

    @property
    def parameter_dicts(self) -> tuple[nn.ParameterDict, ...]:
        """Whatever parameters adapters have, each by the adapter's name."""
        return self.lora_A, self.lora_B, self.lora_B_bias, self.lora_magnitude_vector

    @property
    def active_adapter(self) -> str:
        """The active adapter's name, or the first one's.

        Raises:
            RuntimeError: none is active.
        """
        if not self.active_adapters:
            raise RuntimeError("no adapter is active; call set_adapter() first")
        return self.active_adapters[0]

    def add_adapter(self, adapter_name: str, r: int = 8, **options: Unpack[AdapterOptions]) -> None:
        """A new adapter of its own rank, beside the others. It is not active, and does not train, before `set_adapter`.

        Args:
            adapter_name: a name that the layer does not have yet.
            r, options: as of the layer's first adapter.

        Raises:
            ValueError, TypeError: an argument out of its range, by name; a name that is taken.
        """
        settings = self._settings(r, options)
        check_adapter_name(adapter_name)
        if adapter_name in self.lora_A:
            raise ValueError(f"adapter_name must be a new name, got {adapter_name!r}, which {self._names()} has already")
        try:
            self._new_adapter(adapter_name, settings)
        except BaseException:
            self._forget(adapter_name)
            raise
        for parameters in self.parameter_dicts:
            if adapter_name in parameters:
                parameters[adapter_name].requires_grad_(False)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Makes this adapter, or these, the active one, and has it train and no other.

        Raises:
            ValueError: a name that the layer does not have, or one that comes twice.
            RuntimeError: the layer is merged.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_names(names)
        self._check_not_merged("set_adapter")
        self.active_adapters, self.adapter_gate = names, None
        for parameters in self.parameter_dicts:
            for name, parameter in parameters.items():
                parameter.requires_grad_(name in names)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forgets an adapter. If it was active, those that are left of the active ones stay so.

        Raises:
            ValueError: a name that the layer does not have.
            RuntimeError: the layer is merged.
        """
        self._check_names([adapter_name])
        self._check_not_merged("delete_adapter")
        self._forget(adapter_name)

    def _forget(self, adapter_name: str) -> None:
        for parameters in self.parameter_dicts:
            if adapter_name in parameters:
                del parameters[adapter_name]
        for of_all in (self.r, self.lora_alpha, self.lora_dropout, self.use_rslora, self.scaling):
            of_all.pop(adapter_name, None)
        self.active_adapters = [name for name in self.active_adapters if name != adapter_name]
        self.adapter_gate = None

    def set_scaling(self, adapter_name: str, lora_alpha: float, use_rslora: bool = False) -> None:
        """scaling = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`."""
        r = self.r[adapter_name]
        self.lora_alpha[adapter_name], self.use_rslora[adapter_name] = lora_alpha, use_rslora
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if use_rslora else r)

    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str = "default", init_lora_weights: bool | str = True) -> None:
        """Initialises A, B and its bias anew (see `init_lora_weights` of the layer), and then DoRA's magnitude."""
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
        if adapter_name in self.lora_B_bias:
            bound = 1 / math.sqrt(self.r[adapter_name]) if init_lora_weights is False else 0.0
            nn.init.uniform_(self.lora_B_bias[adapter_name], -bound, bound)
        self._reset_magnitude(adapter_name)

    def _reset_magnitude(self, adapter_name: str) -> None:
        if adapter_name in self.lora_magnitude_vector:
            A, B = self.lora_A[adapter_name], self.lora_B[adapter_name]
            weight = self._weight_beside(adapter_name)
            norm = weight_norm(weight, A, B, self.scaling[adapter_name], row_norms(weight))
            self.lora_magnitude_vector[adapter_name].copy_(norm)

    def _weight_beside(self, adapter_name: str) -> Any:
        """The weight that the adapter is added to."""
        return self.base_weight

    @classmethod
    def _settings(cls, r: int, options: AdapterOptions) -> AdapterSettings:
        """Of an adapter of such a layer.

        Raises:
            ValueError, TypeError: an argument out of its range, by name.
        """
        return AdapterSettings(r, **options)

    def _new_adapter(self, name: str, settings: AdapterSettings, **initial: Any) -> None:
        if settings.lora_bias and self.bias is None:
            warnings.warn(f'lora_bias is True for adapter "{name}" of a layer without bias: it cannot be merged', stacklevel=3)
        dtype, device = adapter_dtype_for(self.weight, settings.adapter_dtype), self.weight.device
        A, B = (torch.empty(shape, dtype=dtype, device=device) for shape in self._factor_shapes(settings.r))
        self.lora_A[name], self.lora_B[name] = nn.Parameter(A), nn.Parameter(B)
        if settings.lora_bias:
            self.lora_B_bias[name] = nn.Parameter(torch.empty(self.out_features, dtype=dtype, device=device))
        if settings.use_dora:  # near ‖W0‖, so that the steps of training would vanish in half precision
            m = torch.empty(self.out_features, dtype=torch.promote_types(dtype, torch.float32), device=device)
            self.lora_magnitude_vector[name] = nn.Parameter(m)
        self.r[name], self.lora_dropout[name] = settings.r, settings.lora_dropout
        self.set_scaling(name, settings.lora_alpha, settings.use_rslora)
        self.reset_lora_parameters(name, settings.init_lora_weights, **initial)

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
        """The active adapters that one call can take, and the others: each adapter draws a mask of its own, and beside DoRA,
        which scales what is there before it, there is no call for any."""
        names = self.active_adapters
        if len(names) == 1:
            return names, []
        if any(name in self.lora_magnitude_vector for name in names):
            return [], names
        if not (self.training and any(self.lora_dropout[name] for name in names)):
            return names, []
        return names[:1], names[1:]

    def _gate(self, x: Tensor, names: Sequence[str]) -> Tensor | None:
        """`adapter_gate` of these adapters for every row of x, (..., len(names))."""
        gate = self.adapter_gate
        if gate is None:
            return None
        if len(names) < len(self.active_adapters):
            gate = gate[..., [self.active_adapters.index(name) for name in names]]
        return gate.to(torch.promote_types(x.dtype, torch.float32)).expand(*x.shape[:-1], len(names))

    def _bias_with(self, names: Sequence[str]) -> Tensor | None:
        """The layer's bias, and of every adapter with a bias of B that, times its scaling, in fp32 at least."""
        bias = self.bias
        for name in names:
            if name in self.lora_B_bias:
                scaled = self._scaled_bias(name)
                bias = scaled if bias is None else bias + scaled
        return bias

    def _scaled_bias(self, name: str) -> Tensor:
        bias = self.lora_B_bias[name]
        return bias.to(torch.promote_types(bias.dtype, torch.float32)) * self.scaling[name]

    def _plus(self, y: Tensor, x: Tensor, name: str) -> Tensor:
        """y, the output so far, with one more adapter, by PEFT's formula. It draws its own mask, x̃ = drop(x).

        LoRA                     y + scaling · ((x̃ Aᵀ) Bᵀ + its bias)
        DoRA                     bias + c ∘ (y - bias + scaling · (x Aᵀ) Bᵀ): all that came before is scaled, too
        DoRA, where it drops     y + (c - 1) ∘ x̃ W0ᵀ + c ∘ scaling · (x̃ Aᵀ) Bᵀ
        """
        p = self.lora_dropout[name] if self.training else 0.0
        x = x.to(self.lora_A[name].dtype)
        if name not in self.lora_magnitude_vector:
            low_rank, gate = self._low_rank(F.dropout(x, p), name), self._gate(x, [name])
            return y + (low_rank if gate is None else low_rank * gate)
        c = self.lora_magnitude_vector[name] / self._weight_norm(name)
        if p == 0.0:
            return y + (c - 1) * (y if self.bias is None else y - self.bias) + c * self._low_rank(x, name)
        x = x * torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p) / (1 - p)
        weight = self.weight if isinstance(self.weight, NF4Weight) else self.weight.to(x.dtype)
        return y + (c - 1) * frozen_linear(x, weight, None) + c * self._low_rank(x, name)

    def _low_rank(self, x: Tensor, name: str) -> Tensor:
        A, B = self.lora_A[name], self.lora_B[name]
        return F.linear(F.linear(x, A), B, self.lora_B_bias.get(name)) * self.scaling[name]

    def _weight_norm(self, name: str) -> Tensor:
        return weight_norm(self.weight, self.lora_A[name], self.lora_B[name], self.scaling[name], self._row_norms())

    def _row_norms(self) -> Tensor:
        """‖W0‖² of every row, kept from the first call on and made anew as `_packed` does."""
        weight = self.weight
        if torch.compiler.is_compiling() or transformed():
            return row_norms(weight)
        state = version_of(weight)
        if self._norms is None or self._norms[0] != state:
            self._norms = (state, row_norms(weight), weight if isinstance(weight, NF4Weight) else weight.detach())
        return self._norms[1]

    @torch.no_grad()
    def delta_weight(self, adapter_name: str | None = None) -> Tensor:
        """scaling · B A, (N, K), in fp32 (fp64 for fp64 adapters), of an adapter, or the sum of those that are active. As
        PEFT's `get_delta_weight` it knows nothing of DoRA's magnitude."""
        A, B, scaling = self._factors([adapter_name] if adapter_name else self.active_adapters)
        wide = torch.promote_types(A.dtype, torch.float32)
        return scaling * (B.to(wide) @ A.to(wide))

    @torch.no_grad()
    def _with_update(self) -> tuple[Tensor, Tensor | None]:
        """W0 with what every active adapter makes of it, one after the other, in fp32 at least, and what they add to the bias:

        LoRA    W + ΔW                                                     b + scaling · bias of B
        DoRA    c ∘ (W + ΔW), c = magnitude / ‖W0 + ΔW‖                    c ∘ b
        """
        if not self.active_adapters:
            raise RuntimeError("no adapter is active: there is nothing to merge; call set_adapter() first")
        if self.adapter_gate is not None:
            raise RuntimeError("a gate weighs the adapters row by row: no weight does the same; set it to None first")
        weight = self._dense_weight(torch.promote_types(self.lora_A[self.active_adapter].dtype, torch.float32))
        merged, bias = weight, None
        for name in self.active_adapters:
            delta = self.delta_weight(name)
            merged = merged + delta
            if name in self.lora_B_bias:
                bias = self._scaled_bias(name) + (0 if bias is None else bias)
            if name in self.lora_magnitude_vector:
                c = self.lora_magnitude_vector[name] / torch.linalg.vector_norm(weight + delta, dim=1)
                merged, bias = merged * c[:, None], None if bias is None else bias * c
        return merged, bias

    def _check_names(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self.lora_A]
        if unknown:
            raise ValueError(f"adapter_name must be of {self._names()}, got {unknown[0]!r}")
        if len(set(names)) < len(names):
            raise ValueError(f"adapter_name must have every name once, got {list(names)}")

    def _check_not_merged(self, method: str) -> None:
        if self.merged:
            raise RuntimeError(f"{method} needs the layer unmerged: {self._active()} is merged; call unmerge() first")

    def _names(self) -> str:
        return f"the layer's adapters {list(self.lora_A)}"

    def _active(self) -> str:
        return "adapter " + " and ".join(f'"{name}"' for name in self.active_adapters)

    def _adapters_repr(self) -> str:
        if len(self.lora_A) != 1:
            return f"adapters={dict(self.r)}, active={self.active_adapters}"
        (name,) = self.lora_A
        variants = [f", {field}=True" for field in ("use_dora", "lora_bias") if getattr(self, field)[name]]
        return (
            f"r={self.r[name]}, lora_alpha={self.lora_alpha[name]}, lora_dropout={self.lora_dropout[name]}{''.join(variants)}"
        )


def version_of(weight: Tensor | NF4Weight) -> tuple[Any, ...]:
    """Another value after every change of the weight but one through `.data`, as long as the weight of before lives."""
    t = weight.codes if isinstance(weight, NF4Weight) else weight
    version = 0 if t.is_inference() else t._version
    return version, t.data_ptr(), t.shape, t.stride(), weight.dtype
