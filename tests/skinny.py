"""The skinny CUDA products as the tests call them: their structs, and one function per op that allocates what it writes.

Call them inside `with device.run(...) as run`: memory that is created there has exact bounds, and torch.empty is uninitialised.
"""

import ctypes
from dataclasses import dataclass

import torch
from compare import BF16, F16, F32, Dtypes
from cuda_structs import Dropout as DropoutStruct
from torch import Tensor

from lora_ops import reference

DTYPES = [Dtypes(BF16, BF16), Dtypes(BF16, F32), Dtypes(F16, F16), Dtypes(F16, F32)]
CODES = {F32: 0, BF16: 1, F16: 2}


@dataclass(frozen=True)
class Dropout:
    p: float
    seed: int = 0x123456789ABCDEF

    def keep(self, M: int, K: int) -> Tensor:
        """(M, K) bool."""
        return reference.dropout_keep(torch.tensor(self.seed), self.p, M, K)

    def of(self, x: Tensor) -> Tensor:
        """drop(x) in x's dtype, which is fp64 in an oracle."""
        return x * (self.keep(*x.shape).to(x.dtype) / (1 - self.p))


def products(dtypes: Dtypes) -> int:
    """Of parts, for one of the tensor core's 16 x 8 x 16 in exact numbers."""
    if dtypes.adapter != F32:
        return 1
    return 3 if dtypes.x == BF16 else 5


def _struct(name: str, **fields: type) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_size, _address, _dtype, _count, _float = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_float

LoraDown = _struct(
    "LoraDown", M=_size, K=_size, r=_size, x=_address, x_row_stride=_size, x_dtype=_dtype, lora_A=_address,
    adapter_dtype=_dtype, dropout=DropoutStruct, S=_address, workspace=_address, sm_count=_count,
)  # fmt: skip
_LoraBackwardDown = _struct(
    "LoraBackwardDown", M=_size, K=_size, r=_size, dS=_address, x=_address, x_row_stride=_size, x_dtype=_dtype,
    dropout=DropoutStruct, dA=_address, adapter_dtype=_dtype, workspace=_address, sm_count=_count,
)  # fmt: skip
_LoraBackwardUp = _struct(
    "LoraBackwardUp", M=_size, N=_size, r=_size, dy=_address, dy_row_stride=_size, dy_dtype=_dtype, lora_B=_address,
    S=_address, adapter_dtype=_dtype, scaling=_float, dS=_address, dB=_address, dbias=_address, dbias_dtype=_dtype,
    workspace=_address, sm_count=_count,
)  # fmt: skip


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _launch(library: ctypes.CDLL, op: str, params: ctypes.Structure) -> None:
    workspace_bytes = getattr(library, f"lora_ops_{op}_workspace_bytes")
    workspace_bytes.restype = ctypes.c_int64
    workspace = torch.empty(workspace_bytes(ctypes.byref(params)) // 4, dtype=F32)
    params.workspace = workspace.data_ptr()
    library.lora_ops_last_error.restype = ctypes.c_char_p
    failed = getattr(library, f"lora_ops_{op}")(ctypes.byref(params), None)
    assert not failed, library.lora_ops_last_error().decode()


def device_dropout(dropout: Dropout | None) -> tuple[DropoutStruct, Tensor | None]:
    """And the seed's tensor, which is to be kept until the launch."""
    if dropout is None:
        return DropoutStruct(None, 0, 1.0), None
    seed = torch.tensor([dropout.seed])
    return DropoutStruct(seed.data_ptr(), reference.dropout_threshold(dropout.p), 1 / (1 - dropout.p)), seed


def lora_down(library: ctypes.CDLL, x: Tensor, lora_A: Tensor, *, dropout: Dropout | None = None, sm_count: int = 1) -> Tensor:
    """S (M, r)."""
    (M, K), r = x.shape, lora_A.shape[0]
    S = torch.empty(M, r, dtype=F32)
    drop, seed = device_dropout(dropout)
    _launch(library, "lora_down", LoraDown(
        M, K, r, x.data_ptr(), x.stride(0), CODES[x.dtype], lora_A.data_ptr(), CODES[lora_A.dtype], drop, S.data_ptr(),
        None, sm_count,
    ))  # fmt: skip
    del seed
    return S


def lora_backward_down(
    library: ctypes.CDLL,
    dS: Tensor,
    x: Tensor,
    dtype: torch.dtype,
    *,
    dropout: Dropout | None = None,
    sm_count: int = 1,
) -> Tensor:
    """dA (r, K) in dtype."""
    (M, K), r = x.shape, dS.shape[1]
    dA = torch.empty(r, K, dtype=dtype)
    drop, seed = device_dropout(dropout)
    _launch(library, "lora_backward_down", _LoraBackwardDown(
        M, K, r, dS.data_ptr(), x.data_ptr(), x.stride(0), CODES[x.dtype], drop, dA.data_ptr(), CODES[dtype], None, sm_count,
    ))  # fmt: skip
    del seed
    return dA


def lora_backward_up(
    library: ctypes.CDLL,
    dy: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    *,
    wanted: tuple[str, ...] = ("dS", "dB", "dbias"),
    dbias_dtype: torch.dtype | None = None,
    sm_count: int = 1,
) -> dict[str, Tensor]:
    """Those of dS (M, r), dB (N, r), dbias (N) that are wanted. An input that they do not need is not passed."""
    (M, N), r = dy.shape, lora_B.shape[1]
    dbias_dtype = dbias_dtype or dy.dtype
    shapes = {"dS": ((M, r), F32), "dB": ((N, r), lora_B.dtype), "dbias": ((N,), dbias_dtype)}
    out = {name: torch.empty(shapes[name][0], dtype=shapes[name][1]) for name in wanted}
    _launch(library, "lora_backward_up", _LoraBackwardUp(
        M, N, r, dy.data_ptr(), dy.stride(0), CODES[dy.dtype], lora_B.data_ptr() if "dS" in wanted else None,
        S.data_ptr() if "dB" in wanted else None, CODES[lora_B.dtype], scaling, _pointer(out.get("dS")),
        _pointer(out.get("dB")), _pointer(out.get("dbias")), CODES[dbias_dtype], None, sm_count,
    ))  # fmt: skip
    return out


def strided(values: Tensor, offset: int, padding: int) -> Tensor:
    """A view of the same values that starts `offset` elements into its memory, its rows `padding` elements apart."""
    M, K = values.shape
    memory = torch.empty(offset + M * (K + padding), dtype=values.dtype)
    view = memory[offset:].view(M, K + padding)[:, :K]
    view.copy_(values)
    return view


def normal(*size: int, dtype: torch.dtype, std: float = 1.0, draw: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(sum(n * 8191**i for i, n in enumerate(size)) + draw)
    return (torch.randn(size, generator=g, dtype=torch.float64) * std).to(dtype)
