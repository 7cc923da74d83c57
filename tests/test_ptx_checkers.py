"""Every checker on a kernel with exactly its bug, and on the right kernel; and the counters. No nvcc."""

import re

import pytest
import torch
from ptx.device import Device
from ptx_programs import COPY, launch, reports, warp

X = "mad.wide.u32 %rd1, %tid, 4, %x; mad.wide.u32 %rd2, %tid, 4, %y; mad.lo.u32 %r1, %tid, 4, %s; ld.global.b32 %r2, [%rd1];"
# Thread t reads what thread 63 - t wrote: the other warp's.
EXCHANGE = (
    X + "st.shared.b32 [%r1], %r2; {barrier} sub.u32 %r3, 63, %tid; mad.lo.u32 %r3, %r3, 4, %s; ld.shared.b32 %r4, [%r3];"
)
ASYNC = X + "cp.async.ca.shared.global [%r1], [%rd1], 4; cp.async.commit_group; {wait} ld.shared.b32 %r4, [%r1];"
# Lane l reads lane l ^ 1's.
LANES = X + "st.shared.b32 [%r1], %r2; {barrier} xor.b32 %r3, %r1, 4; ld.shared.b32 %r4, [%r3];"


@pytest.mark.parametrize(
    ("body", "right", "wrong", "report"),
    [
        (EXCHANGE, {"barrier": "bar.sync 0;"}, {"barrier": ""}, "racecheck.*read of shared"),
        (EXCHANGE + "{between} st.shared.b32 [%r1], 0;", {"barrier": "bar.sync 0;", "between": "bar.sync 0;"},
         {"barrier": "bar.sync 0;", "between": ""}, "racecheck.*write of shared.*read it"),
        (LANES, {"barrier": "bar.warp.sync 0xffffffff;"}, {"barrier": ""}, "racecheck.*read of shared"),
        (ASYNC, {"wait": "cp.async.wait_group 0;"}, {"wait": "cp.async.wait_group 1;"}, "racecheck.*in flight"),
        (X + "st.shared.b32 [%r1], %r2; ld.shared.b32 %r3, [%r1+{at}];", {"at": 0}, {"at": 256}, "initcheck.*shared"),
        (X + "ld.global.b32 %r3, [{of}];", {"of": "%rd1"}, {"of": "%rd2"}, "initcheck.*buffer of 256"),
        (X + "ld.global.b32 %r3, [%rd1+{at}];", {"at": 0}, {"at": 4}, "memcheck.*read.*out of bounds"),
        (X + "st.global.b32 [%rd2+{at}], %r2;", {"at": 0}, {"at": 4}, "memcheck.*write.*out of bounds"),
        (X + "st.shared.b32 [%r1+{at}], %r2;", {"at": 768}, {"at": 772}, "memcheck.*write.*shared"),
        (X + "ld.global.b16 %h1, [%rd1+{at}];", {"at": 2}, {"at": 1}, "memcheck.*misaligned"),
        (X + "st.shared.b16 [%r1+{at}], %h1;", {"at": 2}, {"at": 3}, "memcheck.*misaligned"),
        (X + "st.global.b32 [{to}], 1;", {"to": "%rd2"}, {"to": "%y"}, "racecheck.*buffer"),
        (X + "setp.lt.u32 %p1, %tid, {bound}; @%p1 bar.sync 0;", {"bound": 32}, {"bound": 31}, "synccheck.*divergent barrier"),
        (X + "shfl.sync.bfly.b32 %r3, %r2, 1, 31, {mask};", {"mask": "0xffffffff"}, {"mask": "0xffff"}, "synccheck.*names"),
    ],
)  # fmt: skip
def test_checkers(executor: Device, body: str, right: dict[str, object], wrong: dict[str, object], report: str) -> None:
    assert reports(executor, body.format(**right)) == []
    assert any(re.match(report, found) for found in reports(executor, body.format(**wrong)))


