"""What docs/cuda_report.md says of the kernels, asserted: no bank conflicts, a main loop that feeds the tensor cores, every
byte of the tiles accounted for, and none of eager's extra traffic."""

import csv
import os
import subprocess
import sys
from collections import Counter as Multiset
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from compare import BF16, F32
from ptx.build import REPOSITORY
from ptx.device import Counters

sys.path.insert(0, str(REPOSITORY / "tools"))

import cuda_bounds
import cuda_code
from cuda_bounds import Shape
from cuda_traffic import CASES, MEDIUM, Counted, Kernels, count, implied

pytestmark = pytest.mark.cuda

PASSES = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


@pytest.fixture(scope="module")
def kernels(nvcc: str) -> Kernels:
    return Kernels()


@pytest.fixture(scope="module", params=CASES, ids=str)
def counted(kernels: Kernels, request: pytest.FixtureRequest) -> Counted:
    shape, backward, quantized = request.param
    return count(kernels, shape, F32, backward, quantized)


def assert_ideal(counters: Counters, opcode: str) -> None:
    some = counters.matching(opcode)
    assert some.total("wavefronts") == some.total("ideal_wavefronts") > 0
    assert some.total("sectors") == some.total("ideal_sectors")


def test_every_tile_runs(counted):
    """And no other kernel in its place."""
    (gemm,) = [launch for launch in counted.launches if "gemm_" in launch.entry]
    tiles = {32: "Tile<32, 64,", 256: "Tile<64, 128," if counted.quantized else "Tile<64, 64,", 1280: "Tile<128, 128,"}
    name = cuda_code.demangled([gemm.entry])[gemm.entry]
    assert tiles[counted.shape.M] in name and ("4bit" in name) == counted.quantized


@pytest.mark.parametrize("opcode", ["ldmatrix", "cp.async."])
def test_wavefronts_are_ideal(counted, opcode):
    assert_ideal(counted.counters, opcode)


@PASSES
def test_wavefronts_are_ideal_with_16_bit_adapters(kernels, backward):
    counters = count(kernels, MEDIUM, BF16, backward).counters
    for opcode in ("ldmatrix", "cp.async."):
        assert_ideal(counters, opcode)


def test_tensors_move_as_often_as_the_tiling_implies(counted):
    """x once per column of tiles, W0 once per row of tiles, results once, and all else as the head of its kernel says."""
    expected, read, written = {}, {}, Multiset()
    for m in counted.moved:
        for tensor, times in implied(m.kernel, counted.shape, counted.launches).items():
            expected[m.kernel, tensor] = times
        if m.read and "scales" not in m.tensor:  # of which the first are sent for once more
            read[m.kernel, m.tensor] = m.read / m.bytes
        written[m.tensor] += m.written / m.bytes
    assert read == expected
    results = ("dx", "dA", "dB") if counted.backward else ("y", "S")
    assert {name: times for name, times in written.items() if times} == dict.fromkeys(results, 1.0)


@PASSES
def test_a_launch_touches_its_operands_once_and_nothing_else(kernels, backward):
    """Where no sum is split, as the bounds assume."""
    shape = Shape(64, 128, 256, 16)
    total = count(kernels, shape, F32, backward).total
    assert total.distinct_read + total.distinct_written == sum(w.bytes for w in cuda_bounds.kernels(shape, F32, backward))


@pytest.mark.parametrize("adapter", [BF16, F32], ids=str)
@PASSES
def test_fusion_removes_eagers_extra_traffic(kernels, adapter, backward):
    """Even where partial sums weigh most: few rows, and every sum split."""
    shape = MEDIUM
    x, y, bare = 2 * shape.M * shape.K, 2 * shape.M * shape.N, cuda_bounds.base_bytes(shape)
    total = count(kernels, shape, adapter, backward).total
    ours, eager = (
        total.distinct_read + total.distinct_written,
        sum(w.bytes for w in cuda_bounds.eager(shape, adapter, backward)),
    )
    # Forward: S Bᵀ and · s written and read, and +. Backward: · s, two products with it, dA's x, dS A and +.
    assert eager - bare > (4 * y + 5 * x if backward else x + 6 * y)
    assert ours < eager


