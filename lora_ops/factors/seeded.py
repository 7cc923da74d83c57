"""Methods that train coefficients of random directions, which a seed makes anew whenever they are needed."""

import torch
from torch import Tensor, nn

from ..registry import method
from .base import Factors, check_positive, shape_of
from .directions import combination


def _first_A(r: int, K: int, seed: int) -> Tensor:
    bound = K**-0.5
    return torch.empty(r, K).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))


@method(
    "NOLA",
    equation="A = A0 + Σ alpha_k A_k, B = Σ beta_k B_k, all matrices random, frozen, never stored; alpha = beta = 0 at first",
    use="FactoredLinear(linear, factors.Nola(linear, r=8, bases=64), scaling=1 / 8)",
    changes="P",
    source="Koohpayegani et al. 2023, https://arxiv.org/abs/2310.02556; code: UCDvision/NOLA",
    test="test_factors_seeded.py::test_nola_is_rebuilt_from_seed_and_coefficients",
    note="The code's block-wise generation uses names that it does not define, so that all bases exist at once; its A0 comes "
    "from no seed and has to be stored. The paper says zero B by beta = 0, the code the same.",
)
class Nola(nn.Module):
    """2 · bases numbers a layer train, whatever its size. A0 is uniform in ±1/√K.

    Args:
        linear: the layer that gets it.
        bases: of A, and of B.
        seed: of all matrices. Layers may have the same.
    """

    A0: Tensor  # (r, K)

    def __init__(self, linear: nn.Module, r: int = 8, *, bases: int = 1024, seed: int = 0) -> None:
        super().__init__()
        check_positive(r=r, bases=bases)
        N, K = shape_of(linear)
        self.shapes, self.seed = ((r, K), (N, r)), seed
        self.register_buffer("A0", _first_A(r, K, seed), persistent=False)
        self.alpha, self.beta = nn.Parameter(torch.zeros(bases)), nn.Parameter(torch.zeros(bases))

    def forward(self, x: Tensor) -> Factors:
        of_A, of_B = self.shapes
        A = self.A0 + combination(self.alpha, of_A, self.seed + 1)
        return Factors(A, combination(self.beta, of_B, self.seed + 2))


class Theta(nn.Module):
    """The d numbers that layers share."""

    def __init__(self, d: int) -> None:
        super().__init__()
        check_positive(d=d)
        self.theta = nn.Parameter(torch.zeros(d))


@method(
    "Intrinsic dimension",
    equation="θ = θ0 + P theta, theta (d,) = 0 at first, shared by all layers; θ a layer's W0, or A and B of a LoRA",
    use="FactoredLinear(linear, factors.IntrinsicDimension(linear, factors.Theta(100), seed=0))",
    changes="P",
    source="Li et al. 2018, https://arxiv.org/abs/1804.08838; Aghajanyan et al. 2020, https://arxiv.org/abs/2012.13255",
    test="test_factors_seeded.py::test_intrinsic_dimension_gets_the_projected_gradient",
    note="P is a dense random matrix that is never stored, not Fastfood.",
)
class IntrinsicDimension(nn.Module):
    """d numbers train for all layers together.

    Args:
        linear: the layer that gets it.
        shared: of all layers.
        seed: of the layer's rows of P: another one for each layer.
        r: θ is A and B of that rank, A uniform in ±1/√K and B zero at first. None: θ is the weight itself, as B of full rank
            beside the identity for A: it costs another product with a matrix of W0's size.
    """

    A0: Tensor  # (r, K)

    def __init__(self, linear: nn.Module, shared: Theta, *, seed: int, r: int | None = None) -> None:
        super().__init__()
        N, K = shape_of(linear)
        check_positive(r=K if r is None else r)
        self.N, self.seed, self.whole = N, seed, r is None
        self.shared = shared
        A = torch.eye(K) if r is None else _first_A(r, K, seed)
        self.register_buffer("A0", A, persistent=False)

    def forward(self, x: Tensor) -> Factors:
        A, (r, K) = self.A0, self.A0.shape
        if self.whole:
            return Factors(A, combination(self.shared.theta, (self.N, K), self.seed))
        moved = combination(self.shared.theta, (r * (K + self.N),), self.seed)
        return Factors(A + moved[: r * K].view(r, K), moved[r * K :].view(self.N, r))