def test_copies_are_waited_for(executor: Device) -> None:
    body = X + "cp.async.ca.shared.global [%r1], [%rd1], 4; {wait}"
    assert reports(executor, body.format(wait="cp.async.wait_all;")) == []
    assert any("exits with cp.async" in r for r in reports(executor, body.format(wait="")))


def test_a_copy_that_is_cut_short_is_filled_with_zeros(executor: Device) -> None:
    x = torch.arange(1, 129, dtype=torch.int32)
    body = f"""{COPY} mov.u32 %r3, 6; cp.async.cg.shared.global [%r2], [%rd3], 16, %r3; cp.async.wait_all;
        ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r2]; mad.wide.u32 %rd2, %tid, 16, %y;
        st.global.v4.b32 [%rd2], {{%r4, %r5, %r6, %r7}};"""
    with executor.run() as run:
        run.register(x)
        y = torch.empty(32, 4, dtype=torch.int32)
        launch(executor, run, body, {"x": x, "y": y}, shared_bytes=512)
    expected = x.view(32, 4) * torch.tensor([1, 1, 0, 0])
    expected[:, 1] &= 0xFFFF
    assert torch.equal(y.long(), expected)


def test_blocks_race(executor: Device) -> None:
    assert reports(executor, X + "st.global.b32 [%rd2], %r2;", blocks=1) == []
    assert any("racecheck" in r and "block 0" in r for r in reports(executor, X + "st.global.b32 [%rd2], %r2;", blocks=2))


def test_readonly_buffers(executor: Device) -> None:
    with executor.run(check=False) as run:
        x, y = torch.randn(64), torch.empty(64)
        run.register(x, readonly=True)
        before = x.clone()
        launch(executor, run, X + "st.global.b32 [%rd1], 0;", {"x": x, "y": y}, 64, 1024)
        assert any("memcheck" in r and "read-only" in r for r in run.reports)
        assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("stride", "bytes_per_lane", "wavefronts", "ideal"),
    [(4, 4, 1, 1), (8, 4, 2, 1), (128, 4, 32, 1), (0, 4, 1, 1), (132, 4, 1, 1), (8, 8, 2, 2), (16, 16, 4, 4), (32, 16, 8, 4)],
)
def test_bank_conflicts(executor: Device, stride: int, bytes_per_lane: int, wavefronts: int, ideal: int) -> None:
    vector = {4: ".b32 [%r1], %tid", 8: ".v2.b32 [%r1], {%tid, %tid}", 16: ".v4.b32 [%r1], {%tid, %tid, %tid, %tid}"}
    with executor.run(check=False) as run:  # a stride of 0 is a race
        body = f"mad.lo.u32 %r1, %tid, {stride}, %s; st.shared{vector[bytes_per_lane]};"
        launch(executor, run, body, {"x": torch.zeros(1)}, shared_bytes=4608)
        (store,) = run.counters.matching("st.shared")
    assert (store.wavefronts, store.ideal_wavefronts) == (wavefronts, ideal)


@pytest.mark.parametrize(
    ("stride", "sectors", "ideal", "read"), [(4, 4, 4, 128), (32, 32, 4, 128), (0, 1, 1, 4), (8, 8, 4, 128)]
)
def test_sectors(executor: Device, stride: int, sectors: int, ideal: int, read: int) -> None:
    with executor.run() as run:
        x = torch.zeros(256)
        assert x.data_ptr() % 32 == 0
        launch(executor, run, f"mad.wide.u32 %rd1, %tid, {stride}, %x; ld.global.b32 %r1, [%rd1];", {"x": x})
        (load,) = run.counters.matching("ld.global")
    assert (load.sectors, load.ideal_sectors, load.global_bytes) == (sectors, ideal, read)


def test_a_module_is_replaced(executor: Device) -> None:
    """What mutation testing does: other text behind the same entry."""
    x = torch.arange(32, dtype=torch.int32)
    body = "add.u32 %r2, %r1, {n}; st.global.b32 [%rd2], %r2;"
    assert torch.equal(warp(executor, body.format(n=1), x, x), x + 1)
    assert torch.equal(warp(executor, body.format(n=2), x, x), x + 2)
