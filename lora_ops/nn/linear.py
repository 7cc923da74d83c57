"""FusedLoraLinear: the state of a frozen linear layer and its adapter. No arithmetic of its own."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from .. import log
from ..autograd import transformed
from ..dora import dora_linear
from ..functional import autocast_is_on, lora_linear, qlora_linear
from ..ops import pack_weight
from ..quant import NF4Weight
from ..registry import method
from ..stacking import rank_gate
from .adapter import version_of
from .frozen import FrozenWeight
from .own_weights import OwnWeights
from .quantized import check_quant, frozen_linear, is_linear4bit, quantised
from .settings import AdapterOptions, check_adapter_name


@method(
    "LoRA",
    equation="y = x W0ᵀ + s (drop(x) Aᵀ) Bᵀ + bias, s = lora_alpha / r, B = 0 at first",
    use="add_lora(model, LoraConfig(r=8, lora_alpha=16))",
    changes="P",
    source="Hu et al. 2021, https://arxiv.org/abs/2106.09685",
    test="test_fused_lora_linear.py::test_merged_output_is_the_unmerged_output",
    note="Its backward is cheaper than full tuning's: ∂L/∂W0 is not computed, which a survey overlooks.",
)
@method(
    "rsLoRA",
    equation="s = lora_alpha / sqrt(r)",
    use="add_lora(model, LoraConfig(r=256, use_rslora=True))",
    changes="P",
    source="Kalajdzievski 2023, https://arxiv.org/abs/2312.03732",
    test="test_fused_lora_linear.py::test_rslora_keeps_the_first_step_of_any_rank",
)
@method(
    "LoRA dropout",
    equation="y = x W0ᵀ + s (drop(x) Aᵀ) Bᵀ: W0 sees all of x",
    use="add_lora(model, LoraConfig(lora_dropout=0.05))",
    changes="L",
    source="Hu et al. 2021, https://arxiv.org/abs/2106.09685",
    test="test_dropout.py::test_mask_is_the_reference_mask",
)
class FusedLoraLinear(OwnWeights):
    """Drop-in for `nn.Linear` with a trainable low-rank update: y = x W0ᵀ + scaling · (drop(x) Aᵀ) Bᵀ + bias.

    Parameters: `weight` (N, K) and `bias` (N,), frozen; `lora_A[name]` (r, K) and `lora_B[name]` (N, r), trainable, keyed by
    the adapter's name, "default" first; with `lora_bias` and `use_dora` also `lora_B_bias[name]` and
    `lora_magnitude_vector[name]`, (N,) each. `add_adapter`, `set_adapter`, `delete_adapter` and `disable_adapters` are those of
    PEFT's layers; several active adapters are one call of their ranks together, unless they draw masks of dropout (the first
    one is fused then) or one is DoRA (none is): the others are added, one after the other, by PEFT's formulas. Operator and
    numerics: `lora_ops.lora_linear`, of DoRA `lora_ops.dora_linear`. With a weight in 4 bits (see `from_linear`) `weight` is
    an `NF4Weight` and no parameter: `lora_ops.qlora_linear`.

    Args:
        in_features, out_features: K and N.
        r: rank, >= 1.
        lora_alpha: scaling = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora` (Kalajdzievski 2023,
            https://arxiv.org/abs/2312.03732).
        lora_dropout: probability in [0, 1) that training hides an element of x from A.
        bias: whether there is a bias.
        init_lora_weights: True (A uniform in ±1/sqrt(K), B zero: the layer starts as W0), "gaussian" (A normal with
            standard deviation 1/r, B zero), or False (both as `nn.Linear` initialises: the layer starts away from W0); or, by
            name, an initialisation of `lora_ops.init` that needs no data: "pissa", "pissa_niter_4", "milora", "olora",
            "orthogonal", "offset", "init_a", "init_b", "loftq", "loftq_iter_5", "qpissa", ... Some give the adapter a weight
            of its own, such as W0 − scaling · B A: `weight` is that while the adapter is active, and W0, which is kept, else.
        device, dtype: of weight and bias.
        adapter_dtype: of A and B. None: float32 over a half-precision weight, as PEFT does, else the weight's dtype.
        prepack: keep the weight in packed panels too: faster for about 12 to 128 rows, for as much memory again as an
            fp32 weight takes (half of that where bf16 products run in bf16 arithmetic). The copy follows the weight,
            except where it is written to through `weight.data`, which torch does not count as a change. DoRA does not read it.
        use_dora: y = c ∘ (x W0ᵀ + scaling · (x Aᵀ) Bᵀ) + bias with c = lora_magnitude_vector / ‖W0 + scaling · B A‖, row by
            row, the norm a constant of the backward (DoRA: Liu et al. 2024, https://arxiv.org/abs/2402.09353). The magnitude
            is that norm at first, and trains. It is float32 where A and B are in half precision. ‖W0‖ is kept from the first
            call on and follows the weight as the copy of `prepack` does.
        lora_bias: B has a bias, `lora_B_bias[name]`, zero at first (uniform in ±1/sqrt(r) where `init_lora_weights` is False)
            and trainable: y = x W0ᵀ + scaling · ((drop(x) Aᵀ) Bᵀ + lora_B_bias) + bias. Not with `use_dora` or "gaussian".

    Raises:
        ValueError, TypeError: an argument out of its range, by name.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        *,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        prepack: bool = False,
        **options: Unpack[AdapterOptions],
    ) -> None:
        settings = self._settings(r, options)
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._setup(linear.weight, linear.bias, prepack)
        self._new_adapter("default", settings)
        self.active_adapters = ["default"]

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int = 8,
        *,
        prepack: bool = False,
        adapter_name: str = "default",
        quant: str | None = None,
        blocksize: int = 64,
        double_quant: bool = True,
        **options: Unpack[AdapterOptions],
    ) -> "FusedLoraLinear":
        """Wraps an `nn.Linear` or a transformers `Conv1D`, sharing its weight and bias: nothing is copied.

        A Conv1D keeps its (K, N) storage, and its shape in the state dict; `weight` is its transposed view. The shared
        parameters are frozen.

        With `quant`, the weight is a copy in 4 bits, made by `quantize_nf4`; bitsandbytes' `Linear4bit` becomes such a layer
        with the very codes and scales that it has. The state dict holds a 4-bit weight under bitsandbytes' keys, and
        `load_state_dict` takes it from them: all of it, or an error that names the key, before anything of the layer is
        changed. `to(dtype)` leaves codes and scales alone.

        Args:
            r, options, prepack: see the class.
            adapter_name: of the first adapter.
            quant: "nf4", "fp4" or None, which leaves the weight as it is.
            blocksize, double_quant: see `quantize_nf4`.

        Raises:
            TypeError: another kind of layer, or a dtype that cannot be quantised.
            ValueError: an argument out of its range, by name; a weight that cannot be quantised because it is not finite;
                a Linear4bit that bitsandbytes has repacked (`NF4Weight.from_params4bit`).
        """
        settings = cls._settings(r, options)
        check_adapter_name(adapter_name)
        check_quant(quant, blocksize)
        original, bias = weight_of(linear)
        weight = quantised(original, quant, blocksize, double_quant)
        if prepack and isinstance(weight, NF4Weight):
            raise ValueError("prepack must be False for a weight in 4 bits, which lies as the kernels read it, got True")
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._setup(weight, bias, prepack, fan_in_fan_out=is_conv1d(linear) and isinstance(weight, Tensor))
        module._new_adapter(adapter_name, settings, dense_weight=original if isinstance(original, Tensor) else None)
        module.active_adapters = [adapter_name]
        module.train(linear.training)
        return module

    weight: Tensor | NF4Weight

    def _setup(self, weight: Tensor | NF4Weight, bias: Tensor | None, prepack: bool, *, fan_in_fan_out: bool = False) -> None:
        self.out_features, self.in_features = weight.shape
        self._setup_own_weights()
        self._setup_adapters()
        self._setup_weight(weight, bias, fan_in_fan_out=fan_in_fan_out)
        self.prepack = prepack
        self._panels: Tensor | None = None
        self._panels_of: tuple[Any, ...] | None = None
        self._packed_weight: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.merged or self.adapters_disabled or not self.active_adapters:
            if log.ON:
                log.say("the weight alone, since " + ("it is merged" if self.merged else "no adapter is active"))
            return frozen_linear(x, self.weight, self.bias)
        together, apart = self._together_and_apart()
        y = self._fused(x, together) if together else frozen_linear(x, self.weight, self.bias)
        if not apart:
            return y
        total = y.to(torch.promote_types(y.dtype, torch.float32))
        for name in apart:
            total = self._plus(total, x, name)
        return total.to(y.dtype)

    def _fused(self, x: Tensor, names: list[str]) -> Tensor:
        """The output with these adapters, in one call."""
        weight, (A, B, scaling) = self.weight, self._factors(names)
        options: dict[str, Any] = {
            "scaling": scaling,
            "bias": self._bias_with(names),
            "dropout_p": self.lora_dropout[names[0]],
            "training": self.training,
        }
        gate = self._gate(x, names)
        if gate is not None:
            options["gate"] = rank_gate(gate, [self.r[name] for name in names])
        if names[0] in self.lora_magnitude_vector:
            return dora_linear(x, weight, A, B, self.lora_magnitude_vector[names[0]], **options, base=self._row_norms())
        if isinstance(weight, NF4Weight):
            return qlora_linear(x, weight, A, B, **options)
        panels = self._packed(weight, x.dtype) if self.prepack else None
        return lora_linear(x, weight, A, B, **options, panels=panels)

    def _packed(self, w: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The kept panels, made anew when the weight's version or storage has changed. A compiled graph, which could not
        notice that, reads the weight itself, and so do torch.func's transforms."""
        if torch.compiler.is_compiling() or transformed():
            return None
        if autocast_is_on(w.device):
            dtype = torch.get_autocast_dtype(w.device.type)
        state = (*version_of(w), dtype)
        if self._panels_of != state:
            self._panels, self._panels_of = pack_weight(w, dtype), state
            self._packed_weight = w.detach()  # as long as it lives, no other weight can have its address
        return self._panels

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenWeight:
        # Moved or cast: the panels and the weight that they came from are of no use any more.
        self._panels = self._panels_of = self._packed_weight = self._norms = None
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        weight = self.weight
        quant = f", quant={weight.quant_type!r}, blocksize={weight.blocksize}" if isinstance(weight, NF4Weight) else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._adapters_repr()}{quant}{', merged' if self.merged else ''}"
        )

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles make their own panels and norms, and get their own gate: this one may hang in a graph.
        return {
            **self.__dict__,
            "_panels": None,
            "_panels_of": None,
            "_packed_weight": None,
            "_norms": None,
            "adapter_gate": None,
        }


def weight_of(linear: nn.Module) -> tuple[Tensor | NF4Weight, Tensor | None]:
    """weight (N, K) and bias of a supported layer. Conv1D, y = x W + b with W (K, N), is known by its `nf`."""
    weight: Any = getattr(linear, "weight", None)
    bias: Any = getattr(linear, "bias", None)
    if isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward:
        return weight, bias
    if is_conv1d(linear) and isinstance(weight, nn.Parameter):
        return nn.Parameter(weight.data.t(), requires_grad=False), bias
    if is_linear4bit(linear):
        return NF4Weight.from_params4bit(weight), bias
    raise TypeError(
        "linear must be an nn.Linear, a transformers Conv1D or a bitsandbytes Linear4bit that is quantised, "
        f"got {type(linear).__name__}"
    )


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' Conv1D, which need not be installed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
