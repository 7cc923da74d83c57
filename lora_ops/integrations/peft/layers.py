"""PEFT's LoRA layers with a fused forward: all state, and whatever is not fused, stays PEFT's."""

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from ... import log
from ...autograd import transformed
from ...dora import dora_linear, row_norms, weight_norm
from ...functional import autocast_is_on, lora_linear, qlora_linear
from ...multi import AdapterBank, multi_lora_linear
from ...nn.adapter import version_of
from ...nn.linear import is_conv1d
from ...nn.quantized import is_linear4bit
from ...quant import NF4Weight
from ...stacking import stack

Layer = Any  # a LoraLayer of PEFT's that is a module, which its types do not say
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Fused:
    """Before a layer of PEFT's in the order of its bases."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not args and takes(self, x):
            if not kwargs and why_not(self) is None:
                return fused_forward(self, x)
            if kwargs.keys() == {"adapter_names"} and why_not_mixed(self, kwargs["adapter_names"]) is None:
                return mixed_forward(self, x, kwargs["adapter_names"])
        if log.ON:
            log.say(f"PEFT's forward, since {why_not_now(self, x, why_not, *args, **kwargs)}")
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]


class FusedLinear(Fused, peft_layer.Linear):
    """PEFT's `lora.Linear` over an `nn.Linear` or a transformers `Conv1D`."""

    def _get_name(self) -> str:  # PEFT tells layers apart by it
        return "Linear"


def why_not(layer: Layer) -> str | None:
    """Why a layer's forward is PEFT's own, or None if it is fused."""
    names = active(layer)
    if why := of_state(layer, names) or _of_base(layer.base_layer):
        return why
    for name in names:
        if why := of_adapter(layer, name):
            return f'adapter "{name}": {why}'
    if len(names) > 1 and any(name in layer.lora_variant for name in names):
        return "DoRA beside another active adapter"
    return None


def why_not_mixed(layer: Layer, adapter_names: list[str] | None) -> str | None:
    """Why a batch whose rows have adapters of their own goes to PEFT's forward, or None."""
    if adapter_names is None or layer.disable_adapters or layer.merged or layer.training:
        return "it is in training, or its adapters are disabled or merged"
    factors, dtypes = layer.lora_B._modules, set()
    for name in dict.fromkeys(adapter_names):
        if name not in factors:
            continue
        if why := of_adapter(layer, name):
            return why
        B = factors[name]._parameters
        if name in layer.lora_variant or B["bias"] is not None or isinstance(layer.scaling[name], Tensor):
            return f'adapter "{name}" is DoRA, or has a bias of B, or a tensor as scaling'
        dtypes.add(B["weight"].dtype)
    if len(dtypes) > 1:
        return "its adapters have several dtypes"
    return _of_base(layer.base_layer)


def of_state(layer: Layer, names: list[str]) -> str | None:
    """What is against it whatever the layer is, with these of its adapters active."""
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapters are merged"
    if not names:
        return "no adapter of it is active"
    return None if getattr(layer, "cast_input_dtype_enabled", True) else "the cast of its input is disabled"


def active(layer: Layer) -> list[str]:
    """The active adapters that the layer has."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module does what its class's forward does, and nothing else."""
    # nn.Module takes its time to find what it does not have, and this is asked of every adapter in a call.
    own = module.__dict__
    hooks = (own["_forward_hooks"], own["_forward_pre_hooks"], own["_backward_hooks"], own["_backward_pre_hooks"])
    return not any(hooks) and "forward" not in own and "_hf_hook" not in own


def _is_plain_parameter(t: Any) -> bool:
    return type(t) in (nn.Parameter, Tensor) and not t.is_meta


def _of_base(base: Any) -> str | None:
    if not is_plain(base):
        return "its base layer has hooks or another forward"
    if is_linear4bit(base):
        if getattr(base.weight.quant_state, "packing_format_for_cpu", False):
            return "bitsandbytes has repacked its weight in a forward pass in eval mode"
        return None
    if type(base) is not nn.Linear and not is_conv1d(base):
        return f"its base layer is a {type(base).__name__}"
    return of_weight(base)


