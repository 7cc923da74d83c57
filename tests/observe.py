"""What torch sees of an operator: its gradients, the tensors that it keeps, the dispatcher's calls."""

from collections.abc import Callable

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode


def leaves(case) -> list[torch.Tensor]:
    """x, A, B and bias, each to be differentiated."""
    return [t.detach().requires_grad_() for t in (case.x, case.lora_A, case.lora_B, case.bias)]


def gradients(function: Callable, case) -> list[torch.Tensor]:
    inputs = leaves(case)
    torch.manual_seed(case.generator)
    y = function(*inputs)
    y.backward(case.dy)
    return [y.detach(), *(t.grad for t in inputs)]


def saved(function: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    tensors = []

    def pack(t):
        tensors.append(t)
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        assert function().requires_grad
    return tensors


def bytes_beside(tensors: list[torch.Tensor], shared: list[torch.Tensor]) -> int:
    """Bytes of the storages that are none of `shared`'s."""
    known = {t.untyped_storage().data_ptr() for t in shared}
    new = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(size for address, size in new.items() if address not in known)


class Names(TorchDispatchMode):
    """Collects the operators that the dispatcher sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest result of an operator that is no view of the known tensors."""

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else [result]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.numel = max(self.numel, t.numel())
        return result
