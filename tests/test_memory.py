"""keep_memory, in a process of its own: what it sets stays set."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource
import torch
import lora_ops

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        a, b = (torch.ones(2**24) for _ in range(2))  # 64 MiB each
        del a, b
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
before = faults()
kept = lora_ops.keep_memory()
faults()  # takes the memory that is then kept
print(int(kept), before, faults())
"""


def test_freed_memory_is_taken_again_without_page_faults():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    kept, before, after = map(int, done.stdout.split())
    if not kept:
        pytest.skip("the C library is not glibc")
    assert after < before / 4