def of_weight(base: Any) -> str | None:
    """What is against the base layer's weight."""
    if hasattr(base, "weight_fake_quantizer"):
        return "its base layer is being quantised in training"
    if not _is_plain_parameter(base.weight):
        return f"its base weight is a {type(base.weight).__name__}" + (" on meta" if base.weight.is_meta else "")
    if base.weight.dtype not in _DTYPES:
        return f"its base weight is {base.weight.dtype}"
    return "its base weight is trained" if base.weight.requires_grad else None


def of_adapter(layer: Layer, name: str, kind: type[nn.Module] = nn.Linear) -> str | None:
    """What is against an adapter, whose factors are to be of that class."""
    parts = layer._modules
    A, B, dropout = (parts[part]._modules[name] for part in ("lora_A", "lora_B", "lora_dropout"))
    for factor in (A, B):
        weight = factor._parameters.get("weight")
        if type(factor) is not kind or not is_plain(factor) or not _is_plain_parameter(weight):
            return f"its factors are {type(factor).__name__} of {type(weight).__name__}, or have hooks"
        if weight.dtype not in _DTYPES:
            return f"its factors are {weight.dtype}"
    if type(dropout) not in (nn.Identity, nn.Dropout) or not is_plain(dropout):
        return f"its dropout is a {type(dropout).__name__}"
    variant = layer.lora_variant.get(name)
    if variant is not None and type(variant) is not DoraLinearVariant:
        return f"it is a {type(variant).__name__.removesuffix('Variant').removesuffix('Linear')}"
    return "DoRA with a bias of B" if variant is not None and B.bias is not None else None


def takes(layer: Layer, x: Tensor) -> bool:
    """Whether the base layer would take this x, and no tracer of TorchScript looks on."""
    if x.dtype not in _DTYPES or torch.jit.is_tracing():
        return False
    weight = layer.base_layer.weight
    return x.dtype == weight.dtype or is_linear4bit(layer.base_layer) or autocast_is_on(x.device)


def why_not_now(layer: Layer, x: Tensor, of_layer: Callable[[Layer], str | None], *args: Any, **kwargs: Any) -> str:
    """Why a call was not fused: `of_layer` is what `report` asks, the rest is about the call."""
    if kwargs.get("adapter_names") is not None and (why := why_not_mixed(layer, kwargs["adapter_names"])):
        return why
    if why := of_layer(layer):
        return why
    if args or kwargs:
        return "it was called with arguments of its base layer"
    return f"x is {x.dtype}, which does not go with its weight, or TorchScript traces it"


def fused_forward(layer: Layer, x: Tensor) -> Tensor:
    """What the layer's forward gives, for a layer of which `why_not` knows no reason against it.

    A 4-bit layer returns x's dtype under autocast, too, as bitsandbytes' layers do, and like those multiplies an fp32 x in
    the half that its `compute_dtype` names: under autocast all of it, otherwise the frozen product alone. DoRA stays in fp32.
    """
    base, names = layer.base_layer, active(layer)
    if not is_linear4bit(base):
        return _forward(layer, x)
    in_half = x.dtype == torch.float32 and base.compute_dtype in _DTYPES[1:] and names[0] not in layer.lora_variant
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _forward(layer, x.to(base.compute_dtype) if in_half else x).to(x.dtype)
    if not in_half:
        return _forward(layer, x)
    weight, bias = quantised_weight(layer), base.bias
    N, K = weight.shape
    nothing = x.new_zeros(1, K), x.new_zeros(N, 1)
    y = qlora_linear(x.to(base.compute_dtype), weight, *nothing, scaling=1.0, bias=None if bias is None else bias.float())
    return _with_others(layer, x, y.to(x.dtype), names)


def _forward(layer: Layer, x: Tensor) -> Tensor:
    base, names = layer.base_layer, active(layer)
    weight = quantised_weight(layer) if is_linear4bit(base) else base.weight.T if is_conv1d(base) else base.weight
    linear: Any = qlora_linear if isinstance(weight, NF4Weight) else lora_linear
    dropouts = [dropout_of(layer, name) for name in names]
    first = names if not any(dropouts) else names[:1]  # a mask of its own for every adapter
    A, B, scaling = stack(
        [layer.lora_A[name].weight for name in first],
        [layer.lora_B[name].weight for name in first],
        [layer.scaling[name] for name in first],
    )
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    if A.dtype not in (dtype, torch.float32):  # another half, or a half beside fp32
        A, B = A.float(), B.float()
    bias = bias_of(layer, first)
    options: dict[str, Any] = {"scaling": scaling, "bias": bias, "training": layer.training}
    if names[0] in layer.lora_variant:
        vector = layer.lora_magnitude_vector[names[0]]
        norm = _kept_norm(layer, vector, names[0], lambda: weight_norm(weight, A, B, scaling, _row_norms(layer, weight)))
        return dora_linear(x, weight, A, B, vector.weight, **options, dropout_p=dropouts[0], norm=norm)
    y = linear(x, weight, A, B, **options, dropout_p=dropouts[0])
    return _with_others(layer, x, y, names[len(first) :])


