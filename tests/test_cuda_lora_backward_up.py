"""The CUDA kernel of dS = s dy B, dB = s dyᵀ S and dbias = Σ_rows dy, executed from its PTX.

dS is fp32 in the reference, too, so eager's error there is that of an fp32 product.
"""

import itertools

import pytest
import torch
from compare import BF16, F16, F32, Dtypes, assert_within_bound, error
from skinny import DTYPES, lora_backward_up, normal, products, strided

pytestmark = pytest.mark.cuda

# (M, N, r, SMs): around 64 rows, 16 per warp and per fragment, blocks of 256 columns up to rank 32 and of 128 beyond, 32 per
# warp; copies of 16 bytes where N is a multiple of 8 and r of 4; one split of M and several; one block of columns and several.
SHAPES = [
    (1, 1, 1, 1), (2, 300, 8, 1), (16, 3, 4, 1), (17, 256, 16, 1), (63, 129, 2, 1), (64, 128, 64, 1), (65, 31, 17, 1),
    (66, 264, 20, 1), (128, 16, 36, 1), (130, 33, 33, 8), (200, 8, 32, 2), (260, 17, 7, 8), (70, 136, 100, 4),
]  # fmt: skip
SCALING = 0.75


def errors(out, dy, B, S, dtypes):
    g, wide = dy.to(dtypes.adapter) * SCALING, dy.double()
    eager = {"dS": SCALING * (dy.float() @ B.float()), "dB": g.T @ S.to(dtypes.adapter), "dbias": dy.sum(0)}
    exact = {"dS": SCALING * (wide @ B.double()), "dB": SCALING * (wide.T @ S.double()), "dbias": wide.sum(0)}
    return {f"{name} {dtypes}": error(out[name], eager[name], exact[name]) for name in out}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(device, shape):
    number = SHAPES.index(shape)  # so that every dtype meets every architecture
    M, N, r, sm_count = shape
    for i, dtypes in enumerate(DTYPES):
        with device.run(arch=(80, 90)[(i + number) % 2]) as run:
            dy, B = normal(M, N, dtype=dtypes.x), normal(N, r, dtype=dtypes.adapter, std=r**-0.5)
            S = normal(M, r, dtype=F32, draw=1)
            out = lora_backward_up(run.library, dy, B, S, SCALING, sm_count=sm_count)
        assert_within_bound(errors(out, dy, B, S, dtypes))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_each_output_without_the_others(device, dtypes):
    """Bit for bit what it is beside them; what only the others need may be absent."""
    M, N, r = 70, 140, 6
    dy, B, S = normal(M, N, dtype=dtypes.x), normal(N, r, dtype=dtypes.adapter), normal(M, r, dtype=F32)
    names = ("dS", "dB", "dbias")
    with device.run(arch=80) as run:
        dy, B, S = dy.clone(), B.clone(), S.clone()
        together = lora_backward_up(run.library, dy, B, S, SCALING)
        for count in (1, 2):
            for wanted in itertools.combinations(names, count):
                out = lora_backward_up(run.library, dy, B, S, SCALING, wanted=wanted)
                assert all(torch.equal(out[name], together[name]) for name in wanted), wanted


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_alignment_and_strides_change_nothing(device, dtypes):
    M, N, r = 33, 136, 20
    dy, B, S = normal(M, N, dtype=dtypes.x), normal(N, r, dtype=dtypes.adapter), normal(M, r, dtype=F32)
    results = []
    with device.run(arch=80) as run:
        for offset, padding in ((0, 0), (8, 16), (1, 0), (0, 3)):
            results.append(lora_backward_up(run.library, strided(dy, offset, padding), B.clone(), S.clone(), SCALING))
        results.append(lora_backward_up(run.library, dy.clone(), strided(B, 1, 0), strided(S, 1, 0), SCALING))
    for out in results[1:]:
        assert all(torch.equal(out[name], results[0][name]) for name in out)


