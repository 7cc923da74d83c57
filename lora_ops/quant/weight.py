"""NF4Weight: a 4-bit weight with its scales. Its arithmetic is in layout.py, bitsandbytes' format in exchange.py."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference
from . import exchange, layout


@dataclass(frozen=True, eq=False, repr=False)
class NF4Weight:
    """A weight (N, K) in 4 bits: weight[n, k] = code[q[n, k]] · absmax[(n K + k) // blocksize].

    Multiplied in fp32 and rounded once. NF4 and double quantisation: Dettmers et al., "QLoRA: Efficient Finetuning of
    Quantized LLMs", NeurIPS 2023 (https://arxiv.org/abs/2305.14314). bitsandbytes' numbers in another order: the codes lie
    as the kernels read them (csrc/nf4.h). Not to be changed in place.

    Attributes:
        codes: (N, row_bytes(K)) uint8.
        absmax: (blocks,), blocks = ceil(N K / blocksize): float32, or uint8 with double quantisation, where the scale is
            nested_code[absmax[b]] · nested_absmax[b // 256] + offset.
        nested_absmax: (ceil(blocks / 256),) float32, or None.
        nested_code: (256,) float32, or None.
        offset: () float32, or None.
        shape: (N, K).
        dtype: float32, bfloat16 or float16: the dtype of the weight that was quantised, and what `dequantize` returns.
        blocksize: 32, 64, 128, 256, 512, 1024, 2048 or 4096 neighbours of the flattened weight; blocks run across rows.
        quant_type: "nf4" or "fp4".

    Raises:
        ValueError, TypeError: what does not fit, by name. Scales that are not finite do not fit.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: Tensor | None
    shape: tuple[int, int]
    dtype: torch.dtype
    blocksize: int = 64
    quant_type: str = "nf4"

    def __post_init__(self) -> None:
        layout.check_format(self.shape, self.dtype, self.blocksize, self.quant_type)
        layout.check_tensors(
            self.codes, self.absmax, self.nested_absmax, self.nested_code, self.offset, self.shape, self.blocksize
        )
        for name, t in self._tensors().items():
            if t.is_floating_point() and not t.is_meta and not torch.isfinite(t).all():
                raise ValueError(f"{name} must be finite, got {t[~torch.isfinite(t)][0].item()}")

    @classmethod
    def from_bitsandbytes(cls, state: Mapping[str, Tensor], prefix: str = "") -> "NF4Weight":
        """Reads what bitsandbytes' `Linear4bit` has in a state dict or a safetensors file.

        Args:
            state: holds `{prefix}weight`, the packed codes in any storage dtype, and beside it `.absmax`, `.quant_map` and
                `.quant_state.bitsandbytes__nf4` (or `__fp4`), with double quantisation also `.nested_absmax` and
                `.nested_quant_map`. Other keys are left alone, and no tensor is shared.
            prefix: the layer's name and a dot.

        Raises:
            KeyError: a key that is missing, by name.
            ValueError, TypeError: a part that is damaged or of a kind that is not supported, by name.
        """
        try:
            return cls(**exchange.arguments(*exchange.read(state, prefix)))
        except (ValueError, TypeError) as error:
            raise type(error)(f"{prefix}weight: {error}") from error

    @classmethod
    def from_params4bit(cls, param: Tensor) -> "NF4Weight":
        """Takes the numbers of a live `bitsandbytes.nn.Params4bit`, which stays as it is.

        Raises:
            TypeError: not a quantised Params4bit.
            ValueError: its quant_state is damaged, or a forward pass of bitsandbytes in eval mode on a CPU has repacked it
                (`packing_format_for_cpu`), which rounds the scales to bfloat16.
        """
        quant_state = getattr(param, "quant_state", None)
        if quant_state is None:
            raise TypeError(
                f"param must be a quantised bitsandbytes Params4bit, got {type(param).__name__} without quant_state"
            )
        if getattr(quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                "param has been repacked by a forward pass of bitsandbytes in eval mode (packing_format_for_cpu), which rounds "
                "its scales to bfloat16; take the weight before that, or load the model again"
            )
        return cls(**exchange.arguments(param, quant_state))

    def to_bitsandbytes(self, prefix: str = "", quant_storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
        """The entries of bitsandbytes' state dict (see `from_bitsandbytes`), to the last bit.

        Args:
            prefix: the layer's name and a dot.
            quant_storage: the dtype that the packed codes are viewed as.

        Raises:
            ValueError: the packed codes are no whole number of `quant_storage`'s elements.
        """
        packed = layout.to_bitsandbytes(self.codes, self.shape, self.quant_type)
        if packed.numel() % quant_storage.itemsize:
            raise ValueError(f"quant_storage must divide the codes' {packed.numel()} bytes, got {quant_storage}")
        state2 = None
        if self.nested_absmax is not None and self.nested_code is not None:
            state2 = exchange.QuantState(self.nested_absmax, self.nested_code, reference.NESTED_BLOCKSIZE, torch.float32)
        quant_state = exchange.QuantState(
            self.absmax,
            reference.code_4bit(self.quant_type, self.device),
            self.blocksize,
            self.dtype,
            self.shape,
            self.quant_type,
            self.offset,
            state2,
        )
        return exchange.write(packed.view(-1).view(quant_storage).view(-1, 1), quant_state, prefix)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: with double quantisation and blocks of 64, 4.13 bits per weight, and 1 KiB."""
        return sum(t.nbytes for t in self._tensors().values())

    def dequantize_absmax(self) -> Tensor:
        """The scales, (blocks,) float32."""
        if self.nested_absmax is None or self.nested_code is None or self.offset is None:
            return self.absmax
        return reference.dequantize_absmax(self.absmax, self.nested_absmax, self.nested_code, self.offset)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (N, K): code · absmax in fp32, rounded once to `dtype` (default: `self.dtype`).

        Args:
            dtype: float32, bfloat16 or float16; or float64, which holds the product exactly.

        Raises:
            TypeError: another dtype.
        """
        dtype = dtype or self.dtype
        if dtype not in (*layout.DTYPES, torch.float64):
            raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
        return layout.dequantize(self.codes, self.dequantize_absmax(), self.shape, self.blocksize, self.quant_type, dtype)

    def to(self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None) -> "NF4Weight":
        """Moved, and with another `dtype`; the tensors' own dtypes stay. `self` stays as it is."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        moved = self.apply(lambda t: t.to(device)) if device is not None else self
        if dtype is None:
            return moved
        layout.check_format(self.shape, dtype, self.blocksize, self.quant_type)
        cast = copy.copy(moved)
        object.__setattr__(cast, "dtype", dtype)
        return cast

    def clone(self) -> "NF4Weight":
        """A copy that shares no memory."""
        return self.apply(torch.clone)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> "NF4Weight":
        """A weight of `fn` of every tensor, which may move or copy it."""
        mapped = copy.copy(self)  # not checked again: `to_empty` has numbers of any kind for a while
        for name, t in self._tensors().items():
            object.__setattr__(mapped, name, fn(t))
        return mapped

    def _tensors(self) -> dict[str, Tensor]:
        return {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}

    def __repr__(self) -> str:
        return (
            f"NF4Weight(shape={self.shape}, dtype={self.dtype}, blocksize={self.blocksize}, quant_type={self.quant_type!r}, "
            f"double_quant={self.nested_absmax is not None}, device={str(self.device)!r})"
        )


# A saved NF4Weight holds nothing but tensors and plain values: torch.load may read it.
torch.serialization.add_safe_globals([NF4Weight])


@torch.no_grad()
def quantize_nf4(weight: Tensor, blocksize: int = 64, double_quant: bool = True, quant_type: str = "nf4") -> NF4Weight:
    """Quantises a weight to 4 bits, as bitsandbytes does, to the last bit.

    absmax = max |w| of a block, q = the code nearest to w / absmax (of two equally near, the lower). Dettmers et al., "QLoRA:
    Efficient Finetuning of Quantized LLMs", NeurIPS 2023 (https://arxiv.org/abs/2305.14314).

    Args:
        weight: (N, K), float32, bfloat16 or float16, any strides, finite.
        blocksize: how many neighbours of the flattened weight share a scale: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
            They may run across rows.
        double_quant: quantise the scales as well, minus their mean, to 8 bits in blocks of 256: 0.37 bits per weight less at
            blocks of 64. bitsandbytes' `compress_statistics`.
        quant_type: "nf4" (NormalFloat) or "fp4" (bitsandbytes' 4-bit floats).

    Returns:
        NF4Weight on weight's device. It does not depend on the number of threads. (The mean of more than 32768 scales does
        in bitsandbytes: it is what one thread computes.)

    Raises:
        ValueError: a weight that is not 2-D, is empty or not finite, a block size or quant_type that does not exist.
        TypeError: another dtype.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight must be (N, K), got shape {tuple(weight.shape)}")
    N, K = weight.shape
    layout.check_format((N, K), weight.dtype, blocksize, quant_type)
    codes, absmax = layout.quantize(weight.detach(), blocksize, quant_type)
    nested_absmax = nested_code = offset = None
    if double_quant:
        absmax, nested_absmax, offset = reference.quantize_absmax(absmax)
        nested_code = reference.nested_code().to(weight.device, copy=True)
    return NF4Weight(codes, absmax, nested_absmax, nested_code, offset, (N, K), weight.dtype, blocksize, quant_type)
