"""The CUDA kernel of S = drop(x) Aᵀ, executed from its PTX.

S is fp32 in eager, too, so eager's error here is that of an fp32 product.
"""

import pytest
import torch
from compare import BF16, F16, F32, Dtypes, assert_within_bound, error
from skinny import DTYPES, Dropout, lora_down, normal, products, strided

pytestmark = pytest.mark.cuda

# (M, K, r, SMs): around 64 rows, 16 per warp, 128 columns, 16 per fragment, 8 per copy; 16, 32 and 64 ranks per block; K
# multiples of 8, which are copied 16 bytes at a time, and others; one split of K and several, the last shorter or not.
SHAPES = [
    (1, 1, 1, 1), (1, 264, 8, 4), (3, 17, 16, 1), (15, 128, 2, 1), (17, 136, 33, 4), (63, 127, 7, 1), (64, 256, 16, 1),
    (65, 129, 17, 2), (66, 8, 64, 1), (16, 392, 32, 1), (2, 640, 31, 1), (31, 300, 65, 8), (130, 72, 100, 1),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(device, shape):
    number = SHAPES.index(shape)  # so that every dtype meets every architecture, with and without dropout
    M, K, r, sm_count = shape
    for i, dtypes in enumerate(DTYPES):
        dropout = Dropout(0.3) if (i + number // 2) % 2 else None
        with device.run(arch=(80, 90)[(i + number) % 2]) as run:
            x, A = normal(M, K, dtype=dtypes.x), normal(r, K, dtype=dtypes.adapter, std=K**-0.5)
            S = lora_down(run.library, x, A, dropout=dropout, sm_count=sm_count)
        h, exact = (x.float(), x.double()) if dropout is None else (dropout.of(x.float()), dropout.of(x.double()))
        assert_within_bound({f"S {dtypes}": error(S, h @ A.float().T, exact @ A.double().T)})


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_drops_what_the_reference_drops(device, dtypes):
    """With x = 1 and A = I, S is the mask: element for element, in tiles that are whole and in tiles that are not."""
    dropout, M, K = Dropout(0.3), 70, 140
    with device.run(arch=80) as run:
        S = lora_down(run.library, torch.ones(M, K, dtype=dtypes.x), torch.eye(K, dtype=dtypes.adapter), dropout=dropout)
    assert torch.equal(S, dropout.keep(M, K) * torch.tensor(1 / (1 - dropout.p), dtype=F32))


def test_a_large_seed_and_every_threshold(device):
    """All 64 bits of the seed, and both ends of p."""
    for seed, p in ((2**62 - 1, 0.5), (2**33, 1 - 2**-16), (1, 2**-16)):
        dropout, M, K = Dropout(p, seed), 64, 128
        with device.run(arch=80) as run:
            S = lora_down(run.library, torch.ones(M, K, dtype=BF16), torch.eye(K, dtype=BF16), dropout=dropout)
        assert torch.equal(S != 0, dropout.keep(M, K))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_alignment_and_strides_change_nothing(device, dtypes):
    M, K, r, dropout = 33, 136, 18, Dropout(0.1)
    x, A = normal(M, K, dtype=dtypes.x), normal(r, K, dtype=dtypes.adapter)
    results = []
    with device.run(arch=80) as run:
        for offset, padding in ((0, 0), (8, 16), (1, 0), (0, 3)):
            results.append(lora_down(run.library, strided(x, offset, padding), A.clone(), dropout=dropout))
        results.append(lora_down(run.library, x.clone(), strided(A, 1, 0), dropout=dropout))
    for S in results[1:]:
        assert torch.equal(S, results[0])


@pytest.mark.parametrize("sm_count", [1, 3, 100])
def test_repeats_bit_for_bit(device, sm_count):
    """However many splits, and in whatever order blocks and warps run."""
    results = []
    for reverse in (False, True):
        with device.run(arch=80, reverse=reverse) as run:
            x, A = normal(40, 700, dtype=BF16), normal(5, 700, dtype=F32)
            results.append(lora_down(run.library, x, A, sm_count=sm_count))
    assert torch.equal(*results)


@pytest.mark.parametrize("r", [16, 32, 64])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_traffic(device, dtypes, r):
    """x is read once, A once per 64 rows, and every access of memory takes as long as its bytes must."""
    M, K = 128, 256
    with device.run(arch=80) as run:
        x, A = normal(M, K, dtype=dtypes.x), normal(r, K, dtype=dtypes.adapter)
        lora_down(run.library, x, A, dropout=Dropout(0.1), sm_count=1)
    counters = run.counters.matching(entry="lora_down_kernel")
    row_tiles = M // 64
    assert counters.matching("cp.async").total("global_bytes") == x.nbytes + row_tiles * A.nbytes
    assert counters.mma_count == products(dtypes) * (M // 16) * (K // 16) * (r // 8)
    assert counters.bank_conflicts == []
    assert counters.total("sectors") == counters.total("ideal_sectors")


def test_no_rows(device):
    with device.run(arch=80) as run:
        S = lora_down(run.library, torch.empty(0, 16, dtype=F16), normal(4, 16, dtype=F16))
    assert S.shape == (0, 4)


def test_ranges_of_fp32_adapters(device):
    """Parts of A and of x are bf16, whose exponents are fp32's: neither tiny nor huge A is lost beside fp16 x."""
    dtypes = Dtypes(F16, F32)
    for scale in (2.0**-60, 2.0**60):
        with device.run(arch=80) as run:
            x, A = normal(5, 48, dtype=dtypes.x), normal(3, 48, dtype=dtypes.adapter) * scale
            S = lora_down(run.library, x, A)
        assert_within_bound({"S": error(S, x.float() @ A.T, x.double() @ A.double().T)})
