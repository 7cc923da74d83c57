"""4-bit codes of a weight (N, K) in the kernels' memory layout (csrc/nf4.h): uint8 (N, row_bytes(K)), made and read.

On the CPU by the extension, elsewhere by torch.
"""

from typing import Any

import torch
from torch import Tensor

from .. import _C, reference
from ..autograd import transformed

QUANT_TYPES = {"nf4": 0, "fp4": 1}
ZERO_CODE = {"nf4": 7, "fp4": 0}
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CHUNK = 128


def check_format(shape: Any, dtype: Any, blocksize: Any, quant_type: Any) -> None:
    """Raises ValueError or TypeError naming what does not fit, what it is and what it may be."""
    if not isinstance(shape, tuple) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"shape of a 4-bit weight must be (N, K) with N, K >= 1, got {shape!r}")
    if dtype not in tuple(DTYPES):
        raise TypeError(f"dtype of a weight to quantise must be float32, bfloat16 or float16, got {dtype!r}")
    check_code(blocksize, quant_type)


def check_code(blocksize: Any, quant_type: Any) -> None:
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {blocksize!r}")
    if quant_type not in tuple(QUANT_TYPES):
        raise ValueError(f'quant_type must be "nf4" or "fp4", got {quant_type!r}')


def row_bytes(K: int) -> int:
    """Of one row's codes: csrc/nf4.h's function, for those who trace Python."""
    rest = K % CHUNK
    return K // CHUNK * 64 + (0 if rest == 0 else 32 if rest <= CHUNK // 2 else 64)


