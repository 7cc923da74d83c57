"""A CUDA device on the CPU: launchers run their real host code, kernels run as PTX, and every access is checked.

device = Device([path, ...])
with device.run(arch=80) as run:
    y = torch.empty(...)                   # recorded with its exact bounds, and as uninitialised
    run.library.lora_ops_lora_down(...)    # pointers are the tensors' data_ptr()
run.counters

With LORA_OPS_TEST_GPU=1 kernels run on the GPU that there is, one launch at a time. Buffers are mapped into its memory and
never unmapped, so malloc must not give pages back, and the environment must be
    CUDA_LAUNCH_BLOCKING=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=9223372036854775807 MALLOC_ARENA_MAX=1
"""

import ctypes
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ptx.build import GPU, REPOSITORY, build

_UNINITIALISED = {"empty", "empty_strided", "empty_like", "empty_permuted", "new_empty", "new_empty_strided"}


class Counter(NamedTuple):
    """What one instruction of the PTX did, over a whole run."""

    entry: str
    ptx_line: int
    source: str  # .cu file:line
    opcode: str
    executions: int  # by warps
    wavefronts: int  # of shared memory
    ideal_wavefronts: int
    sectors: int  # of 32 bytes of global memory
    ideal_sectors: int
    global_bytes: int


class Launch(NamedTuple):
    entry: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int  # static and dynamic


class Traffic(NamedTuple):
    """Bytes that launches moved of one buffer or of several."""

    read: int  # by every access, as if there were no cache
    written: int
    distinct_read: int  # at least once in a launch: no cache saves that
    distinct_written: int


class Counters(list[Counter]):
    def matching(self, opcode: str = "", entry: str = "") -> "Counters":
        """The instructions whose opcode starts with `opcode`, in the kernels whose mangled name contains `entry`."""
        return Counters(c for c in self if c.opcode.startswith(opcode) and entry in c.entry)

    def total(self, what: str) -> int:
        return sum(getattr(c, what) for c in self)

    @property
    def mma_count(self) -> int:
        return self.matching("mma.").total("executions")

    @property
    def bank_conflicts(self) -> "Counters":
        """The instructions that take more wavefronts than they must."""
        return Counters(c for c in self if c.wavefronts > c.ideal_wavefronts)


class Uncounted(Counters):
    """A GPU's: what a test asserts of counts holds."""

    class Any:
        def __eq__(self, other: object) -> bool:
            return True

        def __mul__(self, other: object) -> "Uncounted.Any":
            return self

    mma_count = Any()
    bank_conflicts = Counters()

    def matching(self, opcode: str = "", entry: str = "") -> "Uncounted":
        return self

    def total(self, what: str) -> "Uncounted.Any":
        return self.mma_count

    def __bool__(self) -> bool:
        return True


class Run:
    """One use of the device: memory, reports and counters begin empty."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        self._storages: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no address comes back

    def register(self, tensor: torch.Tensor, readonly: bool = False, initialised: bool = True) -> torch.Tensor:
        """Lets kernels touch the tensor's storage. What is created inside the run needs no registration."""
        storage = tensor.untyped_storage()
        if storage.nbytes():
            self._storages[storage.data_ptr()] = storage
            self.library.ptx_register_buffer(storage.data_ptr(), storage.nbytes(), int(readonly), int(initialised))
        return tensor

    def initialise(self, tensor: torch.Tensor) -> None:
        """The host has written the tensor by other means than a torch operator."""
        if tensor.numel() == 0:
            return
        dims = sorted(zip(tensor.stride(), tensor.shape, strict=True))
        dims = [(stride, size) for stride, size in dims if size > 1 and stride > 0]
        run = 1
        while dims and dims[0][0] <= run:
            stride, size = dims.pop(0)
            run = stride * (size - 1) + run
        offsets = np.zeros(1, np.int64)
        for stride, size in dims:
            offsets = (offsets[:, None] + stride * np.arange(size)).ravel()
        itemsize = tensor.element_size()
        for offset in offsets.tolist():
            self.library.ptx_initialise(tensor.data_ptr() + offset * itemsize, run * itemsize)

    def launch(self, entry: str, grid: Sequence[int], block: Sequence[int], shared_bytes: int, *arguments: Any) -> None:
        """Launches without host code. Arguments are tensors (their addresses) and ctypes values or structs."""
        values = [ctypes.c_uint64(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
        addresses = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(v) for v in values))
        three = ctypes.c_uint32 * 3
        ones = (1, 1, 1)
        size = [three(*(*dims, *ones)[:3]) for dims in (grid, block)]
        if self.library.ptx_launch(entry.encode(), *size, shared_bytes, addresses):
            raise RuntimeError(self.library.ptx_error().decode())

    @property
    def reports(self) -> list[str]:
        return self.library.ptx_reports().decode().splitlines()

    @property
    def launches(self) -> list[Launch]:
        rows = (line.split("\t") for line in self.library.ptx_launches().decode().splitlines())
        numbers = ((row[0], tuple(map(int, row[1:]))) for row in rows)
        return [Launch(entry, n[:3], n[3:6], n[6]) for entry, n in numbers]

    def traffic(self, tensor: torch.Tensor | None = None, entry: str = "") -> Traffic:
        """Of the tensor's storage, or of all memory, by the kernels whose mangled name contains `entry`."""
        address = None if tensor is None else str(tensor.untyped_storage().data_ptr())
        rows = (line.split("\t") for line in self.library.ptx_traffic().decode().splitlines())
        moved = [map(int, row[2:]) for row in rows if entry in row[0] and address in (None, row[1])]
        return Traffic(*map(sum, zip((0,) * 4, *moved, strict=True)))

    @property
    def counters(self) -> Counters:
        if GPU:
            return Uncounted()
        rows = (line.split("\t") for line in self.library.ptx_counters().decode().splitlines())
        return Counters(Counter(r[0], int(r[1]), r[2], r[3], *map(int, r[4:])) for r in rows)


