"""The CUDA kernel of dA = dSᵀ drop(x), executed from its PTX."""

import pytest
import torch
from compare import BF16, F16, F32, assert_within_bound, error
from skinny import DTYPES, Dropout, lora_backward_down, normal, products, strided

pytestmark = pytest.mark.cuda

# (M, K, r, SMs): around 64 rows, 16 per fragment, 128 columns, 32 per warp, 8 per copy; 16, 32 and 64 ranks per block; copies
# of 16 bytes where K is a multiple of 8 and r of 4; one split of M and several, the last shorter or not.
SHAPES = [
    (1, 1, 1, 1), (8, 3, 4, 1), (17, 128, 16, 1), (63, 127, 2, 1), (64, 136, 64, 1), (65, 129, 17, 1), (128, 40, 36, 1),
    (130, 33, 33, 4), (200, 8, 8, 1), (257, 24, 32, 2), (300, 31, 7, 8), (90, 264, 100, 2),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(device, shape):
    number = SHAPES.index(shape)  # so that every dtype meets every architecture, with and without dropout
    M, K, r, sm_count = shape
    for i, dtypes in enumerate(DTYPES):
        dropout = Dropout(0.3) if (i + number // 2) % 2 else None
        with device.run(arch=(80, 90)[(i + number) % 2]) as run:
            x, dS = normal(M, K, dtype=dtypes.x), normal(M, r, dtype=F32)
            dA = lora_backward_down(run.library, dS, x, dtypes.adapter, dropout=dropout, sm_count=sm_count)
        h, exact = (x, x.double()) if dropout is None else (dropout.of(x.to(dtypes.adapter)), dropout.of(x.double()))
        eager = dS.to(dtypes.adapter).T @ h.to(dtypes.adapter)
        assert_within_bound({f"dA {dtypes}": error(dA, eager, dS.double().T @ exact)})


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_drops_what_the_reference_drops(device, dtypes):
    """With x = 1 and dS = I, dA is the mask: element for element, in tiles that are whole and in tiles that are not."""
    dropout, M, K = Dropout(0.3), 70, 300
    with device.run(arch=80) as run:
        dA = lora_backward_down(run.library, torch.eye(M), torch.ones(M, K, dtype=dtypes.x), dtypes.adapter, dropout=dropout)
    scale = torch.tensor(1 / (1 - dropout.p), dtype=F32)
    assert torch.equal(dA, (dropout.keep(M, K) * scale).to(dtypes.adapter))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_alignment_and_strides_change_nothing(device, dtypes):
    M, K, r, dropout = 70, 40, 20, Dropout(0.1)
    x, dS = normal(M, K, dtype=dtypes.x), normal(M, r, dtype=F32)
    results = []
    with device.run(arch=80) as run:
        for offset, padding in ((0, 0), (8, 16), (1, 0), (0, 3)):
            results.append(
                lora_backward_down(run.library, dS.clone(), strided(x, offset, padding), dtypes.adapter, dropout=dropout)
            )
        results.append(lora_backward_down(run.library, strided(dS, 1, 0), x.clone(), dtypes.adapter, dropout=dropout))
    for dA in results[1:]:
        assert torch.equal(dA, results[0])


@pytest.mark.parametrize("sm_count", [1, 3, 100])
def test_repeats_bit_for_bit(device, sm_count):
    """However many splits, and in whatever order blocks and warps run."""
    results = []
    for reverse in (False, True):
        with device.run(arch=80, reverse=reverse) as run:
            x, dS = normal(400, 20, dtype=BF16), normal(400, 5, dtype=F32)
            results.append(lora_backward_down(run.library, dS, x, F32, sm_count=sm_count))
    assert torch.equal(*results)


@pytest.mark.parametrize("r", [16, 32, 64])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_traffic(device, dtypes, r):
    """x is read once, dS once per 128 columns, and every access of memory takes as long as its bytes must."""
    M, K = 128, 256
    with device.run(arch=80) as run:
        x, dS = normal(M, K, dtype=dtypes.x), normal(M, r, dtype=F32)
        lora_backward_down(run.library, dS, x, dtypes.adapter, dropout=Dropout(0.1), sm_count=1)
    counters = run.counters.matching(entry="lora_backward_down_kernel")
    column_tiles = K // 128
    assert counters.matching("cp.async").total("global_bytes") == x.nbytes + column_tiles * dS.nbytes
    assert counters.mma_count == products(dtypes) * (M // 16) * (K // 16) * (r // 8)
    assert counters.bank_conflicts == []
    assert counters.total("sectors") == counters.total("ideal_sectors")


def test_without_rows_the_gradient_is_zero(device):
    for dtypes in DTYPES:
        with device.run(arch=80) as run:
            dA = lora_backward_down(run.library, torch.empty(0, 4), torch.empty(0, 16, dtype=dtypes.x), dtypes.adapter)
        assert torch.equal(dA, torch.zeros(4, 16, dtype=dtypes.adapter))


def test_small_gradients_beside_fp16(device):
    """Unscaled gradients of fp32 adapters lie below fp16's smallest number."""
    with device.run(arch=80) as run:
        x, dS = normal(70, 24, dtype=F16), normal(70, 3, dtype=F32) * 2.0**-40
        dA = lora_backward_down(run.library, dS, x, F32)
    assert_within_bound({"dA": error(dA, dS.T @ x.float(), dS.double().T @ x.double())})
