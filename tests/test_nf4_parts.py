"""Parts of a 4-bit weight decode to the numbers of the whole."""

import itertools

import pytest
import torch

from lora_ops import qlora_linear, quantize_nf4
from lora_ops.quant.parts import part


def weight(N, K, **options):
    return quantize_nf4(torch.randn(N, K), **options)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize(
    ("shape", "dim", "cuts"),
    [
        ((64, 128), 0, (0, 16, 32, 64)),
        ((64, 128), 1, (0, 32, 64, 128)),  # through blocks of 64 and of 256
        ((6, 192), 1, (0, 96, 192)),  # and through the kernels' groups of 128
        ((7, 352), 1, (0, 32, 160, 352)),  # a rest of 32
        ((10, 40), 0, (0, 4, 8, 10)),  # blocks run across rows, and the last one is not full
        ((300, 256), 0, (0, 150, 300)),  # double quantisation's groups
        ((1, 64), 1, (0, 64)),
    ],
)
def test_parts_are_the_whole(shape, dim, cuts, blocksize, double_quant, quant_type):
    whole = weight(*shape, blocksize=blocksize, double_quant=double_quant, quant_type=quant_type)
    parts = [part(whole, dim, first, end) for first, end in itertools.pairwise(cuts)]
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(torch.cat([p.dequantize(dtype) for p in parts], dim), whole.dequantize(dtype))
    assert all(p.quant_type == quant_type and p.dtype == whole.dtype for p in parts)


def test_kernels_read_a_part():
    whole, x = weight(64, 128), torch.randn(5, 64)
    mine = part(whole, 1, 64, 128)
    A, B = torch.randn(4, 64), torch.randn(64, 4)
    expected = x.double() @ (mine.dequantize(torch.float64) + 0.5 * B.double() @ A.double()).T
    torch.testing.assert_close(qlora_linear(x, mine, A, B, scaling=0.5).double(), expected, rtol=1e-5, atol=1e-4)


def test_double_quantisation_stays_where_its_groups_are_whole():
    whole = weight(1024, 64)  # 1024 blocks, 4 groups
    halves = [part(whole, 0, n, n + 512) for n in (0, 512)]
    assert [h.nested_absmax.numel() for h in halves] == [2, 2]
    assert sum(h.absmax.nbytes for h in halves) == whole.absmax.nbytes
    assert part(whole, 0, 100, 1024).nested_absmax is None
    assert part(whole, 0, 0, 100).nested_absmax is not None  # a group that ends early


def test_a_part_has_memory_of_its_own():
    whole = weight(1024, 64)
    pointers = {t.untyped_storage().data_ptr() for t in whole._tensors().values()}
    for mine in (part(whole, 0, 512, 1024), part(whole, 1, 0, 64)):
        assert pointers.isdisjoint(t.untyped_storage().data_ptr() for t in mine._tensors().values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 0, 1), "dim must be 0 .rows. or 1 .columns., got 2"),
        ((0, 3, 3), r"first and end must be in 0\.\.\.10 and not empty, got 3 and 3"),
        ((1, 0, 41), r"first and end must be in 0\.\.\.40"),
        ((0, 3, 10), "rows of 40 from 3 on"),
        ((1, 0, 32), "columns 0 to 32 of 40: the cut must fall between blocks of at least 32"),
    ],
)
def test_what_cannot_be_cut(arguments, message):
    with pytest.raises(ValueError, match=message):
        part(weight(10, 40), *arguments)
