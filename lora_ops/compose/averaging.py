"""Weights of models that were tuned from one model, added: task arithmetic, and BYOM's sparse rest.

State dicts in, state dicts out. For models with LoRA they are those of `merge_and_unload`'s copies.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..registry import method

Tensors = Mapping[str, Tensor]


@method(
    "Task arithmetic",
    equation="θ = θ0 + λ Σ_k (θ_k - θ0); of adapters, combine(adapters, [λ] * n, 'cat')",
    use="model.load_state_dict(compose.task_arithmetic(pretrained, [tuned_1, tuned_2]))",
    changes="C",
    source="Ilharco et al. 2022, https://arxiv.org/abs/2212.04089",
    test="test_averaging.py::test_task_arithmetic_of_adapters_is_their_cat",
)
def task_arithmetic(pretrained: Tensors, tuned: Sequence[Tensors], scaling: float = 0.3) -> dict[str, Tensor]:
    """θ0 + λ Σ_k (θ_k - θ0), λ = `scaling`, in fp32 at least, rounded once to θ0's dtype. Whole numbers are θ0's.

    Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023 (https://arxiv.org/abs/2212.04089). A negative λ forgets.

    Raises:
        ValueError: state dicts that differ in names or shapes.
    """
    check_states([pretrained, *tuned], "tuned")

    def merged(base: Tensor, *others: Tensor) -> Tensor:
        return base + scaling * sum(other - base for other in others)

    return each_tensor(merged, [pretrained, *tuned])


@method(
    "BYOM-FFT",
    equation="θ_k ≈ θ* + (θ_k - θ*) where |θ_k - θ*| is among the largest m % of all, else θ*",
    use="rest = compose.sparse_rest(merged, tuned_1, density=0.1)",
    changes="C",
    source="Jiang et al. 2023, https://arxiv.org/abs/2310.01886",
    test="test_averaging.py::test_the_sparse_rest_restores_what_merging_lost",
)
def sparse_rest(merged: Tensors, tuned: Tensors, density: float) -> dict[str, Tensor]:
    """Of θ_k - θ*, the largest `density` of all elements together, sparse (COO): merged[name] + rest[name] is the task's.

    BYOM-FFT: Jiang et al., "BYOM: Building Your Own Multi-Task Model For Free", 2023 (https://arxiv.org/abs/2310.01886), for θ*
    of any merging. Its LoRA form, BYOM-LoRA, is `combine([adapter], [1.0], "svd", svd_rank=q)`.

    Raises:
        ValueError: state dicts that differ, or a density out of (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    check_states([merged, tuned], "tuned")
    rest = {name: tuned[name] - t for name, t in merged.items() if t.is_floating_point()}
    every = torch.cat([t.abs().flatten().float() for t in rest.values()])
    mask = torch.zeros(every.numel(), dtype=torch.bool, device=every.device)
    mask[every.topk(int(density * every.numel())).indices] = True
    masks = mask.split([t.numel() for t in rest.values()])
    return {name: (t * m.view_as(t)).to_sparse() for (name, t), m in zip(rest.items(), masks, strict=True)}


def each_tensor(merge: Callable[..., Tensor], states: Sequence[Tensors]) -> dict[str, Tensor]:
    return {
        name: merge(*(wide(state[name]) for state in states)).to(t.dtype) if t.is_floating_point() else t.clone()
        for name, t in states[0].items()
    }


def wide(t: Tensor) -> Tensor:
    return t.detach().to(torch.promote_types(t.dtype, torch.float32))


def check_states(states: Sequence[Tensors], argument: str) -> None:
    if not states:
        raise ValueError(f"{argument} must hold at least one state dict, got none")
    shapes = [{name: tuple(t.shape) for name, t in state.items()} for state in states]
    for i, of_one in enumerate(shapes[1:], 1):
        differing = [name for name in shapes[0].keys() | of_one.keys() if shapes[0].get(name) != of_one.get(name)]
        if differing:
            name = min(differing)
            raise ValueError(
                f"{argument} must have the same names and shapes, got {name!r} as {shapes[0].get(name)} and {of_one.get(name)} "
                f"in number {i}"
            )