def test_eager_is_what_autograd_runs():
    """With bf16 adapters x W0ᵀ, x Aᵀ, S Bᵀ, · s, +; backward · s, four small products, dy W0, +."""
    shape = Shape(3, 5, 7, 2)
    x, y, W, S, A, B = 2 * 15, 2 * 21, 2 * 35, 2 * 6, 2 * 10, 2 * 14
    forward, backward = (cuda_bounds.eager(shape, BF16, b) for b in (False, True))
    assert [w.bytes for w in forward] == [x + W + y, x + A + S, S + B + y, 2 * y, 3 * y]
    assert Multiset(w.bytes for w in backward) == Multiset(
        [2 * y, y + B + S, y + S + B, S + A + x, S + x + A, y + W + x, 3 * x]
    )
    assert sum(w.flop for w in forward) == 2 * 3 * 5 * 7 + 2 * 3 * 2 * (5 + 7)


@pytest.mark.parametrize("M", [32, 256, 1280], ids=["small", "medium", "large"])
def test_main_loop_feeds_the_tensor_cores(kernels, M):
    """What another 64 of depth adds is the loop's: no division, and at least 16 mma per 8 ldmatrix. But the small tile,
    32 x 64, waits for memory and not for ldmatrix."""
    N = 1280 if M == 1280 else 384
    less, more = (count(kernels, Shape(M, K, N, 1), BF16, False).counters.matching(entry="gemm_kernel") for K in (128, 192))

    def added(opcode: str) -> int:
        return more.matching(opcode).total("executions") - less.matching(opcode).total("executions")

    assert added("mma.") == M // 16 * (N // 8) * (64 // 16)
    assert added("mma.") >= (1 if M == 32 else 2) * added("ldmatrix") > 0
    assert added("div.") == added("rem.") == 0
    assert less.matching("div.").total("executions") > 0  # a block finds its tile by one


def test_machine_code_of_the_main_loop(nvcc, disassembler, kernels, tmp_path):
    """Of the tiles with many rows; the small one (32 x 64) waits for memory, not for ldmatrix."""
    ptx, cubin = tmp_path / "lora_forward.ptx", tmp_path / "lora_forward.cubin"
    ptx.write_text(kernels.device.ptx()["lora_forward.cu"])
    subprocess.run([nvcc, "-arch=sm_80", "-cubin", ptx, "-o", cubin], check=True)
    code = cuda_code.disassembly(cubin)
    names = cuda_code.demangled(code)
    loops = {
        names[n]: cuda_code.main_loop(c) for n, c in code.items() if "Tile<32" not in names[n] and "true, false>" in names[n]
    }
    assert len(loops) == 8
    for name, loop in loops.items():
        assert loop["HMMA"] >= 2 * loop["LDSM"] > 0, name
        assert loop["LDGSTS"] > 0 and loop["MUFU, CALL"] == 0, name


def test_a_division_in_the_loop_would_be_seen():
    loop = ["LDSM.16.M88.4 R4, [R2]", "HMMA.16816.F32.BF16 R8, R4, R6, R8", "MUFU.RCP R3, R3", "@!P0 BRA 0x10"]
    code = [(16 * i, text) for i, text in enumerate(["MUFU.RCP R1, R1", *loop, "EXIT"])]
    mix = cuda_code.main_loop(code)
    assert (mix["HMMA"], mix["LDSM"], mix["MUFU, CALL"], mix["all"]) == (1, 1, 1, 4)


PREDICATES = """
template <bool kOfResult>
__global__ void kernel(int* out, int left) {
  const int count = max(0, min(left, 8));
  *out = (kOfResult ? count == 8 : left >= 8) ? count : ~count;
}
template __global__ void kernel<true>(int*, int);
template __global__ void kernel<false>(int*, int);
"""


