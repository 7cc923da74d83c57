"""Methods whose layers share A and B."""

import torch
from torch import nn

from ..registry import method
from .base import check_positive, shape_of
from .pair import Gated, Pair


@method(
    "VeRA",
    equation="ΔW = diag(B_scale) B diag(gate) A, A and B frozen, shared by all layers; gate = 0.1, B_scale = 0 at first",
    use="FactoredLinear(linear, factors.vera(linear, factors.Pair.seeded(*factors.shape_of(linear), r=256)))",
    changes="P",
    source="Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454",
    test="test_factors_peft.py::test_vera_is_peft_s",
)
def vera(linear: nn.Module, shared: Pair, *, d_initial: float = 0.1) -> Gated:
    """Two vectors a layer train, r + N numbers. Scaling is 1.

    Args:
        linear: the layer that gets it.
        shared: of all layers, made by `Pair.seeded(*widest(layers), r)`; PEFT's, for the same sizes and seed.
        d_initial: gate at first.

    Raises:
        ValueError: the layer is larger than what is shared.
    """
    N, K = shape_of(linear)
    return Gated(shared, N, K, gate=torch.full((shared.r,), d_initial), B_scale=torch.zeros(N))


@method(
    "Tied-LoRA",
    equation="ΔW = diag(B_scale) B diag(gate) A, A and B trainable, shared by all layers",
    use="FactoredLinear(linear, factors.tied_lora(linear, factors.tied_pair(*factors.shape_of(linear), r=8)))",
    changes="P",
    source="Renduchintala et al. 2023, https://arxiv.org/abs/2311.09578",
    test="test_factors_tied.py::test_shared_factors_get_the_sum_of_the_layers_gradients",
    note="The paper leaves the first values of u and v open; here both are 1 and B is 0, so that the layer starts as W0.",
)
def tied_lora(linear: nn.Module, shared: Pair, *, vectors: bool = True) -> Gated:
    """LoRA tied across layers, u = `gate` (r,) and v = `B_scale` (N,) of each layer's own. Without `vectors`, which of them
    train is up to the pair alone (the paper's TL5). Scaling is 1 (alpha = r).

    Args:
        shared: `tied_pair`, or any other, its `train` saying which of A and B do.
    """
    N, K = shape_of(linear)
    if not vectors:
        return Gated(shared, N, K)
    return Gated(shared, N, K, gate=torch.ones(shared.r), B_scale=torch.ones(N))


def tied_pair(N: int, K: int, r: int = 8) -> Pair:
    """LoRA's A, uniform in ±1/√K, and B zero, to be shared by layers of at most that size. What LoRA-drop's less important
    layers share, too."""
    check_positive(N=N, K=K, r=r)
    return Pair(torch.empty(r, K).uniform_(-(K**-0.5), K**-0.5), torch.zeros(N, r))


@method(
    "LoTR",
    equation="ΔW = B coreᵀ A, A and B trainable and shared by layers of one shape, core (r, r) of each layer = 0 at first",
    use="FactoredLinear(linear, factors.lotr(linear, factors.lotr_pair(*factors.shape_of(linear), r=2)), scaling=1 / 2)",
    changes="P",
    source="Bershatsky et al. 2024, https://arxiv.org/abs/2402.01376; code: daskol/lotr",
    test="test_factors_tied.py::test_lotr_shares_its_sides_and_not_its_core",
)
def lotr(linear: nn.Module, shared: Pair) -> Gated:
    """Tucker form over the layers. Its scaling is scale / r."""
    return Gated(shared, *shape_of(linear), core=torch.zeros(shared.r, shared.r))


def lotr_pair(N: int, K: int, r: int = 2) -> Pair:
    """LoTR's two sides, standard normal."""
    check_positive(N=N, K=K, r=r)
    return Pair(torch.randn(r, K), torch.randn(N, r))
