"""FusedLoraConv1d, 2d and 3d: a convolution and its adapters."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from .. import log
from ..convolution import CONVOLUTIONS, Geometry, convolve, lora_convolve
from ..registry import method
from ..stacking import stack
from .dense import DenseAdapters
from .settings import AdapterOptions, check_adapter_name


@method(
    "LoRA of convolutions",
    equation="y = conv(x, W0) + s conv1x1(conv(x, A), B): A has the windows of W0, B is 1 x 1",
    use='add_lora(model, LoraConfig(target_modules=["conv1"]))',
    changes="P",
    source="PEFT, https://github.com/huggingface/peft",
    test="test_conv.py::test_merged_is_unmerged",
    note="microsoft/LoRA's convolutions are another parametrisation: ΔW = (B A) viewed as W0, A (r k, K k), B (N k, r k).",
)
class FusedLoraConv(DenseAdapters):
    """Drop-in for `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` with a trainable low-rank update:
    y = W0 * x + scaling · B * (A * drop(x)) + bias, where B's kernel is of size 1.

    Parameters: `weight` (N, C / groups, *kernel_size) and `bias` (N,), frozen; `lora_A[name]` (r, C, *kernel_size) and
    `lora_B[name]` (N, r / groups, 1, ...), PEFT's shapes, trainable. A's windows are the weight's, dilation and padding mode
    included, so that ΔW = B A can be merged (PEFT's are neither dilated nor padded otherwise than with zeros). With groups, A
    sees all channels, and only B is in groups, as in PEFT: nothing can be merged then.

    Where windows do not overlap and are not padded (kernels of size 1; patches, whose stride is their size), the layer is a
    matrix product and runs as one `lora_linear`, forward and backward. Otherwise torch convolves x with W0 and with A.

    Args:
        in_channels, out_channels: C and N.
        kernel_size, stride, padding, dilation, groups, bias, padding_mode: see `nn.Conv2d`.
        r: rank, >= 1, a multiple of groups.
        lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype: see `FusedLoraLinear`; K is C · Π kernel_size.
        device, dtype: of weight and bias.

    Raises:
        ValueError, TypeError: an argument out of its range, by name.
    """

    conv_class: ClassVar[type[nn.Module]]
    groups: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        r: int = 8,
        *,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        settings = self._settings(r, options)
        super().__init__()
        geometry = (kernel_size, stride, padding, dilation, groups)
        conv = self.conv_class(in_channels, out_channels, *geometry, bias, padding_mode, device=device, dtype=dtype)
        check_groups(conv, r)
        self._wrap(conv)
        self._new_adapter("default", settings)
        self.active_adapters = ["default"]

    @classmethod
    def from_conv(
        cls, conv: nn.Module, r: int = 8, *, adapter_name: str = "default", **options: Unpack[AdapterOptions]
    ) -> Self:
        """Wraps the nn.Conv of that many dimensions, sharing its weight and bias, which are frozen: nothing is copied.

        Raises:
            TypeError: another kind of layer.
            ValueError: an argument out of its range, by name.
        """
        settings = cls._settings(r, options)
        check_adapter_name(adapter_name)
        if not is_conv(conv) or not isinstance(conv, cls.conv_class):
            name = cls.conv_class.__name__
            raise TypeError(f"conv must be an nn.{name} with its own forward, got {type(conv).__name__}")
        check_groups(conv, r)
        return cls._around(conv, adapter_name, settings)

    def _wrap(self, conv: Any) -> None:
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.in_features, self.out_features = conv.in_channels, conv.out_channels
        for name, value in Geometry.of(conv)._asdict().items():
            setattr(self, name, value)
        self._setup(conv.weight, conv.bias)

    @property
    def geometry(self) -> Geometry:
        """Of the windows, from the attributes that an nn.Conv has for it, which may be assigned to."""
        return Geometry.of(self)

    def _factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return conv_factor_shapes(self, r)

    def _matrices(self, name: str) -> tuple[Tensor, Tensor]:
        if self.groups > 1:
            raise ValueError(f"adapter_name must be of a layer without groups, got {name!r} of one with {self.groups}")
        return self.lora_A[name].flatten(1), self.lora_B[name].flatten(1)

    def _factors(self, names: Sequence[str]) -> tuple[Tensor, Tensor, float]:
        As, Bs = zip(*(self._matrices(name) for name in names), strict=True)
        return stack(As, Bs, [self.scaling[name] for name in names])

    def forward(self, x: Tensor) -> Tensor:
        geometry = self.geometry
        if self._is_frozen_layer:
            return convolve(x, self.weight, self.bias, geometry)
        if geometry.is_product:
            together, apart = self._together_and_apart()
            A, B, scaling = self._factors(together)
            dropout_p = self.lora_dropout[together[0]]
            options: dict[str, Any] = {"scaling": scaling, "dropout_p": dropout_p, "training": self.training}
            y = lora_convolve(x, self.weight, A, B, geometry, self.bias, **options)
        else:
            if log.ON:
                log.say("torch's convolutions, since this one is no matrix product: its windows overlap, are padded, ...")
            y, apart = convolve(x, self.weight, self.bias, geometry), self.active_adapters
        total = y
        for name in apart:
            total = total + self._of_adapter(x, name)
        return total.to(y.dtype)

    def _of_adapter(self, x: Tensor, name: str) -> Tensor:
        """What an adapter adds to the output, with a mask of its own."""
        A, B = self.lora_A[name], self.lora_B[name]
        dropped = F.dropout(x.to(A.dtype), self.lora_dropout[name], self.training)
        S = convolve(dropped, A, None, self.geometry, groups=1) * self.scaling[name]
        n = A.dim() - 2
        of_size_1 = Geometry((1,) * n, (1,) * n, (0,) * n, (1,) * n, self.groups, "zeros")
        return convolve(S, B, None, of_size_1)

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        if self.groups > 1:
            raise ValueError(f"groups must be 1 for adapters to be merged, got {self.groups}: A sees all channels")
        return (B.flatten(1) @ A.flatten(1)).view(self.weight.shape)

    def extra_repr(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.geometry._asdict().items())
        return f"{self.in_channels}, {self.out_channels}, {fields}, bias={self.bias is not None}, {self._merged_repr()}"


class FusedLoraConv1d(FusedLoraConv):
    __doc__ = FusedLoraConv.__doc__
    conv_class = nn.Conv1d


class FusedLoraConv2d(FusedLoraConv):
    __doc__ = FusedLoraConv.__doc__
    conv_class = nn.Conv2d


class FusedLoraConv3d(FusedLoraConv):
    __doc__ = FusedLoraConv.__doc__
    conv_class = nn.Conv3d


def is_conv(module: nn.Module) -> bool:
    """Whether it is an nn.Conv1d, 2d or 3d that does what its class says."""
    own = any(type(module).forward is conv.forward for conv in CONVOLUTIONS)
    return isinstance(module, CONVOLUTIONS) and own and "forward" not in vars(module)


def conv_factor_shapes(conv: Any, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of A and B beside a convolution.

    Raises:
        ValueError: r is no multiple of its groups.
    """
    check_groups(conv, r)
    ones = (1,) * len(conv.kernel_size)
    return (r, conv.in_channels, *conv.kernel_size), (conv.out_channels, r // conv.groups, *ones)


def check_groups(conv: Any, r: int) -> None:
    if r % conv.groups:
        raise ValueError(f"r must be a multiple of the convolution's groups, {conv.groups}, got {r}")
