"""Methods whose A and B are the layer's own."""

import math

import torch
from torch import Tensor, nn

from ..registry import method
from .base import check_positive, check_rank, shape_of
from .pair import Gated, Pair


def new_pair(linear: nn.Module, r: int, *, std: float | None = None, zero_B: bool = False, train_A: bool = True) -> Pair:
    """A and B of a layer's shape: normal with that standard deviation, or uniform in ±1/√K and ±1/√r (PEFT's A); or B zero.

    Raises:
        ValueError: r is no integer >= 1.
        TypeError: the layer is no linear one.
    """
    check_positive(r=r)
    N, K = shape_of(linear)
    A, B = torch.empty(r, K), torch.zeros(N, r)
    for factor in (A,) if zero_B else (A, B):
        if std is None:
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        else:
            nn.init.normal_(factor, std=std)
    return Pair(A, B, train=("lora_A", "lora_B") if train_A else ("lora_B",))


def gated(linear: nn.Module, r: int = 8, *, gate: float | Tensor = 1.0, std: float | None = None, zero_B: bool = True) -> Gated:
    """LoRA with a trainable gate between its factors: ΔW = B diag(gate) A. What AdaLoRA's Λ, SoRA's g, dynamic DoRA's c,
    AutoLoRA's and ALoRA's α and DyLoRA's mask are; a training method decides what becomes of `gate`.

    Args:
        linear: the layer that gets it.
        gate: all of it, or (r,).
        std, zero_B: see `new_pair`. AdaLoRA: gate 0, std 0.02, B not zero.
    """
    check_positive(r=r)
    values = gate if isinstance(gate, Tensor) else torch.full((r,), float(gate))
    return Gated(new_pair(linear, r, std=std, zero_B=zero_B), gate=values.clone())


@method(
    "TriLoRA",
    equation="ΔW = B diag(gate) A, gate = 0 at first",
    use="FactoredLinear(linear, factors.trilora(linear, r=8))",
    changes="P",
    source="Feng et al. 2024, https://arxiv.org/abs/2405.11236; code: Chongjie-Si/Subspace-Tuning",
    test="test_factors_own.py::test_a_zero_gate_is_the_base_and_trains_alone",
    note="The code computes alpha / r and does not use it: scaling is 1.",
)
def trilora(linear: nn.Module, r: int = 8) -> Gated:
    """SVD-like LoRA, nothing held orthogonal. A and B are uniform, as LoRA's A is."""
    return gated(linear, r, gate=0.0, zero_B=False)


@method(
    "FLoRA (Tucker core)",
    equation="ΔW = B coreᵀ A, core (r, r) = 0 at first",
    use="FactoredLinear(linear, factors.flora(linear, r=8))",
    changes="P",
    source="Si et al. 2024, https://arxiv.org/abs/2405.14739; code: Chongjie-Si/Subspace-Tuning",
    test="test_factors_own.py::test_a_zero_core_is_the_base_and_trains_alone",
    note="Not the gradient compressor FLoRA (Hao et al. 2024), another system of the same name.",
)
def flora(linear: nn.Module, r: int = 8) -> Gated:
    """A and B normal with standard deviation 0.02."""
    return Gated(new_pair(linear, r, std=0.02), core=torch.zeros(r, r))


@method(
    "(IA)³",
    equation="y = out_scale ∘ (x W0ᵀ) + bias, out_scale (N,) = 1 at first",
    use="FactoredLinear(linear, factors.ia3(linear))",
    changes="P",
    source="Liu et al. 2022, https://arxiv.org/abs/2205.05638",
    test="test_factors_peft.py::test_ia3_is_peft_s",
    note="PEFT multiplies the bias too. Where PEFT scales the input of down_proj, scale the output of up_proj: the same.",
)
def ia3(linear: nn.Module) -> Gated:
    """The output of the layer, but for its bias, times a vector: the operator's output scale alone, with a pair of zeros."""
    N, K = shape_of(linear)
    return Gated(Pair(torch.zeros(1, K), torch.zeros(N, 1), train=()), out_scale=torch.ones(N))


@method(
    "Asymmetric LoRA",
    equation="ΔW = B A or B coreᵀ A, A frozen with A Aᵀ = I",
    use="FactoredLinear(linear, factors.asymmetric(linear, r=8))",
    changes="IP",
    source="Zhu et al. 2024, https://arxiv.org/abs/2402.16842; code: Jiacheng-Zhu-AIML/AsymmetryLoRA",
    test="test_factors_own.py::test_asymmetric_lora_projects_the_gradient",
    note='The code\'s option "V" takes Vᵀ along the wrong axis; the random A, which the paper uses, is right.',
)
def asymmetric(linear: nn.Module, r: int = 8, *, core: bool = False) -> Gated:
    """A is random with orthonormal rows and stays; B trains from zero. With `core`, B is random and stays as well, orthonormal
    in its columns, and the core (r, r) trains from zero.
    """
    N, K = shape_of(linear)
    check_rank(r, (N, K))
    A = nn.init.orthogonal_(torch.empty(r, K))
    if core:
        return Gated(Pair(A, nn.init.orthogonal_(torch.empty(N, r)), train=()), core=torch.zeros(r, r))
    return Gated(Pair(A, torch.zeros(N, r), train=("lora_B",)))


@method(
    "AFLoRA's parametrisation",
    equation="ΔW = diag(B_scale) B diag(gate) A, gate = 0.1, B_scale = 0 at first; all train until they are frozen",
    use="FactoredLinear(linear, factors.aflora(linear, r=4))",
    changes="P",
    source="Liu et al. 2024, https://arxiv.org/abs/2403.13269; code: zeyuliu1037/AFLoRA",
    test="test_factors_own.py::test_aflora_starts_at_the_base_and_folds",
    note="The code computes alpha / √r and does not use it: scaling is 1. It freezes A and B of square layers from the start.",
)
def aflora(linear: nn.Module, r: int = 4) -> Gated:
    """VeRA's form with matrices of the layer's own, A and B Kaiming uniform with gain √2."""
    check_positive(r=r)
    N, K = shape_of(linear)
    A, B = (nn.init.kaiming_uniform_(torch.empty(shape)) for shape in ((r, K), (N, r)))
    return Gated(Pair(A, B), gate=torch.full((r,), 0.1), B_scale=torch.zeros(N))
