# csrc/bindings.cpp, for type checkers.
#
# A matrix is (address, row stride, column stride, dtype), strides in elements, or None if absent.
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Matrix = tuple[int, int, int, int] | None
# A 4-bit weight: address of codes, quant type, blocksize, addresses of absmax, nested_absmax, nested_code and offset.
FourBit = tuple[int, int, int, int, int, int, int]
# Of the general form: gate, its row stride, core, out_scale and z, then of the backward dgate, dcore and dout_scale.
General = tuple[int, int, Matrix, int, Matrix] | tuple[int, int, Matrix, int, Matrix, int, int, int]

compiler: str

def lora_forward(
    M: int, K: int, N: int, r: int, x: Matrix, weight: Matrix | FourBit, panels: int, lora_A: Matrix, lora_B: Matrix,
    bias: Matrix, scaling: float, seed: int, threshold: int, keep_scale: float, y: Matrix, S: int, threads: int,
    general: General | None, /,
) -> None: ...  # fmt: skip
def lora_backward(
    M: int, K: int, N: int, r: int, dy: Matrix, x: Matrix, weight: Matrix | FourBit, lora_A: Matrix, lora_B: Matrix, S: int,
    scaling: float, seed: int, threshold: int, keep_scale: float, dx: Matrix, dA: Matrix, dB: Matrix, dbias: Matrix,
    threads: int, general: General | None, /,
) -> None: ...  # fmt: skip
def use_tensors(api: Any, tensor: type, parameter: type, empty: Any, dtypes: tuple[torch.dtype, ...], /) -> None: ...
def forward_of_tensors(
    x: Tensor, weight: tuple[Any, ...], lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, panels: Tensor | None,
    dropout: tuple[int, int, float], scaling: float, dropout_p: float, threads: int, /,
) -> tuple[Tensor, Tensor] | None: ...  # fmt: skip
def backward_of_tensors(
    dy: Tensor, x: Tensor | None, weight: tuple[Any, ...], lora_A: Tensor, lora_B: Tensor, S: Tensor | None,
    dropout: tuple[int, int, float], scaling: float, need: Sequence[bool], threads: int, /,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None: ...  # fmt: skip
def multi_forward_of_tensors(
    x: Tensor, weight: tuple[Any, ...], lora_A: list[Tensor], lora_B: list[Tensor], scalings: Tensor, ids: Tensor,
    bias: Tensor | None, dropout: tuple[int, int, float], dropout_p: float, threads: int, /,
) -> tuple[Tensor, Tensor] | None: ...  # fmt: skip
def multi_lora_forward(
    M: int, K: int, N: int, r: int, x: Matrix, weight: Matrix | FourBit, adapters: list[tuple[int, int, int, int, int]],
    scalings: list[float], dtype: int, ids: int, bias: Matrix, seed: int, threshold: int, keep_scale: float, y: Matrix, S: int,
    threads: int, /,
) -> None: ...  # fmt: skip
def multi_lora_backward(
    M: int, K: int, N: int, r: int, dy: Matrix, x: Matrix, weight: Matrix | FourBit,
    adapters: list[tuple[int, int, int, int, int]], scalings: list[float], dtype: int, ids: int, S: int, seed: int,
    threshold: int, keep_scale: float, dx: Matrix, dbias: Matrix, threads: int, /,
) -> None: ...  # fmt: skip
def packed_size(N: int, K: int, x: int, weight: int, /) -> int: ...
def pack_weight(N: int, K: int, weight: Matrix, x: int, panels: int, threads: int, /) -> None: ...
def dropout_mask(rows: int, cols: int, seed: int, threshold: int, words: int, /) -> None: ...
def row_bytes(K: int, /) -> int: ...
def quantize_4bit(
    N: int, K: int, quant_type: int, blocksize: int, codes: int, absmax: int, weight: int, dtype: int, threads: int, /,
) -> int: ...  # fmt: skip
def dequantize_4bit(
    N: int, K: int, quant_type: int, blocksize: int, codes: int, absmax: int, weight: int, dtype: int, threads: int, /,
) -> None: ...  # fmt: skip
def to_bitsandbytes(N: int, K: int, quant_type: int, codes: int, packed: int, threads: int, /) -> None: ...
def from_bitsandbytes(N: int, K: int, quant_type: int, codes: int, packed: int, threads: int, /) -> None: ...
def multiply_adds(bf16: bool, iterations: int, /) -> int: ...
def read_all(address: int, count: int, /) -> float: ...
def isa() -> str: ...
def built_isas() -> list[str]: ...
def supported_isas() -> list[str]: ...
