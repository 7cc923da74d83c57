"""Layers that share x: their forwards in one launch and their dx in one launch, on a device, by compare.py's policy."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from compare import BF16, F16, F32, Case, Dtypes, assert_within_bound, error
from cuda_structs import TILES, Dropout, LoraBackwardDx, LoraForward, call, empty, laid_out, matrix, strides
from ptx.build import REPOSITORY
from ptx.device import Device, Run
from torch import Tensor

from lora_ops import reference

pytestmark = pytest.mark.cuda

DTYPES = [Dtypes(t, a) for t in (BF16, F16) for a in (t, F32)]
# N and r of each layer: one; gate and up; query, key and value of grouped queries; four
GROUPS = [((72, 5),), ((136, 16), (136, 8)), ((200, 20), (40, 4), (48, 7)), ((64, 1), (1, 3), (130, 33), (8, 16))]


@pytest.fixture(scope="module")
def gemms(nvcc: str) -> Device:
    names = ("forward", "forward_group", "backward_dx", "backward_dx_group")
    return Device([REPOSITORY / "csrc" / "cuda" / f"lora_{name}.cu" for name in names])


def make_layers(M: int, K: int, group: Sequence[tuple[int, int]], dtypes: Dtypes, dropout_p: float = 0.0) -> list[Case]:
    """Of one x and one mask. Every other layer has a bias."""
    g = torch.Generator().manual_seed(M + K + sum(N * r for N, r in group))

    def normal(*size: int, std: float, dtype: torch.dtype) -> Tensor:
        return (torch.randn(size, generator=g, dtype=torch.float64) * std).to(dtype)

    x = normal(M, K, std=1, dtype=dtypes.x)
    return [
        Case(
            x=x,
            weight=normal(N, K, std=K**-0.5, dtype=dtypes.x),
            lora_A=normal(r, K, std=K**-0.5, dtype=dtypes.adapter),
            lora_B=normal(N, r, std=r**-0.5, dtype=dtypes.adapter),
            bias=normal(N, std=1, dtype=dtypes.x) if i % 2 == 0 else None,
            dy=normal(M, N, std=1, dtype=dtypes.x),
            scaling=0.75 + i / 4,
            dropout_p=dropout_p,
            generator=M,
        )
        for i, (N, r) in enumerate(group)
    ]


def forwards(
    run: Run,
    layers: list[Case],
    *,
    grouped: bool,
    tile: str,
    layout: str = "plain",
    layout_out: str | None = None,
    transposed: bool = False,
    gates: Sequence[Tensor | None] = (),
    scales: Sequence[Tensor | None] = (),
) -> list[Tensor]:
    """y of every layer. S of all are columns of one matrix, as lora_down gives them for the lora_A of all."""
    x = laid_out(layers[0].x, layout)
    S = (layers[0].x.double() @ torch.cat([layer.lora_A for layer in layers]).double().T).float()
    inputs, ops, results, column = [x, S], [], [], 0
    for layer, gate, m in itertools.zip_longest(layers, gates, scales):
        N, r = layer.lora_B.shape
        gate, m = (None if t is None else t.clone() for t in (gate, m))
        weight, lora_B = laid_out(layer.weight, layout, transposed, apart=8), laid_out(layer.lora_B, layout)
        bias = None if layer.bias is None else layer.bias.clone()
        y = empty(x.shape[0], N, x.dtype, layout_out or layout)
        inputs += [weight, lora_B, bias, gate, m]
        results.append(y)
        ops.append(LoraForward(
            *x.shape, N, r, *map(matrix, (x, weight, lora_B, bias, y)), S[:, column:].data_ptr(), layer.scaling, TILES[tile],
            S.stride(0), *strides(gate), matrix(m),
        ))  # fmt: skip
        column += r
    for t in inputs:
        if t is not None:
            run.register(t, readonly=True)
    if grouped:
        call(run, "lora_forward_group", (LoraForward * len(ops))(*ops), len(ops))
    else:
        for op in ops:
            call(run, "lora_forward", op)
    return results


def eager_forward(layer: Case, dtype: torch.dtype | None = None) -> Tensor:
    x, weight, A, B = (t.to(dtype or t.dtype) for t in (layer.x, layer.weight, layer.lora_A, layer.lora_B))
    y = torch.nn.functional.linear(x, weight, None if layer.bias is None else layer.bias.to(x.dtype))
    return (y + x.to(A.dtype) @ A.T @ B.T * layer.scaling).to(y.dtype)


@pytest.mark.parametrize("tile", ["small", "medium", "large"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_forward_is_every_layer_s_own(gemms: Device, dtypes: Dtypes, tile: str) -> None:
    """By the policy, and bit for bit what launches of their own give."""
    for i, (M, group) in enumerate(zip((130, 33, 1, 70), GROUPS, strict=True)):
        layers = make_layers(M, 72, group, dtypes)
        results = []
        for grouped in (False, True):
            with gemms.run(arch=(80, 90)[i % 2], reverse=grouped) as run:
                results.append(forwards(run, layers, grouped=grouped, tile=tile, transposed=i == 1))
        for own, y, layer in zip(*results, layers, strict=True):
            assert torch.equal(own, y)
            assert_within_bound({"y": error(y, eager_forward(layer), eager_forward(layer, torch.float64))})


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
def test_forward_of_odd_layouts(gemms: Device, transposed: bool) -> None:
    for group in GROUPS:
        layers = make_layers(35, 41, group, Dtypes(BF16, F32))
        with gemms.run() as run:
            results = forwards(run, layers, grouped=True, tile="automatic", layout="odd", transposed=transposed)
        for y, layer in zip(results, layers, strict=True):
            assert_within_bound({"y": error(y, eager_forward(layer), eager_forward(layer, torch.float64))})


def test_forward_s_work(gemms: Device) -> None:
    """One launch, in which a tile of out copies its rows of x and of its own weight once."""
    M, K, group = 256, 96, ((256, 16), (128, 16), (128, 16))
    layers = make_layers(M, K, group, Dtypes(BF16, BF16))
    with gemms.run() as run:
        forwards(run, layers, grouped=True, tile="large")
    assert run.counters and all("gemm_group_kernel" in c.entry for c in run.counters)
    tiles = 2 * (2 + 1 + 1)
    copies = run.counters.matching("cp.async")
    assert copies.total("global_bytes") == tiles * (128 + 128) * K * 2
    assert copies.total("sectors") == copies.total("ideal_sectors")
    assert run.counters.bank_conflicts == []
    assert run.counters.mma_count == tiles * (128 // 16 * (128 // 8)) * (K // 16 + 1)


def backward_dx(
    run: Run,
    layers: list[Case],
    *,
    tile: str,
    layout: str = "plain",
    layout_out: str | None = None,
    transposed: bool = False,
    gate: Tensor | None = None,
) -> Tensor:
    (M, K), p = layers[0].x.shape, layers[0].dropout_p
    dS = torch.cat([(c.scaling * (c.dy.double() @ c.lora_B.double())).float() for c in layers], 1)
    lora_A = laid_out(torch.cat([layer.lora_A for layer in layers]), layout)
    seed = None if p == 0 else layers[0].seed.clone()
    dropout = Dropout(None, 0, 1.0) if seed is None else Dropout(seed.data_ptr(), reference.dropout_threshold(p), 1 / (1 - p))
    dx = empty(M, K, layers[0].x.dtype, layout_out or layout)
    operands = [(laid_out(layer.dy, layout), laid_out(layer.weight, layout, transposed, apart=8)) for layer in layers]
    gate = None if gate is None else gate.clone()
    for t in (dS, lora_A, seed, gate, *itertools.chain(*operands)):
        if t is not None:
            run.register(t, readonly=True)
    ops = []
    for i, (dy, weight) in enumerate(operands):
        op = LoraBackwardDx(N=dy.shape[1], dy=matrix(dy), weight=matrix(weight))
        if i == 0:
            op.M, op.K, op.r, op.lora_A, op.dx = M, K, lora_A.shape[0], matrix(lora_A), matrix(dx)
            op.dS, op.dropout, op.tile, op.gate = dS.data_ptr(), dropout, TILES[tile], None if gate is None else gate.data_ptr()
            op.gate_row_stride = strides(gate)[1]
        ops.append(op)
    call(run, "lora_backward_dx_group", (LoraBackwardDx * len(ops))(*ops), len(ops))
    return dx


def eager_dx(layers: list[Case], gate: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """As autograd adds it up: a layer after the other."""
    dx, rank = torch.zeros((), dtype=dtype or layers[0].x.dtype), 0
    for layer in layers:
        dy, weight, A, B = (t.to(dtype or t.dtype) for t in (layer.dy, layer.weight, layer.lora_A, layer.lora_B))
        dS = (dy.to(B.dtype) * layer.scaling) @ B
        if gate is not None:
            dS = dS * gate[..., rank : (rank := rank + B.shape[1])].to(dS.dtype)
        low_rank = dS @ A
        if layer.seed is not None:
            keep = reference.dropout_keep(layer.seed, layer.dropout_p, *layer.x.shape)
            low_rank = low_rank * (keep.to(low_rank.dtype) / (1 - layer.dropout_p))
        dx = dx + (dy @ weight + low_rank.to(dy.dtype))
    return dx


@pytest.mark.parametrize("tile", ["small", "medium", "large"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_dx_is_the_sum_of_every_layer_s(gemms: Device, dtypes: Dtypes, tile: str) -> None:
    for i, (M, group) in enumerate(zip((130, 33, 1, 70), GROUPS, strict=True)):
        layers = make_layers(M, 136, group, dtypes, dropout_p=i % 2 / 4)
        gate = torch.linspace(-1, 1, sum(r for _, r in group)) if i > 1 else None
        with gemms.run(arch=(80, 90)[i % 2]) as run:
            dx = backward_dx(run, layers, tile=tile, transposed=i == 1, gate=gate)
        assert_within_bound({"dx": error(dx, eager_dx(layers, gate), eager_dx(layers, gate, torch.float64))})
        assert run.counters.bank_conflicts.matching(entry="gemm_") == []


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
def test_dx_of_odd_layouts(gemms: Device, transposed: bool) -> None:
    for group in GROUPS:
        layers = make_layers(35, 41, group, Dtypes(BF16, F32), dropout_p=0.1)
        with gemms.run() as run:
            dx = backward_dx(run, layers, tile="automatic", layout="odd", transposed=transposed)
        assert_within_bound({"dx": error(dx, eager_dx(layers, None), eager_dx(layers, None, torch.float64))})


def test_dx_of_depths_around_steps(gemms: Device) -> None:
    """Layers shorter than the ring is long, a step, a step and one; and blocks and warps in either order."""
    for tile in ("small", "medium", "large"):
        layers = make_layers(40, 72, ((1, 2), (64, 2), (65, 2), (7, 2)), Dtypes(BF16, F32))
        results = []
        for reverse in (False, True):
            with gemms.run(reverse=reverse) as run:
                results.append(backward_dx(run, layers, tile=tile))
        assert torch.equal(*results)
        assert_within_bound({"dx": error(results[0], eager_dx(layers, None), eager_dx(layers, None, torch.float64))})


def test_dx_s_work(gemms: Device) -> None:
    """Every layer's operands are copied once per tile, and dx is written once."""
    M, K, group = 128, 256, ((96, 8), (64, 8))
    layers = make_layers(M, K, group, Dtypes(BF16, BF16))
    with gemms.run() as run:
        backward_dx(run, layers, tile="large")
    assert run.counters.matching("cp.async").total("global_bytes") == 2 * (128 + 128) * (96 + 64) * 2
    assert run.counters.mma_count == 2 * (128 // 16 * (128 // 8)) * ((96 + 64) // 16 + 1)
    assert run.counters.matching("st.global").total("global_bytes") == M * K * 2


def test_what_is_refused(gemms: Device) -> None:
    layers = make_layers(4, 8, ((8, 2), (8, 2)), Dtypes(BF16, F32))
    with gemms.run() as run:
        x, weight, lora_B, S, y = (
            layers[0].x.clone(),
            torch.zeros(8, 8),
            torch.zeros(8, 2),
            torch.zeros(4, 2),
            torch.zeros(4, 8),
        )
        weight, y = weight.to(BF16), y.to(BF16)
        op = LoraForward(4, 8, 8, 2, *map(matrix, (x, weight, lora_B, None, y)), S.data_ptr(), 1.0)
        other = LoraForward(4, 8, 8, 2, *map(matrix, (x.clone(), weight, lora_B, None, y)), S.data_ptr(), 1.0)
        absent = LoraForward(4, 8, 8, 2, *map(matrix, (x, None, lora_B, None, y)), S.data_ptr(), 1.0)
        for second, words in ((other, "layers share x"), (absent, "every layer has a weight")):
            with pytest.raises(RuntimeError, match=f"lora_forward_group: {words}"):
                call(run, "lora_forward_group", (LoraForward * 2)(op, second), 2)
        with pytest.raises(RuntimeError, match="one to four layers, count = 5"):
            call(run, "lora_forward_group", (LoraForward * 5)(op, op, op, op, op), 5)
