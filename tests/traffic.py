"""What collectives send, counted where torch dispatches them: of every kind, how often and how many bytes.

Bytes are those of the whole: an all-gather's output, a reduce-scatter's input, the tensor of an all-reduce or of a send.
"""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Of c10d and of functional collectives: the kind, and which argument holds the bytes; "groups" times the size of the group.
KINDS = {
    "allreduce_": ("all_reduce", 0, 1),
    "all_reduce": ("all_reduce", 0, 1),
    "_allgather_base_": ("all_gather", 0, 1),
    "all_gather_into_tensor": ("all_gather", 0, "group"),
    "_reduce_scatter_base_": ("reduce_scatter", 1, 1),
    "reduce_scatter_tensor": ("reduce_scatter", 0, 1),
    "broadcast_": ("broadcast", 0, 1),
    "send": ("send", 0, 1),
}
SILENT = {"wait_tensor", "_wrap_tensor_autograd", "recv_", "barrier"}  # what was sent is counted where it was


class Traffic(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1]
            if name not in SILENT:
                kind, argument, times = KINDS[name]  # a collective that nobody has thought of is an error
                tensors = [t for t in tree_leaves(args[argument]) if isinstance(t, torch.Tensor)]
                self.calls[kind] += 1
                self.bytes[kind] += sum(t.nbytes for t in tensors) * (args[1] if times == "group" else 1)
        return func(*args, **(kwargs or {}))
