"""The numbers of a 4-bit weight: bitsandbytes', to the last bit, in the kernels' memory layout.

What bitsandbytes gets wrong on a CPU with AVX-512 (0.50.2) is read in a way that it gets right: `dequantize_4bit` takes the
scales of another row where K is a multiple of 16 but not of the block size. The same codes as a single row are read right.
"""

import itertools
import math
import random
import statistics

import pytest
import torch
from bitsandbytes import functional as bnb

from lora_ops import _C, NF4Weight, quantize_nf4, reference
from lora_ops.quant import layout

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QUANT_TYPES = ["nf4", "fp4"]
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
each_quant_type = pytest.mark.parametrize("quant_type", QUANT_TYPES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def eager():
    """bitsandbytes compiles its fallback for odd K and large blocks; its meaning is the eager one."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def assert_same(actual, expected):
    """The same bits, dtype and shape; zeros may differ in their sign, on which bitsandbytes' own fp4 paths disagree."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    bits, expected_bits = (t.contiguous().view(INTEGERS[t.element_size()]) for t in (actual, expected))
    same = (bits == expected_bits) | ((actual == 0) & (expected == 0))
    assert same.all(), f"{(~same).sum()} of {same.numel()} differ"


def theirs(weight, blocksize, double_quant, quant_type):
    """bitsandbytes' packed codes and QuantState, and all of it as in a state dict."""
    packed, state = bnb.quantize_4bit(weight, blocksize=blocksize, compress_statistics=double_quant, quant_type=quant_type)
    return packed, state, {"weight": packed, **{f"weight.{key}": t for key, t in state.as_dict(packed=True).items()}}


def their_values(packed, state, shape):
    """What bitsandbytes dequantises to, read as one row."""
    state.shape = torch.Size((1, math.prod(shape)))
    values = bnb.dequantize_4bit(packed, state).view(shape)
    state.shape = torch.Size(shape)
    return values


def bitsandbytes_reads_rows(shape, blocksize):
    return shape[1] % blocksize == 0 or shape[1] % 16 != 0 or blocksize >= 2048


def random_weight(rng, dtype):
    """Of every size, with zero rows and columns, and of magnitudes that half precision cannot all hold."""
    shape = rng.choice([(rng.randint(1, 40), rng.randint(3, 300)), (rng.randint(1, 8), 64 * rng.randint(1, 9))])
    weight = torch.randn(shape) * 10 ** rng.uniform(-6, 3)
    if rng.random() < 0.2:
        weight[rng.randrange(shape[0]) :] = 0
    if rng.random() < 0.2:
        weight[:, : rng.randrange(shape[1])] = 0
    return weight.to(dtype)


@each_quant_type
@each_dtype
def test_bitsandbytes_to_the_last_bit(quant_type, dtype):
    """6 x 50 weights: every tensor of the state, in and out, and the values."""
    rng = random.Random(0)
    read_as_rows = 0
    for _ in range(50):
        weight = random_weight(rng, dtype)
        blocksize, double_quant = rng.choice(layout.BLOCKSIZES), rng.random() < 0.5
        packed, state, expected = theirs(weight, blocksize, double_quant, quant_type)

        ours = quantize_nf4(weight, blocksize, double_quant, quant_type)
        exported = ours.to_bitsandbytes()
        assert list(exported) == list(expected)
        for key, t in expected.items():
            assert_same(exported[key], t)
        if double_quant:
            assert_same(ours.offset, state.offset)

        read = NF4Weight.from_bitsandbytes(expected)
        assert (read.shape, read.dtype, read.blocksize) == (ours.shape, ours.dtype, ours.blocksize)
        for name in ("codes", "absmax", *(("nested_absmax", "nested_code", "offset") if double_quant else ())):
            assert_same(getattr(read, name), getattr(ours, name))

        values = ours.dequantize()
        assert_same(values, their_values(packed, state, weight.shape))
        if bitsandbytes_reads_rows(weight.shape, blocksize):
            read_as_rows += 1
            assert_same(values, bnb.dequantize_4bit(packed, state))
    assert read_as_rows > 10


@pytest.mark.parametrize(("shape", "blocksize"), [((256, 96), 64), ((256, 32), 64), ((64, 512), 1024), ((7, 48), 32)])
def test_rows_of_no_whole_number_of_blocks_which_bitsandbytes_misreads(shape, blocksize):
    assert not bitsandbytes_reads_rows(shape, blocksize)
    weight = torch.randn(shape)
    packed, state, _ = theirs(weight, blocksize, False, "nf4")
    ours = quantize_nf4(weight, blocksize, double_quant=False)
    codes, absmax = reference.quantize_4bit(weight, blocksize, "nf4")
    by_definition = reference.dequantize_4bit(codes.view(shape), absmax, blocksize, "nf4", torch.float32)
    assert_same(ours.dequantize(), by_definition)
    assert_same(ours.dequantize(), their_values(packed, state, shape))
    widest = (reference.code_4bit("nf4").diff().max() / 2) * weight.abs().max()
    assert (ours.dequantize() - weight).abs().max() <= widest


@each_quant_type
@pytest.mark.parametrize("K", [1, 2, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 191, 192, 193, 256, 300])
def test_kernels_and_reference_agree(K, quant_type, monkeypatch):
    """Every shape of a row's tail, blocks across rows; then the same through torch, as on devices without a kernel."""
    for N, dtype, blocksize in itertools.product([1, 2, 5], DTYPES, [32, 64, 128]):
        weight = torch.randn(N, K).to(dtype)
        ours = quantize_nf4(weight, blocksize, double_quant=False, quant_type=quant_type)
        codes, absmax = reference.quantize_4bit(weight, blocksize, quant_type)
        assert torch.equal(layout.unpack_codes(ours.codes, K), codes.view(N, K))
        assert torch.equal(ours.codes, layout.pack_codes(codes.view(N, K), quant_type))
        assert_same(ours.absmax, absmax)
        exported = ours.to_bitsandbytes()
        values = {to: ours.dequantize(to) for to in (*DTYPES, torch.float64)}
        for to, value in values.items():
            assert_same(value, reference.dequantize_4bit(codes.view(N, K), absmax, blocksize, quant_type, to))
        with monkeypatch.context() as patch:
            patch.setattr(layout, "has_kernel", lambda t: False)
            by_torch = quantize_nf4(weight, blocksize, double_quant=False, quant_type=quant_type)
            assert torch.equal(by_torch.codes, ours.codes)
            assert torch.equal(by_torch.to_bitsandbytes()["weight"], exported["weight"])
            assert torch.equal(NF4Weight.from_bitsandbytes(exported).codes, ours.codes)
            assert_same(ours.dequantize(), values[dtype])
        assert torch.equal(NF4Weight.from_bitsandbytes(exported).codes, ours.codes)


@pytest.mark.parametrize("K", [1, 40, 64, 65, 127, 128, 150, 192, 200, 256])
def test_memory_layout(K):
    """Nibble j of 16-bit word w of a 64-byte chunk is weight 32 j + w; a tail of up to 64 takes 32 bytes; the rest is zero."""
    weight = torch.randn(2, K)
    ours = quantize_nf4(weight, double_quant=False)
    codes, _ = reference.quantize_4bit(weight, 64, "nf4")
    rows = torch.full((2, 64 * (K // 128) + [0, 32, 64][math.ceil(K % 128 / 64)]), 0x77, dtype=torch.uint8)
    for n, k in itertools.product(range(2), range(K)):
        chunk, i = divmod(k, 128)
        j, w = divmod(i, 32)
        byte = 64 * chunk + (w if K - 128 * chunk <= 64 else 2 * w + j // 2)
        shift = 4 * (j % 2)
        rows[n, byte] = rows[n, byte] & ~(15 << shift) & 0xFF | codes.view(2, K)[n, k] << shift
    assert torch.equal(ours.codes, rows)


def test_bytes_of_a_row():
    """One rule in two languages."""
    assert [layout.row_bytes(K) for K in range(1000)] == [_C.row_bytes(K) for K in range(1000)]


@each_quant_type
def test_half_way_between_two_codes_the_lower_one_is_taken(quant_type):
    values = reference.code_4bit(quant_type).sort().values
    midpoints = (values[1:] + values[:-1]) / 2
    around = [midpoints, *(torch.nextafter(midpoints, torch.tensor(end)) for end in (-1.0, 1.0))]
    weight = torch.cat([torch.ones(1), *around, values[:-1], torch.tensor([-0.0, 1e-30, -1e-30])]).view(1, -1)
    _, _, expected = theirs(weight, 64, False, quant_type)
    ours = quantize_nf4(weight, double_quant=False, quant_type=quant_type)
    assert torch.equal(ours.to_bitsandbytes()["weight"], expected["weight"])
    lower = ours.dequantize()[0, 1:16]
    assert_same(lower, values[:-1])


EDGES = {
    "zeros": torch.zeros(3, 100),
    "zeros in the last, partial block": torch.cat([torch.randn(64), torch.zeros(36)]).view(1, 100),
    "subnormal": torch.randn(4, 100) * 1e-40,
    "below 1e-38": torch.full((2, 96), 3e-39),
    "huge": torch.randn(4, 100).clamp(-1, 1) * 3e38,
    "equal scales": torch.ones(2, 64),
    "one weight": torch.full((1, 1), -2.5),
}


@each_quant_type
@pytest.mark.parametrize(
    ("edge", "double_quant"),
    [case for case in itertools.product(EDGES, [False, True]) if case != ("huge", True)],  # which is the next test
)
def test_edges_are_bitsandbytes(edge, double_quant, quant_type):
    weight = EDGES[edge]
    packed, state, expected = theirs(weight, 64, double_quant, quant_type)
    ours = quantize_nf4(weight, 64, double_quant, quant_type)
    assert ours.dequantize().isfinite().all()
    if double_quant and edge == "subnormal":
        return  # bitsandbytes converts NaN to an integer
    for key, t in ours.to_bitsandbytes().items():
        assert_same(t, expected[key])
    if weight.numel() > 1:  # bitsandbytes transposes a weight of one byte
        assert_same(ours.dequantize(), their_values(packed, state, weight.shape))


def test_scales_whose_mean_overflows_are_an_error():
    with pytest.raises(ValueError, match="must be finite, got inf"):
        quantize_nf4(EDGES["huge"])


@pytest.mark.parametrize("largest", [1.0, 0.3, 7.7])
def test_double_quantisation_is_bitsandbytes_at_every_step_of_its_map(largest):
    """Scales just below, on and above each of the 65536 steps that bitsandbytes rounds to before it looks up the code."""
    assert_same(reference.nested_code(), bnb.create_dynamic_map())
    edges = (torch.arange(65537) - 0.5) / 65535 * 2 - 1
    edges = torch.cat([edges + i * 2**-25 for i in (-2, -1, 0, 1, 2)]).clamp(-1, 1)
    edges = torch.nn.functional.pad(edges, (0, -edges.numel() % 255)).view(-1, 255)
    one = torch.ones(len(edges), 1)
    scales = torch.cat([torch.cat([one, edges], 1), torch.cat([-one, -edges], 1)]).view(-1) * largest  # mean 0
    codes, nested_absmax, offset = reference.quantize_absmax(scales)
    expected, state = bnb.quantize_blockwise(scales - scales.mean(), blocksize=256)
    assert abs(offset) < 1e-7
    assert len(codes.unique()) == 249  # the others lie between two steps
    assert torch.equal(codes, expected)
    assert_same(nested_absmax, state.absmax)


@each_dtype
def test_thread_count_changes_nothing(dtype):
    weight = torch.randn(67, 333).to(dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        w = quantize_nf4(weight, 32)
        results.append((w.codes, w.absmax, w.offset, w.dequantize(), w.to_bitsandbytes()["weight"]))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def gaussian_error(blocksize, quant_type):
    """Root of the expected squared error per weight of unit variance, by integration. In a block of n Gaussian weights whose
    largest magnitude is m, of density n p(m)^(n-1) p'(m) with p(m) = P(|w| < m), that one is exact, and the others are
    Gaussian between -m and m."""
    values = reference.code_4bit(quant_type).double().sort().values
    m = torch.linspace(1, 6.5, 400, dtype=torch.float64)[:, None]
    v = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    off = (v - values[:, None]).abs().amin(0) * m
    error = torch.trapezoid(off**2 * torch.exp(-((v * m) ** 2) / 2) / math.sqrt(2 * math.pi) * m, v, dim=1)
    m = m[:, 0]
    p = torch.erf(m / math.sqrt(2))
    density = blocksize * p ** (blocksize - 1) * 2 * torch.exp(-(m**2) / 2) / math.sqrt(2 * math.pi)
    return math.sqrt(torch.trapezoid(density * error / p, m) * (blocksize - 1) / blocksize)


def test_codes_are_quantiles_of_a_normal_distribution():
    """Halfway between those of evenly spaced probabilities up to 0.9677, 8 below zero and 7 above, divided by the largest."""
    quantile = statistics.NormalDist().inv_cdf
    below = [quantile(p) for p in torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1].tolist()]
    above = [quantile(p) for p in torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1].tolist()]
    expected = torch.tensor(sorted([*(-p for p in below), 0.0, *above])) / max(above)
    weight = torch.cat([expected, torch.ones(48)])[None]  # one block, whose scale is 1
    levels = quantize_nf4(weight, double_quant=False).dequantize(torch.float32)[0, :16]
    torch.testing.assert_close(levels, expected, rtol=0, atol=1e-6)


def test_nf4_is_nearer_to_gaussian_weights_than_evenly_spaced_levels():
    torch.manual_seed(0)
    weight = torch.randn(256, 256)
    blocks = weight.view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True) / 7
    int4 = ((blocks / scale).round().clamp(-8, 7) * scale).view_as(weight)
    assert (quantize_nf4(weight).dequantize() - weight).norm() < 0.9 * (int4 - weight).norm()


@pytest.mark.parametrize(
    ("quant_type", "blocksize", "expected"), [("nf4", 64, 0.0920), ("nf4", 128, 0.0956), ("fp4", 64, 0.1219)]
)
def test_error_on_gaussian_weights_is_what_the_code_implies(quant_type, blocksize, expected):
    """Relative Frobenius norm. Between draws of 2^19 weights it varies by 0.13 % (one standard deviation)."""
    implied = gaussian_error(blocksize, quant_type)
    assert abs(implied - expected) < 1e-4
    weight = torch.randn(512, 1024)
    for double_quant in (False, True):
        error = quantize_nf4(weight, blocksize, double_quant, quant_type).dequantize(torch.float64) - weight
        measured = (error.norm() / weight.double().norm()).item()
        assert abs(measured / implied - 1) < 0.006, (measured, implied)
