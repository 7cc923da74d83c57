"""Initialisations that look at nothing but the weight's shape."""

import math

import torch
from torch import Tensor, nn

from ..registry import method
from .base import Initial, initialisation

_SOURCE = "Hayou et al. 2024, https://arxiv.org/abs/2406.08447"


@initialisation("default")
def default(weight: Tensor, r: int, scaling: float, *, generator: torch.Generator | None = None) -> Initial:
    """A uniform in ±1/√K, B = 0 (Hu et al. 2021, https://arxiv.org/abs/2106.09685, and PEFT's True)."""
    A, B = _empty(weight, r)
    return Initial(nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator), B.zero_())


@initialisation("gaussian")
def gaussian(weight: Tensor, r: int, scaling: float, *, generator: torch.Generator | None = None) -> Initial:
    """A normal with standard deviation 1/r, B = 0 (PEFT's "gaussian")."""
    A, B = _empty(weight, r)
    return Initial(A.normal_(std=1 / r, generator=generator), B.zero_())


@method(
    "Init[A]",
    equation="A ~ N(0, 1/K), B = 0",
    use='add_lora(model, LoraConfig(target_modules="all-linear", init_lora_weights="init_a"))',
    changes="I",
    source=_SOURCE,
    test="test_init_random.py::test_one_factor_is_zero_and_the_other_gets_the_first_gradient",
)
@initialisation("init_a")
def init_a(weight: Tensor, r: int, scaling: float, *, generator: torch.Generator | None = None) -> Initial:
    """A normal with variance 1/K, B = 0: the first step moves B alone (Hayou et al. 2024, https://arxiv.org/abs/2406.08447)."""
    A, B = _empty(weight, r)
    return Initial(A.normal_(std=weight.shape[1] ** -0.5, generator=generator), B.zero_())


@method(
    "Init[B]",
    equation="A = 0, B ~ N(0, 1/r)",
    use='add_lora(model, LoraConfig(target_modules="all-linear", init_lora_weights="init_b"))',
    changes="I",
    source=_SOURCE,
    test="test_init_random.py::test_one_factor_is_zero_and_the_other_gets_the_first_gradient",
)
@initialisation("init_b")
def init_b(weight: Tensor, r: int, scaling: float, *, generator: torch.Generator | None = None) -> Initial:
    """A = 0, B normal with variance 1/r: the first step moves A alone (Hayou et al. 2024, https://arxiv.org/abs/2406.08447)."""
    A, B = _empty(weight, r)
    return Initial(A.zero_(), B.normal_(std=r**-0.5, generator=generator))


@method(
    "Offset",
    equation="A ~ N(0, 1/K), B ~ N(0, 1/r), W0 ← W0 − s B A",
    use='add_lora(model, LoraConfig(target_modules="all-linear", init_lora_weights="offset"))',
    changes="I",
    source="survey; PiSSA's offset with random factors",
    test="test_init_random.py::test_an_offset_leaves_the_output_where_it_was",
)
@initialisation("offset", offset=True)
def offset(weight: Tensor, r: int, scaling: float, *, generator: torch.Generator | None = None) -> Initial:
    """A normal with variance 1/K, B with variance 1/r, and the weight W0 − scaling · B A: the layer starts as W0 and both
    factors move in the first step."""
    A, B = _empty(weight, r)
    return Initial(A.normal_(std=weight.shape[1] ** -0.5, generator=generator), B.normal_(std=r**-0.5, generator=generator))


@method(
    "Orthogonal",
    equation="A = Q₁ᵀ Z₁ᵀ / 10, B = Z₂ᵀ Q₂ / 10, Q₁ and Q₂ the odd and even rows of an orthogonal Q (r, r): B A = 0",
    use='add_lora(model, LoraConfig(target_modules="all-linear", init_lora_weights="orthogonal"))',
    changes="I",
    source="PEFT; https://datta0.github.io/posts/rethink-lora-init/",
    test="test_init_random.py::test_orthogonal_is_peft_s",
)
@initialisation("orthogonal")
def orthogonal(weight: Tensor, r: int, scaling: float, *, generator: torch.Generator | None = None) -> Initial:
    """Neither factor is zero, and B A is: A = (Z₁ Q₁)ᵀ / 10 (r, K), B = Z₂ᵀ Q₂ / 10 (N, r), where Q₁, Q₂ (r/2, r) are every
    other row of a random orthogonal matrix, Z₁ (K, r/2) and Z₂ (r/2, N) standard normal (PEFT's "orthogonal").

    Raises:
        ValueError: r is odd.
    """
    if r % 2:
        raise ValueError(f'r must be even for "orthogonal", got {r}')
    N, K = weight.shape

    def normal(*shape: int) -> Tensor:
        device = generator.device if generator is not None else None
        return torch.randn(shape, generator=generator, device=device)

    Q = torch.linalg.qr(normal(r, r)).Q
    A, B = (normal(K, r // 2) @ Q[::2]).T / 10, normal(r // 2, N).T @ Q[1::2] / 10
    return Initial(A.to(weight), B.to(weight))


def _empty(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    N, K = weight.shape
    return weight.new_empty(r, K), weight.new_empty(N, r)
