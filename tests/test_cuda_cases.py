"""The cases of cuda_cases.py on their kernels, as they are: the mutation run of tools/ is about these launches and assertions.

Of instances that differ in a type alone, one is run in all of its cases.
"""

import sys

import pytest
from cuda_cases import Kernel, cases
from ptx.build import REPOSITORY
from ptx.device import Device

sys.path.insert(0, str(REPOSITORY / "tools"))

from cuda_code import demangled
from ptx_mutants import entries

pytestmark = pytest.mark.cuda

CUDA = REPOSITORY / "csrc" / "cuda"


@pytest.fixture(scope="module")
def package(nvcc: str) -> Device:
    return Device([*sorted(CUDA.glob("*.cu")), CUDA / "bindings.cpp"])


@pytest.mark.parametrize("source", sorted(p.name for p in CUDA.glob("*.cu")))
def test_cases(package: Device, source: str) -> None:
    names = demangled(e.name for e in entries(package.ptx()[source]))
    for entry, name in names.items():
        for number, case in enumerate(cases(Kernel(source, name), package)[:: 8 if "<Half" in name else 1]):
            with package.run() as run:
                results = case.launch(run)
            counters = run.counters.matching(entry=entry)
            assert counters, f"case {number} does not launch {name}"
            case.check(results, counters)