def check_tensors(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    shape: tuple[int, int],
    blocksize: int,
) -> None:
    """Raises ValueError or TypeError naming the tensor of a 4-bit weight (N, K) that does not fit, but for its numbers."""
    N, K = shape
    blocks = -(-N * K // blocksize)
    double_quant = nested_absmax is not None
    if (nested_code is not None) != double_quant or (offset is not None) != double_quant:
        raise ValueError("nested_absmax, nested_code and offset go together: all of them, or None for each")
    groups = -(-blocks // reference.NESTED_BLOCKSIZE)
    for name, t, dtype, expected in (
        ("codes", codes, torch.uint8, (N, row_bytes(K))),
        ("absmax", absmax, torch.uint8 if double_quant else torch.float32, (blocks,)),
        ("nested_absmax", nested_absmax, torch.float32, (groups,)),
        ("nested_code", nested_code, torch.float32, (256,)),
        ("offset", offset, torch.float32, ()),
    ):
        if t is None:
            continue
        if t.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {t.dtype}")
        if t.shape != expected:
            of = f"a weight {shape} in blocks of {blocksize}"
            raise ValueError(f"{name} of {of} must have shape {expected}, got {tuple(t.shape)}")
        if t.device != codes.device:
            raise ValueError(f"{name} must be on codes' device {codes.device}, got {t.device}")
        if not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {t.stride()}")


def pack_codes(codes: Tensor, quant_type: str) -> Tensor:
    """(N, K) codes, one per byte, to (N, row_bytes(K)).

    Of every 128 weights, nibble j of 16-bit word w holds weight 32 j + w. A rest of up to 64 takes one byte per two weights:
    32 j + w in nibble j of byte w. What lies beyond the row is the code of zero.
    """
    N, K = codes.shape
    short = 0 < K % CHUNK <= CHUNK // 2
    multiple = CHUNK // 2 if short else CHUNK
    padded = torch.nn.functional.pad(codes, (0, -K % multiple), value=ZERO_CODE[quant_type])
    whole = padded.shape[1] // CHUNK * CHUNK
    j = padded[:, :whole].reshape(N, -1, 4, 32)
    packed = torch.stack([j[:, :, 0] | j[:, :, 1] << 4, j[:, :, 2] | j[:, :, 3] << 4], dim=-1).view(N, whole // 2)
    if not short:
        return packed
    tail = padded[:, whole:].reshape(N, 2, 32)
    return torch.cat([packed, tail[:, 0] | tail[:, 1] << 4], dim=1)


def unpack_codes(packed: Tensor, K: int) -> Tensor:
    """The way back, (N, K)."""
    N = packed.shape[0]
    whole = packed.shape[1] // 64 * 64
    words = packed[:, :whole].reshape(N, -1, 32, 2)
    low, high = words[..., 0], words[..., 1]
    codes = torch.stack([low & 15, low >> 4, high & 15, high >> 4], dim=2).view(N, 2 * whole)
    tail = packed[:, whole:]
    return torch.cat([codes, tail & 15, tail >> 4], dim=1)[:, :K]


def has_kernel(t: Tensor) -> bool:
    if hasattr(t, "full_tensor"):
        # A DTensor is a CPU tensor without an address.
        raise RuntimeError(
            "a sharded weight cannot be read as a whole, got a DTensor; gather it first: unshard(), full_tensor()"
        )
    return t.device.type == "cpu"


def _cuda(t: Tensor, dtype: torch.dtype) -> Any:
    """lora_ops.cuda.dispatch, where it has kernels for t's device and dtype. Imported late: it is built on this package."""
    if t.device.type != "cuda":
        return None
    from ..cuda import dispatch

    return dispatch if dispatch.has_4bit_kernel(t, dtype) else None


def quantize(weight: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    """codes (N, row_bytes(K)) and absmax of a weight (N, K).

    Raises:
        ValueError: an element that is not finite.
    """
    N, K = weight.shape
    if not has_kernel(weight):
        cuda = _cuda(weight, weight.dtype)
        if cuda is not None:
            codes, absmax = cuda.quantize(weight, blocksize, quant_type)
        else:
            flat, absmax = reference.quantize_4bit(weight, blocksize, quant_type)
            codes = pack_codes(flat.view(N, K), quant_type)
        if not absmax.isfinite().all():
            raise _not_finite(weight, int((~weight.isfinite()).reshape(-1).nonzero()[0]))
        return codes, absmax
    weight = weight.contiguous()
    codes = weight.new_empty((N, row_bytes(K)), dtype=torch.uint8)
    absmax = weight.new_empty(-(-N * K // blocksize), dtype=torch.float32)
    bad = _C.quantize_4bit(
        N, K, QUANT_TYPES[quant_type], blocksize, codes.data_ptr(), absmax.data_ptr(), weight.data_ptr(),
        DTYPES[weight.dtype], torch.get_num_threads(),
    )  # fmt: skip
    if bad >= 0:
        raise _not_finite(weight, bad)
    return codes, absmax


def _not_finite(weight: Tensor, index: int) -> ValueError:
    n, k = divmod(index, weight.shape[1])
    return ValueError(f"weight must be finite, got {weight[n, k].item()} at {(n, k)}")


def dequantize(
    codes: Tensor, absmax: Tensor, shape: tuple[int, int], blocksize: int, quant_type: str, dtype: torch.dtype
) -> Tensor:
    """weight (N, K) in dtype, from absmax in fp32. float64 is exact, and torch's everywhere."""
    N, K = shape
    cuda = _cuda(codes, dtype)
    if cuda is not None:
        return cuda.dequantize(codes.contiguous(), absmax.contiguous(), K, blocksize, quant_type, dtype)
    if not has_kernel(codes) or dtype not in DTYPES or transformed():  # torch.func wraps the tensors that are made
        return reference.dequantize_4bit(unpack_codes(codes, K), absmax, blocksize, quant_type, dtype)
    codes, absmax = codes.contiguous(), absmax.contiguous()
    weight = codes.new_empty(shape, dtype=dtype)
    _C.dequantize_4bit(
        N, K, QUANT_TYPES[quant_type], blocksize, codes.data_ptr(), absmax.data_ptr(), weight.data_ptr(),
        DTYPES[dtype], torch.get_num_threads(),
    )  # fmt: skip
    return weight


def to_bitsandbytes(codes: Tensor, shape: tuple[int, int], quant_type: str) -> Tensor:
    """(ceil(N K / 2), 1) uint8, bitsandbytes' packing: two neighbours of the flattened weight per byte, the first one high."""
    N, K = shape
    if not has_kernel(codes):
        flat = unpack_codes(codes, K).reshape(-1)
        flat = torch.nn.functional.pad(flat, (0, N * K % 2), value=ZERO_CODE[quant_type])
        return (flat[::2] << 4 | flat[1::2]).view(-1, 1)
    codes = codes.contiguous()
    packed = codes.new_empty(((N * K + 1) // 2, 1))
    _C.to_bitsandbytes(N, K, QUANT_TYPES[quant_type], codes.data_ptr(), packed.data_ptr(), torch.get_num_threads())
    return packed


def from_bitsandbytes(packed: Tensor, shape: tuple[int, int], quant_type: str) -> Tensor:
    """The way back, from ceil(N K / 2) bytes of any shape."""
    N, K = shape
    packed = packed.reshape(-1)
    if not has_kernel(packed):
        flat = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[: N * K]
        return pack_codes(flat.view(N, K), quant_type)
    codes = packed.new_empty((N, row_bytes(K)))
    _C.from_bitsandbytes(N, K, QUANT_TYPES[quant_type], codes.data_ptr(), packed.data_ptr(), torch.get_num_threads())
    return codes
