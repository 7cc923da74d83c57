"""The mutation run of tools/: its mutants are what they claim, the kernel as it is passes, and what is wrong is noticed."""

import re
import sys

import pytest
from cuda_cases import Kernel
from ptx.build import REPOSITORY
from ptx.device import Device

sys.path.insert(0, str(REPOSITORY / "tools"))

import cuda_mutants
from cuda_code import demangled
from ptx_bits import same, shifted_out, zero_bits
from ptx_mutants import changes, drawn, entries


def of_line(line: str) -> list[tuple[str, str]]:
    return [(kind, after.strip()) for kind, after in changes(f"\t{line}", {"%r": "%r9"})]


def test_changes_of_a_line() -> None:
    assert of_line("sub.s32 %r1, %r2, 5;") == [
        ("dropped", "//sub.s32 %r1, %r2, 5;"),
        ("operator", "add.s32 %r1, %r2, 5;"),
        ("operands swapped", "sub.s32 %r1, 5, %r2;"),
        ("operand", "sub.s32 %r1, %r9, 5;"),
        ("immediate", "sub.s32 %r1, %r2, 6;"),
        ("immediate", "sub.s32 %r1, %r2, 4;"),
    ]
    assert of_line("@!%p3 bra $L__BB0_2;") == [
        ("predicate dropped", "bra $L__BB0_2;"),
        ("predicate negated", "@%p3 bra $L__BB0_2;"),
    ]
    assert ("comparison", "setp.ge.s32 %p1, %r1, %r2;") in of_line("setp.gt.s32 %p1, %r1, %r2;")
    assert ("address", "ld.global.v4.u32 {%r1,%r2,%r3,%r4}, [%rd1+32];") in of_line(
        "ld.global.v4.u32 {%r1,%r2,%r3,%r4}, [%rd1+16];"
    )
    assert of_line("ret;") == of_line("$L__BB0_2:") == of_line(".reg .b32 %r<5>;") == []


def test_what_is_provably_no_change() -> None:
    zeros = zero_bits(
        """
        .maxntid 128, 1, 1
        mov.u32 %r1, %tid.x;
        shl.b32 %r2, %r1, 2;
        shr.u32 %r3, %r2, 4;
        mov.u32 %r4, 0;
        $L__BB0_1:
        add.s32 %r4, %r4, 1;
        ld.global.u16 %r5, [%rd1];
        """.splitlines()
    )
    assert zeros == {"%r1": 0xFFFFFF80, "%r2": 0xFFFFFE03, "%r3": 0xFFFFFFE0, "%r5": 0xFFFF0000}
    for before, after, expected in (
        ("and.b32 %r6, %r1, 127;", "and.b32 %r6, %r1, 255;", True),
        ("and.b32 %r6, %r1, 127;", "and.b32 %r6, %r1, 126;", False),
        ("and.b32 %r6, %r4, 1;", "and.b32 %r6, %r4, 3;", False),  # written in a loop
        ("or.b32 %r6, %r2, 3;", "xor.b32 %r6, %r2, 3;", True),
        ("or.b32 %r6, %r2, 4;", "xor.b32 %r6, %r2, 4;", False),
        ("bfi.b32 %r6, %r5, %r2, 9, 23;", "bfi.b32 %r6, %r5, %r2, 9, 22;", True),
        ("bfi.b32 %r6, %r4, %r2, 9, 23;", "bfi.b32 %r6, %r4, %r2, 9, 22;", False),
        ("bfi.b32 %r6, %r2, %r1, 9, 2;", "bfi.b32 %r6, %r2, %r1, 8, 2;", True),
        ("bfi.b32 %r6, %r2, %r4, 9, 2;", "bfi.b32 %r6, %r2, %r4, 8, 2;", False),
    ):
        assert same(before, after, zeros) == expected, after
    dropped = shifted_out(["and.b32 %r6, %r4, 31;", "shr.u32 %r7, %r6, 2;", "shr.u32 %r8, %r4, 1;", "add.s32 %r9, %r4, %r8;"])
    assert dropped == {"%r6": 3}  # %r4 is read elsewhere, too
    assert same("and.b32 %r6, %r4, 31;", "and.b32 %r6, %r4, 30;", {}, dropped)
    assert not same("and.b32 %r6, %r4, 31;", "and.b32 %r6, %r4, 27;", {}, dropped)


def test_draws_are_spread_over_kinds_and_repeat() -> None:
    mutants = {kind: [cuda_mutants.Mutant(kind, i, "", "") for i in range(n)] for kind, n in (("a", 100), ("b", 2), ("c", 1))}
    chosen = drawn(mutants, 9, "seed")
    assert chosen == drawn(mutants, 9, "seed") != drawn(mutants, 9, "other")
    assert [sum(m.kind == kind for m in chosen) for kind in "abc"] == [6, 2, 1]


@pytest.mark.cuda
def test_a_kernel_as_it_is_and_its_mutants(device: Device) -> None:
    source = "reduce.cu"
    module = device.ptx()[source]
    entry = entries(module)[0]
    kernel = Kernel(source, demangled([entry.name])[entry.name])
    try:
        device.load_module(source, entry.text, cuda_mutants.ARCH)
        assert (
            cuda_mutants.outcome(device, kernel, entry, entry.text, cuda_mutants.baseline(device, kernel, entry)) == "survived"
        )
        rows = cuda_mutants.run_kernel(device, kernel, entry, each=16, jobs=2).rows
    finally:
        device.load_module(source, module, cuda_mutants.ARCH)
    assert len(rows) == 16
    assert len({row.kind for row in rows}) >= 8
    assert sum(row.outcome != cuda_mutants.SURVIVED for row in rows) >= 13


def test_report_explains_every_survivor() -> None:
    text = (REPOSITORY / "docs" / "cuda_mutants.md").read_text()
    assert "NOT EXPLAINED" not in text
    assert float(re.search(r"\*\*([\d.]+)%\*\* are noticed", text)[1]) >= 97
