"""Adapters that begin with a weight of their own: W0 − scaling · B A, or one in 4 bits whose loss B A repairs."""

import functools
import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..quant import NF4Weight, quantize_nf4
from .adapter import NamedAdapters
from .frozen import FrozenWeight
from .quantized import applied, check_quant, quantised, requantise
from .settings import AdapterSettings, check_init_lora_weights

Weight = Tensor | NF4Weight


class Start(NamedTuple):
    """What an adapter with a weight of its own began with."""

    init: str
    lora_A: Tensor  # (r, K)  # noqa: N815
    lora_B: Tensor  # (N, r)  # noqa: N815


class OwnWeights(NamedAdapters):
    """A layer in which an adapter may have a weight of its own (`lora_ops.init`). `weight` is that one's while the adapter is
    active, and else W0, the very parameter that the layer was made of, which is never written to.

    W0 is kept meanwhile: a layer with such an adapter holds two weights.
    """

    weight: Weight
    prepack: bool
    starts: dict[str, Start]  # by adapter: those with a weight of their own

    def _setup_own_weights(self) -> None:
        self.starts = {}
        # Weights that are not `weight` at present, by their adapter's name, W0 under None. No state dict has them.
        self._aside: dict[str | None, Weight] = {}
        self._owner: str | None = None  # whose `weight` is
        self.unmerged_weight = None
        self._active_adapters: list[str] = []
        self._adapters_disabled = False

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters that are added to the output."""
        return self._active_adapters

    @active_adapters.setter
    def active_adapters(self, names: list[str]) -> None:
        self._active_adapters = names
        self._choose_weight()

    @property
    def adapters_disabled(self) -> bool:
        """Whether the layer is the frozen layer alone."""
        return self._adapters_disabled

    @adapters_disabled.setter
    def adapters_disabled(self, disabled: bool) -> None:
        self._adapters_disabled = disabled
        self._choose_weight()

    @property
    def original_weight(self) -> Weight:
        """W0, of the layer without adapters."""
        return self._aside[None] if self._owner is not None else self.base_weight

    def _weight_beside(self, adapter_name: str) -> Weight:
        return self._weight_of_owner(adapter_name) if adapter_name in self.starts else self.original_weight

    def _choose_weight(self) -> None:
        if self.unmerged_weight is None:
            self._put_weight_of(None if self._adapters_disabled else self._active_owner())

    def _active_owner(self) -> str | None:
        return next((name for name in self._active_adapters if name in self.starts), None)

    def _weight_of_owner(self, owner: str | None) -> Weight:
        return self.weight if owner == self._owner else self._aside[owner]

    def _put_weight_of(self, owner: str | None) -> None:
        if owner != self._owner:
            self._aside[self._owner] = self.weight
            weight = self._aside.pop(owner)
            if isinstance(weight, NF4Weight):
                self._parameters.pop("weight", None)
            self.weight = weight
            self._owner = owner

    @torch.no_grad()
    def set_initial(self, adapter_name: str, initial: Any, init: str) -> None:
        """Starts an adapter from an `lora_ops.init.Initial`: copies its A and B, and makes its weight, if it has one, the
        adapter's own. In a layer whose weight is in 4 bits that becomes so, too, in the same format; in another one a weight
        in 4 bits is dequantised.

        Args:
            adapter_name: of the rank that the factors have.
            initial: see `lora_ops.init`.
            init: the initialisation's name.

        Raises:
            ValueError: the factors' shapes are not the adapter's, or there is a core.
            RuntimeError: the layer is merged.
        """
        A, B = self.lora_A[adapter_name], self.lora_B[adapter_name]
        for field, t, place in (("lora_A", initial.lora_A, A), ("lora_B", initial.lora_B, B)):
            if t.shape != place.shape:
                raise ValueError(f'initial.{field} must be {tuple(place.shape)} for "{adapter_name}", got {tuple(t.shape)}')
        if initial.core is not None:
            raise ValueError("initial must have no core: see lora_ops.FactoredLinear")
        self._check_not_merged("set_initial")
        own = None if initial.weight is None else self.in_own_format(initial.weight)
        A.copy_(initial.lora_A)
        B.copy_(initial.lora_B)
        self._forget_start(adapter_name)
        if own is not None:
            self.starts[adapter_name] = Start(init, A.detach().clone(), B.detach().clone())
            self._aside[adapter_name] = own
        self._choose_weight()
        self._reset_magnitude(adapter_name)

    def resize(self, adapter_name: str, r: int, lora_alpha: float) -> None:
        """Gives an adapter another rank and lora_alpha, and new parameters, initialised as True does; the rest stays.

        Raises:
            ValueError: a name that the layer does not have, r < 1.
            RuntimeError: the layer is merged.
        """
        self._check_names([adapter_name])
        self._check_not_merged("resize")
        A, trains = self.lora_A[adapter_name], self.lora_A[adapter_name].requires_grad
        settings = AdapterSettings(
            r,
            lora_alpha,
            self.lora_dropout[adapter_name],
            self.use_rslora[adapter_name],
            adapter_dtype=A.dtype,
            use_dora=self.use_dora[adapter_name],
            lora_bias=self.lora_bias[adapter_name],
        )
        self._new_adapter(adapter_name, settings)
        for parameters in self.parameter_dicts:
            if adapter_name in parameters:
                parameters[adapter_name].requires_grad_(trains)

    def in_own_format(self, weight: Weight) -> Weight:
        """A weight dense or in 4 bits, as W0 is."""
        original = self.original_weight
        if isinstance(original, NF4Weight):
            return weight if isinstance(weight, NF4Weight) else requantise(original, weight)[0]
        dense = weight.dequantize(original.dtype) if isinstance(weight, NF4Weight) else weight
        return nn.Parameter(dense, requires_grad=False)

    @torch.no_grad()
    def reset_lora_parameters(
        self, adapter_name: str = "default", init_lora_weights: bool | str = True, dense_weight: Tensor | None = None
    ) -> None:
        """Initialises an adapter anew (see `init_lora_weights` of the layer), and then DoRA's magnitude.

        Args:
            dense_weight: what the initialisation takes for W0 where the layer's weight is in 4 bits. None: the dequantised one.
        """
        if adapter_name in self.starts:
            self._check_not_merged("reset_lora_parameters")
        if init_lora_weights in (True, False, "gaussian"):
            self._forget_start(adapter_name)
            super().reset_lora_parameters(adapter_name, init_lora_weights)
            return
        check_init_lora_weights(init_lora_weights)
        A = self.lora_A[adapter_name]
        if A.is_meta:
            return
        # Not above: lora_ops.init has functions on whole models, which need this file.
        from ..init import find

        init = find(str(init_lora_weights))
        self._check_not_merged(f"init_lora_weights={init_lora_weights!r}")
        if dense_weight is None:
            dense_weight = self.weight_for(init)
        initial = init(dense_weight, self.r[adapter_name], self.scaling[adapter_name], dtype=A.dtype, **self._quantizer(init))
        self.set_initial(adapter_name, initial, str(init_lora_weights))

    def weight_for(self, init: Any) -> Tensor:
        """What an initialisation takes for W0: the weight, dequantised.

        Raises:
            ValueError: the initialisation repairs what quantising loses, and the weight is in 4 bits already.
        """
        original = self.original_weight
        if not isinstance(original, NF4Weight):
            return original
        if quantizes(init):
            raise ValueError(
                "init needs the weight that was there before it was quantised: of add_lora(..., quant=...), or of "
                "lora_ops.init.initialize(..., quant=...) where the layer is not in 4 bits"
            )
        return original.dequantize()

    def _quantizer(self, init: Any) -> dict[str, Any]:
        """The option of initialisations that quantise: to the layer's own format, where it has one."""
        original = self.original_weight
        if not isinstance(original, NF4Weight) or not quantizes(init):
            return {}
        nested = original.nested_absmax is not None
        quantize = functools.partial(
            quantize_nf4, blocksize=original.blocksize, double_quant=nested, quant_type=original.quant_type
        )
        return {"quantize": quantize}

    @torch.no_grad()
    def quantize_weight(self, quant: str, blocksize: int = 64, double_quant: bool = True) -> None:
        """Puts W0, and the weights that adapters have of their own, in 4 bits: copies, which nobody else shares.

        Args:
            quant, blocksize, double_quant: see `FusedLoraLinear.from_linear`.

        Raises:
            ValueError: an argument that does not fit, a weight that cannot be quantised, or kept panels (`prepack`).
            RuntimeError: the layer is merged.
        """
        check_quant(quant, blocksize)
        self._check_not_merged("quantize_weight")
        if self.prepack:
            raise ValueError("prepack must be False for a weight in 4 bits, which lies as the kernels read it, got True")
        aside = {name: quantised(weight, quant, blocksize, double_quant) for name, weight in self._aside.items()}
        weight = quantised(self.weight, quant, blocksize, double_quant)
        self._parameters.pop("weight", None)
        self.weight, self._aside, self.fan_in_fan_out = weight, aside, False

    @torch.no_grad()
    def convert_to_plain_lora(self, adapter_name: str = "default") -> None:
        """Makes an adapter with a weight of its own one beside W0, of rank 2r, with the start A0, B0 subtracted:

            lora_A ← [A; A0]      lora_B ← [B, −B0]      scaling · (B A − B0 A0) = the change since the start

        so that the adapter's file works beside the original weight (PiSSA's conversion: Meng et al. 2024,
        https://arxiv.org/abs/2404.02948). Parameters are new ones: an optimiser must be made anew. Outputs change
        by x (W0 − weight − scaling · B0 A0)ᵀ, which is rounding unless one of the weights is in 4 bits. An
        adapter without a weight of its own stays as it is.

        Raises:
            ValueError: a name that the layer does not have.
            RuntimeError: the layer is merged.
        """
        self._check_names([adapter_name])
        self._check_not_merged("convert_to_plain_lora")
        if adapter_name not in self.starts:
            return
        A, B, r, lora_alpha = self.plain_lora(adapter_name)
        for factors, t in ((self.lora_A, A), (self.lora_B, B)):
            factors[adapter_name] = nn.Parameter(t, requires_grad=factors[adapter_name].requires_grad)
        self._forget_start(adapter_name)
        self.r[adapter_name] = r
        self.set_scaling(adapter_name, lora_alpha, self.use_rslora[adapter_name])

    def plain_lora(self, adapter_name: str) -> tuple[Tensor, Tensor, int, float]:
        """A, B, r and lora_alpha of an adapter beside W0: see `convert_to_plain_lora`."""
        A, B = (factors[adapter_name].detach() for factors in (self.lora_A, self.lora_B))
        r, lora_alpha = self.r[adapter_name], self.lora_alpha[adapter_name]
        start = self.starts.get(adapter_name)
        if start is None:
            return A, B, r, lora_alpha
        factor = math.sqrt(2) if self.use_rslora[adapter_name] else 2
        return torch.cat([A, start.lora_A]), torch.cat([B, -start.lora_B], dim=1), 2 * r, factor * lora_alpha

    def _forget(self, adapter_name: str) -> None:
        super()._forget(adapter_name)
        self._forget_start(adapter_name)

    def _forget_start(self, adapter_name: str) -> None:
        """Lets go of an adapter's own weight."""
        if self.starts.pop(adapter_name, None) is not None:
            self._choose_weight()
            self._aside.pop(adapter_name)

    def forget_original_weight(self) -> None:
        """`weight` is W0 from now on, whoever it belonged to."""
        self.starts, self._aside, self._owner = {}, {}, None

    def _check_names(self, names: Any) -> None:
        super()._check_names(names)
        owners = [name for name in names if name in self.starts]
        if len(owners) > 1:
            raise ValueError(f"adapter_name must hold one adapter at most that has a weight of its own, got {owners}")

    def merge(self, to: torch.dtype | None = None) -> None:
        if not self.merged:
            self._put_weight_of(self._active_owner())  # which is not the layer's while adapters are disabled
        try:
            super().merge(to)
        finally:
            self._choose_weight()

    def unmerge(self) -> None:
        super().unmerge()
        self._choose_weight()

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenWeight:
        for name, weight in self._aside.items():
            if isinstance(weight, NF4Weight):
                self._aside[name] = applied(weight, fn)
            else:
                weight.data = fn(weight.data)
        self.starts = {name: Start(s.init, fn(s.lora_A), fn(s.lora_B)) for name, s in self.starts.items()}
        return super()._apply(fn, recurse)


def quantizes(init: Any) -> bool:
    """Whether an initialisation of `lora_ops.init` makes factors of what quantising the weight loses."""
    return "quantize" in inspect.signature(init).parameters