@pytest.mark.parametrize("sm_count", [1, 100])
@pytest.mark.parametrize("N", [72, 300])
def test_S_and_dS_as_columns_of_wider_matrices(device, N, sm_count):
    """As layers that share x have them: bit for bit, and the other columns are nobody's."""
    M, r = 70, 6
    dy, B, S = normal(M, N, dtype=BF16), normal(N, r, dtype=F32), normal(M, r, dtype=F32)
    for offset in (0, 4, 5):
        with device.run(arch=80) as run:
            wide_S, wide_dS = torch.full((M, 16), torch.nan), torch.zeros(M, 16)
            wide_S[:, offset : offset + r] = S
            out = lora_backward_up(
                run.library, dy.clone(), B.clone(), wide_S[:, offset : offset + r], SCALING, sm_count=sm_count,
                dS=wide_dS[:, offset : offset + r],
            )  # fmt: skip
            plain = lora_backward_up(run.library, dy.clone(), B.clone(), S.clone(), SCALING, sm_count=sm_count)
        assert all(torch.equal(out[name], plain[name]) for name in plain)
        out["dS"].zero_()
        assert wide_dS.count_nonzero() == 0


@pytest.mark.parametrize("sm_count", [1, 3, 100])
def test_repeats_bit_for_bit(device, sm_count):
    """However many splits, and in whatever order blocks and warps run."""
    results = []
    for reverse in (False, True):
        with device.run(arch=80, reverse=reverse) as run:
            dy, B, S = normal(300, 40, dtype=BF16), normal(40, 5, dtype=F32), normal(300, 5, dtype=F32)
            results.append(lora_backward_up(run.library, dy, B, S, SCALING, sm_count=sm_count))
    assert all(torch.equal(results[1][name], results[0][name]) for name in results[0])


@pytest.mark.parametrize("r", [16, 32, 64])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_traffic(device, dtypes, r):
    """One pass over dy; S once per block of columns; and every access in the loop takes as long as its bytes must."""
    M, N = 128, 256
    with device.run(arch=80) as run:
        dy, B, S = normal(M, N, dtype=dtypes.x), normal(N, r, dtype=dtypes.adapter), normal(M, r, dtype=F32)
        lora_backward_up(run.library, dy, B, S, SCALING, sm_count=1)
    counters = run.counters.matching(entry="lora_backward_up_kernel")
    column_blocks = N // (256 if r <= 32 else 128)
    assert counters.matching("cp.async").total("global_bytes") == dy.nbytes + column_blocks * S.nbytes
    of_dy = (M // 16) * (N // 16)
    assert counters.mma_count == of_dy * (2 * products(dtypes) * (r // 8) + 1)  # dS, dB and dbias
    assert counters.bank_conflicts == []
    assert counters.total("sectors") == counters.total("ideal_sectors")


def test_bias_in_fp32(device):
    """Beside bf16 dy; written by the kernel itself where there is one split, else by the reduction."""
    for sm_count in (1, 100):
        with device.run(arch=80) as run:
            dy, B, S = normal(130, 20, dtype=BF16), normal(20, 4, dtype=BF16), normal(130, 4, dtype=F32)
            out = lora_backward_up(run.library, dy, B, S, SCALING, wanted=("dbias",), dbias_dtype=F32, sm_count=sm_count)
        assert_within_bound({"dbias": error(out["dbias"], dy.float().sum(0), dy.double().sum(0))})


def test_without_rows_gradients_are_zero(device):
    for dtypes in DTYPES:
        with device.run(arch=80) as run:
            dy, B = torch.empty(0, 16, dtype=dtypes.x), normal(16, 4, dtype=dtypes.adapter)
            out = lora_backward_up(run.library, dy, B, torch.empty(0, 4), SCALING)
        assert all(out[name].count_nonzero() == 0 for name in ("dB", "dbias"))


def test_small_gradients_beside_fp16(device):
    """B starts at zero: dS = s dy B lies below fp16's smallest number long after."""
    dtypes = Dtypes(F16, F32)
    with device.run(arch=80) as run:
        dy, B, S = normal(20, 40, dtype=F16), normal(40, 3, dtype=F32) * 2.0**-40, normal(20, 3, dtype=F32) * 2.0**-40
        out = lora_backward_up(run.library, dy, B, S, SCALING)
    assert_within_bound(errors(out, dy, B, S, dtypes))
