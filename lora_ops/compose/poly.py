"""Poly and MHR: a low-rank update for each task, mixed from a stock of skills."""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributions import RelaxedBernoulli

from ..adapters.kinds import replace_modules
from ..multi import AdapterBank, multi_lora_linear
from ..registry import method

Model = TypeVar("Model", bound=nn.Module)


@method(
    "Poly",
    equation="y = x W0ᵀ + 1/r (x (Σ_k w_k A_k)ᵀ) (Σ_k w_k B_k)ᵀ + bias, w of the sequence's task; in slices (MHR) of K and N",
    use="compose.PolyLinear(linear, n_tasks=4)",
    changes="P",
    source="Ponti et al. 2022, https://arxiv.org/abs/2202.13914; MHR: Caccia et al. 2022, https://arxiv.org/abs/2211.03831",
    test="test_poly.py::test_outputs_are_peft_s",
)
class PolyLinear(nn.Module):
    """y = x W0ᵀ + 1/r (x Aᵀ) Bᵀ + bias with A = Σ_k w_k A_k and B = Σ_k w_k B_k, w the weights of the sequence's task.

    Poly: Ponti et al. 2022 (https://arxiv.org/abs/2202.13914). With `n_splits` > 1 every slice of A's columns and of B's rows
    has weights of its own: multi-head routing, Caccia et al. 2022 (https://arxiv.org/abs/2211.03831). Weights are the logistic
    function of `module_logits[task]`, in training a relaxed Bernoulli sample (temperature 1) for every sequence, divided by
    their sum. A batch of sequences is one call of `multi_lora_linear`.

    Parameters: `lora_A` (n_skills, r, K); `lora_B` (n_skills, N, r), zero at first; `module_logits` (tasks, splits, skills).

    Args:
        linear: its weight and bias are shared and frozen.
        n_tasks, n_skills, r: how many tasks and skills there are, and their rank.
        n_splits: divides K and N.

    Raises:
        TypeError: another kind of layer.
        ValueError: n_splits does not divide K and N. In forward: `task_ids` that are not set, or no index of a task.
    """

    def __init__(self, linear: nn.Linear, n_tasks: int, n_skills: int = 4, r: int = 8, n_splits: int = 1) -> None:
        super().__init__()
        if type(linear).forward is not nn.Linear.forward:
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        self.weight, self.bias = linear.weight, linear.bias
        N, K = self.weight.shape
        if K % n_splits or N % n_splits:
            raise ValueError(f"n_splits must divide K = {K} and N = {N}, got {n_splits}")
        linear.requires_grad_(False)
        device = self.weight.device
        self.lora_A = nn.Parameter(torch.empty(n_skills, r, K, device=device))
        self.lora_B = nn.Parameter(torch.zeros(n_skills, N, r, device=device))
        self.module_logits = nn.Parameter(torch.empty(n_tasks, n_splits, n_skills, device=device).uniform_(-1e-3, 1e-3))
        bound = 1 / math.sqrt(K // n_splits)
        nn.init.uniform_(self.lora_A, -bound, bound)
        self.r, self.n_splits = r, n_splits
        self.task_ids: Tensor | None = None  # (batch,)

    def forward(self, x: Tensor) -> Tensor:
        if self.task_ids is None or len(self.task_ids) != len(x):
            given = "None" if self.task_ids is None else f"{len(self.task_ids)}"
            raise ValueError(f"task_ids must be one for each of {len(x)} sequences, got {given}; see set_task_ids")
        w = self._mixing_weights(self.task_ids)
        n, q = self.lora_A.shape[0], self.n_splits
        A = torch.einsum("bqs,srqk->brqk", w, self.lora_A.view(n, self.r, q, -1)).flatten(2)
        B = torch.einsum("bqs,sqnr->bqnr", w, self.lora_B.view(n, q, -1, self.r)).flatten(1, 2)
        bank = AdapterBank._of({str(i): (a, b, 1 / self.r) for i, (a, b) in enumerate(zip(A, B, strict=True))})
        return multi_lora_linear(x, self.weight, bank, torch.arange(len(x), device=x.device), bias=self.bias)

    def _mixing_weights(self, task_ids: Tensor) -> Tensor:
        n_tasks = self.module_logits.shape[0]
        if task_ids.numel() and not 0 <= int(task_ids.min()) <= int(task_ids.max()) < n_tasks:
            raise ValueError(f"task_ids must be in [0, {n_tasks}), got {task_ids.tolist()}")
        logits = self.module_logits[task_ids]
        w = RelaxedBernoulli(logits.new_tensor(1.0), logits=logits).rsample() if self.training else logits.sigmoid()
        return w / (w.sum(-1, keepdim=True) + 1e-12)


def add_poly(model: Model, target_modules: list[str], n_tasks: int, **options: int) -> Model:
    """Replaces linear layers by `PolyLinear`s, in place, and freezes everything else.

    Args:
        target_modules: names of modules, or their ends.
        n_tasks, options: of `PolyLinear`.

    Raises:
        ValueError: no module has such a name; an option is out of its range. The model is as it was.
    """
    ends = tuple(f".{t}" for t in target_modules)
    found = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and f".{name}".endswith(ends)]
    if not found:
        raise ValueError(f"target_modules must name linear layers of the model, got {target_modules}")
    new: dict[nn.Module, nn.Module] = {linear: PolyLinear(linear, n_tasks, **options) for linear in found}
    model.requires_grad_(False)
    replace_modules(model, new)
    return model


def set_task_ids(model: nn.Module, task_ids: Tensor) -> None:
    """The task of each sequence of the next batches, (batch,) int64, in every `PolyLinear` of the model."""
    for module in model.modules():
        if isinstance(module, PolyLinear):
            module.task_ids = task_ids
