"""The cases of cuda_cases on their kernels, as they are: the mutation run of tools/ is about these launches and assertions.

Of instances that differ in a type alone, in how many ranks they unroll or how large their tile is, one is run in a third of its
cases, the others in fewer; so is a group's, which are another kernel's but for their copies. All of them take minutes.
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


@pytest.mark.parametrize("source", sorted(p.name for p in CUDA.glob("*.cu")))
def test_cases(device: Device, source: str) -> None:
    names = demangled(e.name for e in entries(device.ptx()[source]))
    for entry, name in names.items():
        kernel = Kernel(source, name)
        alike = "<Half" in name or kernel.sizes in ([32], [64]) or kernel.sizes[:2] == [128, 128] or "group" in source
        for number, case in enumerate(cases(kernel, device)[:: 16 if alike else 3]):
            with device.run() as run:
                results = case.launch(run)
            counters = run.counters.matching(entry=entry)
            assert counters, f"case {number} does not launch {name}"
            case.check(results, counters)
