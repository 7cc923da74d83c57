"""What the process does with memory that was freed."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_MOST = 2**31 - 1


def keep_memory() -> bool:
    """Has the process keep the memory that its tensors free, for the next ones, until it ends: call it before training.

    glibc gives large blocks back to the system and takes them again, page by page, in every step: logits, losses, activations,
    more than 100,000 page faults in a step of SmolLM2. This sets M_MMAP_THRESHOLD and M_TRIM_THRESHOLD (mallopt(3)) to 2 GiB,
    as MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ in the environment would, for all that the process does. What is freed
    is then not given back: resident memory stays near its peak, which may itself be a third higher.

    Returns:
        Whether the C library took it. False, and nothing changes, where it is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(option, _MOST) == 1 for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))