def test_a_wrong_predicate_is_seen(nvcc, disassembler, tmp_path):
    """In the machine code of this nvcc, unless its ptxas compares for itself."""
    source, cubin = tmp_path / "predicates.cu", tmp_path / "predicates.cubin"
    source.write_text(PREDICATES)
    subprocess.run([nvcc, "-O3", "-arch=sm_90", "-cubin", source, "-o", cubin], check=True)
    code = cuda_code.disassembly(cubin)
    names = cuda_code.demangled(code)
    of_result, of_left = sorted(code, key=lambda n: "true" not in names[n])
    compares = any(cuda_code.opcode(text) == "ISETP" for _, text in code[of_result])
    assert bool(cuda_code.wrong_predicates(code[of_result])) != compares
    assert cuda_code.wrong_predicates(code[of_left]) == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("VIMNMX.RELU R16, P2, P2, R10, 0x8, PT", True),
        ("@!P0 VIMNMX.RELU R16, P2, PT, R10.reuse, 0x8, PT", True),
        ("UVIMNMX.S32.RELU UR4, PT, UP1, UR4, 0x8, UPT", True),
        ("VIMNMX.RELU R8, R202.reuse, 0x8, PT", False),
        ("VIMNMX.RELU R8, PT, PT, R202, 0x8, PT", False),
        ("UVIMNMX.RELU UR4, UPT, UPT, UR4, 0x8, UPT", False),
        ("VIMNMX R0, P0, P1, R1, 0x8, PT", False),
    ],
)
def test_which_predicates_are_wrong(text, wrong):
    assert cuda_code.wrong_predicates([(0, "EXIT"), (16, text)]) == ([text] if wrong else [])


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 100, 120])
def test_no_kernel_has_a_wrong_predicate(disassembler, arch):
    """On an H100 one had results stored 16 bytes beyond their tile. It takes minutes, once for these sources."""
    sources = sorted((REPOSITORY / "csrc" / "cuda").glob("*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kernels = [k for some in pool.map(lambda source: cuda_code.examine(source, arch), sources) for k in some]
    assert {k.source for k in kernels} == {s.name for s in sources}
    assert [f"{k.source} {k.name}" for k in kernels if k.wrong_predicates != 0] == []


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared_bytes", "blocks"),
    [
        (80, 255, 128, 48 * 1024, 2),  # registers
        (80, 128, 128, 72 * 1024, 2),  # shared memory: 164 KB, 73 each
        (86, 96, 128, 49 * 1024, 2),  # exactly 100 KB
        (86, 96, 128, 49 * 1024 + 1, 1),
        (90, 64, 128, 72 * 1024, 3),
        (80, 32, 256, 0, 8),  # warps
        (89, 16, 32, 0, 24),  # blocks
        (120, 32, 32, 0, 24),
    ],
)
def test_occupancy(arch, registers, threads, shared_bytes, blocks):
    assert cuda_code.blocks_per_multiprocessor(arch, registers, threads, shared_bytes) == blocks


def test_the_report_is_of_these_kernels_and_has_no_spills():
    """Where this fails: python tools/cuda_report.py"""
    with (REPOSITORY / "docs" / "cuda_report.csv").open() as f:
        rows = list(csv.DictReader(f))
    sources = {p.name for p in (REPOSITORY / "csrc" / "cuda").glob("*.cu")}
    assert {(r["source"], int(r["sm"])) for r in rows} == {(s, a) for s in sources for a in cuda_code.ARCHS}
    assert {r[column] for r in rows for column in ("spill_stores", "spill_loads", "stack")} == {"0"}


def test_bounds_are_of_known_gpus():
    shape = Shape(4096, 4096, 4096, 16)
    for gpu in cuda_bounds.GPUS:
        bare = cuda_bounds.Work("", cuda_bounds.product(shape), cuda_bounds.base_bytes(shape)).seconds(gpu)
        for backward in (False, True):
            ours = cuda_bounds.seconds(cuda_bounds.kernels(shape, torch.bfloat16, backward), gpu)
            assert bare < ours < cuda_bounds.seconds(cuda_bounds.eager(shape, torch.bfloat16, backward), gpu)