def _with_others(layer: Layer, x: Tensor, y: Tensor, names: list[str]) -> Tensor:
    """y and what these adapters add to it, by PEFT's formula."""
    for name in names:
        A, B = layer.lora_A[name], layer.lora_B[name]
        y = y + (B(A(layer.lora_dropout[name](x.to(A.weight.dtype)))) * layer.scaling[name]).to(y.dtype)
    return y


def mixed_forward(layer: Layer, x: Tensor, adapter_names: list[str]) -> Tensor:
    """What the layer's forward gives where every row of x, or every sequence, has an adapter of its own."""
    layer._check_forward_args(x, adapter_names=adapter_names)
    base, adapters = layer.base_layer, {}
    weight = quantised_weight(layer) if is_linear4bit(base) else base.weight.T if is_conv1d(base) else base.weight
    As, Bs = layer.lora_A._modules, layer.lora_B._modules
    for name in dict.fromkeys(adapter_names):
        if name in As:
            A, B = As[name].weight, Bs[name].weight
            if A.dtype not in (x.dtype, torch.float32):
                A, B = A.float(), B.float()
            adapters[name] = A, B, layer.scaling[name]
    ids = [name if name in adapters else None for name in adapter_names]
    return multi_lora_linear(x, weight, AdapterBank._of(adapters), ids, bias=base.bias)


def dropout_of(layer: Layer, name: str) -> float:
    dropout = layer.lora_dropout[name]
    return dropout.p if layer.training and isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def bias_of(layer: Layer, names: list[str]) -> Tensor | None:
    """The base layer's, and of every adapter with a bias of B that, times its scaling."""
    bias: Tensor | None = layer.base_layer.bias
    for name in names:
        of_B = layer.lora_B[name].bias
        if of_B is not None:
            scaled = of_B.float() * layer.scaling[name]
            bias = scaled if bias is None else bias + scaled
    return bias


def quantised_weight(layer: Layer) -> NF4Weight:
    """The Linear4bit's weight as the kernels read it: a second copy of its codes, which lies beside the layer's state."""
    weight = layer.base_layer.weight
    state = (*version_of(weight), id(weight.quant_state))
    kept = layer.__dict__.get("_lora_ops_weight")
    if kept is None or kept[0] != state:
        with torch.inference_mode(False):  # what is kept is there for training, too
            codes = NF4Weight.from_params4bit(weight)
        kept = layer.__dict__["_lora_ops_weight"] = (state, codes, weight.quant_state)
        layer.__dict__.pop("_lora_ops_norms", None)
    return kept[1]


def _kept_norm(layer: Layer, vector: Any, name: str, norm: Callable[[], Tensor]) -> Tensor:
    """An adapter's ‖W0 + ΔW‖. As in PEFT it is kept in eval mode, inside `peft.helpers.DoraCaching`, and with PEFT's forgotten:
    nothing shows that an adapter has changed, since much writes into `.data`."""
    if torch.compiler.is_compiling() or transformed():
        return norm()
    if not peft_dora.ENABLE_DORA_CACHING or layer.training:
        vector._cache_clear()
        return norm()
    key = f"lora_ops-weight-norm-{name}"
    kept = vector._cache_get(key, None)
    if kept is None:
        kept = norm()
        vector._cache_store(key, kept)
    return kept


def _row_norms(layer: Layer, weight: Tensor | NF4Weight) -> Tensor:
    """`row_norms`, kept as long as the weight is the same."""
    if torch.compiler.is_compiling() or transformed():
        return row_norms(weight)
    state = (id(weight),) if isinstance(weight, NF4Weight) else version_of(weight)
    kept = layer.__dict__.get("_lora_ops_norms")
    if kept is None or kept[0] != state:
        kept = layer.__dict__["_lora_ops_norms"] = (state, row_norms(weight))
    return kept[1]