class _Recorder(TorchDispatchMode):
    def __init__(self, run: Run):
        super().__init__()
        self.run = run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        uninitialised = func.overloadpacket.__name__ in _UNINITIALISED
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.device.type == "cpu":
                storage = t.untyped_storage()
                if storage.nbytes() and storage.data_ptr() not in self.run._storages:
                    if uninitialised:  # NaN in every float dtype: what no kernel writes cannot pass for a result
                        ctypes.memset(storage.data_ptr(), 0xFF, storage.nbytes())
                    self.run.register(t, initialised=not uninitialised)
        if func._schema.is_mutable:
            for i, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = args[i] if i < len(args) else kwargs.get(argument.name)
                    for t in tree_leaves(value):
                        if isinstance(t, torch.Tensor) and t.device.type == "cpu":
                            self.run.initialise(t)
        return out


class Device:
    """Kernels of the given .cu files (all of csrc/cuda by default), for one architecture at a time.

    A .cpp among the sources is host code of the same library: with the bindings, the library is an extension module too.
    """

    launched: ClassVar[dict[str, Launch]] = {}  # by all devices of the process, one for each entry

    def __init__(self, sources: Sequence[Path] | None = None, flags: Sequence[str] = ()):
        self.sources = sorted((REPOSITORY / "csrc/cuda").glob("*.cu")) if sources is None else [Path(s) for s in sources]
        self.flags = list(flags)
        self._built: dict[int, Future[tuple[Path, dict[str, str]]]] = {}
        self._libraries: dict[int, ctypes.CDLL] = {}

    def prepare(self, arch: int) -> None:
        """Begins to compile, for whoever needs it later."""
        if arch not in self._built:
            pool = ThreadPoolExecutor(1)
            self._built[arch] = pool.submit(build, self.sources, arch, self.flags)
            pool.shutdown(wait=False)

    def _build(self, arch: int) -> tuple[Path, dict[str, str]]:
        self.prepare(arch)
        return self._built[arch].result()

    def library_path(self, arch: int = 80) -> Path:
        return self._build(arch)[0]

    def ptx(self, arch: int = 80) -> dict[str, str]:
        """PTX by the name of its .cu file."""
        return self._build(arch)[1]

    def load_module(self, name: str, text: str, arch: int = 80) -> None:
        """Adds PTX, or puts it in place of the module of that name: a changed kernel behind the same launcher."""
        library = self._library(arch)
        if library.ptx_load_module(name.encode(), text.encode()):
            raise RuntimeError(library.ptx_error().decode())

    def _library(self, arch: int) -> ctypes.CDLL:
        if arch not in self._libraries:
            library = ctypes.CDLL(str(self.library_path(arch)))
            for name in ("error", "reports", "counters", "launches", "traffic"):
                getattr(library, f"ptx_{name}").restype = ctypes.c_char_p
            library.ptx_register_buffer.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_int]
            library.ptx_initialise.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
            self._libraries[arch] = library
            for name, text in self.ptx(arch).items():
                self.load_module(name, text, arch)
        return self._libraries[arch]

    @contextmanager
    def run(self, arch: int = 80, limits: int | None = None, reverse: bool = False, check: bool = True) -> Iterator[Run]:
        """PTX of compute_`arch` under the limits of sm_`limits` (the same where it is left out); `reverse`: blocks and warps in
        descending order. Raises AssertionError with all reports at the end, unless not `check`."""
        library = self._library(arch)
        library.ptx_set_architecture(limits or arch)
        library.ptx_set_reverse_order(int(reverse))
        library.ptx_reset()
        if self.sources:
            library.fake_cudart_reset()
        run = Run(library)
        failure: BaseException | None = None
        try:
            with _Recorder(run):
                yield run
        except Exception as e:
            failure = e
        self.launched.update({launch.entry: launch for launch in run.launches})
        if check and run.reports:
            raise AssertionError("\n".join(["the device reports:", *run.reports])) from failure
        if failure is not None:
            raise failure
