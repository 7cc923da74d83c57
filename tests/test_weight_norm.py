"""‖W0 + ΔW‖ without W0 + ΔW: as near to fp64 as the norm of the sum is."""

import compare
import pytest
import torch
from compare import BF16, F16, F32, Dtypes
from observe import LargestTensor
from torch import Tensor

from lora_ops import FusedLoraLinear, NF4Weight, quantize_nf4
from lora_ops.dora import row_norms, weight_norm
from lora_ops.qlora_ops import weight_of

F64 = torch.float64
SHAPES = [(1, 1, 1), (40, 64, 4), (33, 127, 16), (1100, 96, 8), (3, 300, 64)]  # N, K, r
QUANTS = [None, ("nf4", 64, True), ("fp4", 128, False), ("nf4", 32, True)]


def drawn(shape: tuple[int, int, int], dtypes: Dtypes, quant) -> tuple[Tensor | NF4Weight, Tensor, Tensor]:
    N, K, r = shape
    g = torch.Generator().manual_seed(N + K + r)
    sizes = ((N, K), (r, K), (N, r))
    W, A, B = (torch.randn(size, generator=g) * size[1] ** -0.5 for size in sizes)
    W = W.to(dtypes.x)
    return W if quant is None else quantize_nf4(W, quant[1], quant[2], quant[0]), A.to(dtypes.adapter), B.to(dtypes.adapter)


def of_the_sum(weight: Tensor | NF4Weight, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    W = weight.dequantize(dtype) if isinstance(weight, NF4Weight) else weight.to(dtype)
    return torch.linalg.vector_norm(W + scaling * (B.to(dtype) @ A.to(dtype)), dim=1)


@pytest.mark.parametrize("quant", QUANTS, ids=str)
@pytest.mark.parametrize("dtypes", [*compare.DTYPES, Dtypes(F32, BF16), Dtypes(BF16, F16)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_norm(shape: tuple[int, int, int], dtypes: Dtypes, quant) -> None:
    """In fp32, whatever the dtypes are. The base is its own where none is given."""
    weight, A, B = drawn(shape, dtypes, quant)
    exact, eager = (of_the_sum(weight, A, B, 0.75, dtype) for dtype in (F64, F32))
    norm = weight_norm(weight, A, B, 0.75)
    assert torch.equal(weight_norm(weight, A, B, 0.75, row_norms(weight)), norm)
    with torch.autocast("cpu", BF16):
        assert torch.equal(weight_norm(weight, A, B, 0.75), norm)
    compare.assert_within_bound({"norm": compare.error(norm, eager, exact)})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transposed_weights(shape: tuple[int, int, int]) -> None:
    weight, A, B = drawn(shape, Dtypes(F32, F32), None)
    exact, eager = (of_the_sum(weight, A, B, 2.0, dtype) for dtype in (F64, F32))
    norm = weight_norm(weight.T.contiguous().T, A, B, 2.0)
    compare.assert_within_bound({"norm": compare.error(norm, eager, exact)})


@pytest.mark.parametrize("quant", QUANTS[1:], ids=str)
def test_opcheck(quant) -> None:
    weight, *_ = drawn((33, 127, 1), Dtypes(F32, F32), quant)
    torch.library.opcheck(torch.ops.lora_ops.qlora_row_norms, (*weight_of(weight), 127))


def test_weights_that_cancel_have_no_norm() -> None:
    """Not the root of what rounding left below zero."""
    B = torch.randn(5, 3)
    norm = weight_norm(B @ torch.eye(3, 7), torch.eye(3, 7), B, -1.0)
    assert norm.isfinite().all()
    assert (norm < 1e-3).all()


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_a_layer_forms_nothing_as_large_as_its_weight(dropout_p: float, quant: str | None) -> None:
    N, K = 4096, 512
    layer = FusedLoraLinear.from_linear(
        torch.nn.Linear(K, N, dtype=BF16), 4, use_dora=True, lora_dropout=dropout_p, quant=quant
    )
    x = torch.randn(2, K, dtype=BF16, requires_grad=True)
    with LargestTensor(layer.weight if quant is None else layer.weight.codes) as largest:
        layer(x).sum().backward()
    assert 0 < largest.numel <= N * K // 8
