"""What was built, and what of it runs here."""

import importlib.util
from typing import Any

from . import _C
from ._version import __version__


def build_info() -> dict[str, Any]:
    """Version, compiler, the CPU ISAs that were built, those this machine supports (fastest first), the one in use, and
    whether CUDA kernels were built (they are loaded with the first CUDA tensor, not before).

    The ISA is chosen when first asked for; LORA_OPS_CPU_ISA=generic|avx2|avx512|avx512_bf16|amx forces one, and a name that is
    unknown or not supported here raises RuntimeError.
    """
    return {
        "version": __version__,
        "compiler": _C.compiler,
        "isas_built": _C.built_isas(),
        "isas_supported": _C.supported_isas(),
        "isa": _C.isa(),
        "cuda": importlib.util.find_spec("lora_ops._C_cuda") is not None,
    }
