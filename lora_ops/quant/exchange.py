"""bitsandbytes' format of a 4-bit weight, as keyword arguments of NF4Weight and back. Nothing of bitsandbytes is imported.

{prefix}weight                                  packed codes, (ceil(N K / 2), 1) uint8, or a view of another dtype
{prefix}weight.absmax                           (blocks,) float32, or uint8 with double quantisation
{prefix}weight.quant_map                        (16,) float32, the code's values
{prefix}weight.nested_absmax, .nested_quant_map  (ceil(blocks / 256),) and (256,) float32, with double quantisation
{prefix}weight.quant_state.bitsandbytes__nf4    JSON in uint8: quant_type, blocksize, dtype, shape, nested_*
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import layout

_STATE = "quant_state.bitsandbytes__"
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass
class QuantState:
    """What of bitsandbytes' class of this name matters here, by its names. state2: the state of a quantised absmax."""

    absmax: Tensor
    code: Tensor
    blocksize: int
    dtype: Any
    shape: Any = None
    quant_type: Any = None
    offset: Tensor | None = None
    state2: "QuantState | None" = None


def read(state: Mapping[str, Tensor], prefix: str) -> tuple[Tensor, QuantState]:
    """The packed codes, and what lies beside them."""
    weight = f"{prefix}weight"

    def tensor(suffix: str) -> Tensor:
        key = weight + suffix
        if key not in state:
            raise KeyError(f"{key} is missing: not the state of a 4-bit weight")
        if not isinstance(state[key], Tensor):
            raise TypeError(f"{key} must be a tensor, got {type(state[key]).__name__}")
        return state[key]

    suffixes = [key.removeprefix(weight) for key in state if key.startswith(f"{weight}.{_STATE}")]
    if len(suffixes) > 1:
        raise ValueError(f"there must be one quant_state, got {suffixes}")
    suffix = suffixes[0] if suffixes else f".{_STATE}nf4"
    fields = _fields(tensor(suffix))
    if fields["quant_type"] != suffix.removeprefix(f".{_STATE}"):
        raise ValueError(f"quant_type is {fields['quant_type']!r} in {suffix}")
    quant_state = QuantState(
        absmax=tensor(".absmax"),
        code=tensor(".quant_map"),
        blocksize=fields["blocksize"],
        dtype=_dtype(fields["dtype"]),
        shape=fields["shape"],
        quant_type=fields["quant_type"],
    )
    if "nested_offset" in fields or f"{weight}.nested_absmax" in state:
        quant_state.state2 = QuantState(
            absmax=tensor(".nested_absmax"),
            code=tensor(".nested_quant_map"),
            blocksize=fields["nested_blocksize"],
            dtype=_dtype(fields["nested_dtype"]),
        )
        offset = fields["nested_offset"]
        if type(offset) not in (int, float):
            raise ValueError(f"nested_offset in the quant_state must be a number, got {offset!r}")
        if abs(offset) > torch.finfo(torch.float32).max:
            raise ValueError(f"offset must be finite in float32, got {offset!r}")
        quant_state.offset = torch.tensor(offset, dtype=torch.float32, device=quant_state.absmax.device)
    return tensor(""), quant_state


def _dtype(name: Any) -> Any:
    """A name that is none stays what it is, for the error that follows."""
    return _DTYPES.get(name, name) if isinstance(name, str) else name


class _Fields(dict[str, Any]):
    def __missing__(self, key: str) -> Any:
        raise KeyError(f"{key} is missing in the quant_state of a 4-bit weight")


def _fields(t: Tensor) -> dict[str, Any]:
    if t.dtype != torch.uint8 or t.dim() != 1:
        raise TypeError(f"quant_state must be JSON in a vector of uint8, got shape {tuple(t.shape)}, {t.dtype}")
    try:
        fields = json.loads(bytes(t.tolist()))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are of the first kind
        raise ValueError(f"quant_state is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"quant_state must be a JSON object, got {fields!r}")
    return _Fields(fields)


def arguments(packed: Tensor, quant_state: Any) -> dict[str, Any]:
    """What NF4Weight is made of, from packed codes and bitsandbytes' QuantState or ours. No tensor is shared."""
    shape = tuple(quant_state.shape) if isinstance(quant_state.shape, list | tuple) else quant_state.shape
    quant_type = quant_state.quant_type
    layout.check_format(shape, quant_state.dtype, quant_state.blocksize, quant_type)
    N, K = shape
    packed = packed.detach().as_subclass(Tensor).contiguous().view(-1).view(torch.uint8)
    if packed.numel() != (N * K + 1) // 2:
        raise ValueError(f"the packed codes of a weight {shape} must be {(N * K + 1) // 2} bytes, got {packed.numel()}")
    code = quant_state.code.cpu()
    if code.dtype != torch.float32 or not torch.equal(code, reference.code_4bit(quant_type)):
        raise ValueError(f"quant_map must be the 16 values of {quant_type} in float32, got {quant_state.code.tolist()}")
    nested = quant_state.state2
    if nested is not None and (nested.blocksize != reference.NESTED_BLOCKSIZE or nested.dtype != torch.float32):
        raise ValueError(
            f"absmax must be quantised in blocks of {reference.NESTED_BLOCKSIZE} and from float32, "
            f"got nested_blocksize {nested.blocksize!r}, nested_dtype {nested.dtype!r}"
        )
    return {
        "codes": layout.from_bitsandbytes(packed, (N, K), quant_type),
        "absmax": quant_state.absmax.clone(),
        "nested_absmax": None if nested is None else nested.absmax.clone(),
        "nested_code": None if nested is None else nested.code.clone(),
        "offset": None if nested is None else quant_state.offset.clone(),
        "shape": (N, K),
        "dtype": quant_state.dtype,
        "blocksize": quant_state.blocksize,
        "quant_type": quant_type,
    }


def write(packed: Tensor, quant_state: QuantState, prefix: str) -> dict[str, Tensor]:
    """The way back from `read`: the keys in bitsandbytes' order, the JSON in its bytes."""
    fields = {
        "quant_type": quant_state.quant_type,
        "blocksize": quant_state.blocksize,
        "dtype": _NAMES[quant_state.dtype],
        "shape": list(quant_state.shape),
    }
    state = {"": packed, ".absmax": quant_state.absmax, ".quant_map": quant_state.code}
    nested = quant_state.state2
    if nested is not None and quant_state.offset is not None:
        fields |= {
            "nested_blocksize": nested.blocksize,
            "nested_dtype": _NAMES[nested.dtype],
            "nested_offset": quant_state.offset.item(),
        }
        state |= {".nested_absmax": nested.absmax, ".nested_quant_map": nested.code}
    state[f".{_STATE}{quant_state.quant_type}"] = torch.tensor(
        list(json.dumps(fields).encode()), dtype=torch.uint8, device="cpu"
    )
    return {f"{prefix}weight{suffix}": t for suffix, t in state.items()}
