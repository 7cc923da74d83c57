"""Deep LoRA: a chain of square matrices between the factors."""

import functools

import torch
from torch import Tensor, nn

from ..registry import method
from .base import Factors, check_rank, shape_of
from .pair import Pair


@method(
    "Deep LoRA",
    equation="ΔW = B W_3 W_2 W_1 A, W_i (r, r) = init_scale · I at first; A and B from one gradient, frozen or not",
    use="FactoredLinear(linear, factors.DeepLora.from_gradient(linear, torch.randn_like(linear.weight), r=8))",
    changes="IPD",
    source="Yaras et al. 2024, https://arxiv.org/abs/2406.04112; code: cjyaras/deep-lora-transformers",
    test="test_factors_chain.py::test_deep_lora_is_the_full_chain_on_its_subspace",
)
class DeepLora(nn.Module):
    """A deep linear chain, compressed to the subspace in which its gradient descent takes place. Scaling is 1.

    Args:
        lora_A: (r, K), the chain's right side.
        lora_B: (N, r), its left side.
        depth: how many W_i, >= 1.
        init_scale: of each W_i at first.
        train_sides: whether A and B train, too; the authors have them frozen, or with a smaller learning rate.
    """

    def __init__(
        self, lora_A: Tensor, lora_B: Tensor, *, depth: int = 3, init_scale: float = 1e-3, train_sides: bool = False
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self.pair = Pair(lora_A, lora_B, train=("lora_A", "lora_B") if train_sides else ())
        eye = torch.eye(self.pair.r, dtype=lora_A.dtype, device=lora_A.device)
        self.chain = nn.ParameterList(nn.Parameter(init_scale * eye) for _ in range(depth))

    def forward(self, x: Tensor) -> Factors:
        core = functools.reduce(torch.matmul, [W.T for W in self.chain])
        return Factors(self.pair.lora_A, self.pair.lora_B, core=core)

    @classmethod
    @torch.no_grad()
    def from_gradient(
        cls,
        linear: nn.Module,
        gradient: Tensor,
        r: int = 8,
        *,
        depth: int = 3,
        init_scale: float = 1e-3,
        train_sides: bool = False,
        generator: torch.Generator | None = None,
    ) -> "DeepLora":
        """The compressed form of a chain of full width w = max(N, K), W_1 (w, K) ... W_depth (N, w), each init_scale times a
        random orthogonal matrix.

        With gradient_1 = U Σ Vᵀ that of W_1, the chain moves in the span of V's first r/2 columns and of W_1ᵀ U's: A is an
        orthonormal basis of it, B = chain Aᵀ / init_scale^depth. Where W_1 is not square, W_depthᵀ stands for it.

        Args:
            linear: the layer that gets it.
            gradient: of the loss with respect to its weight, (N, K).
            r: even, at most min(N, K).
            depth, init_scale, train_sides: see the class; depth >= 3.
            generator: of the orthogonal matrices.

        Raises:
            ValueError: an argument out of its range, by name.
        """
        N, K = shape_of(linear)
        check_rank(r, (N, K))
        if r % 2:
            raise ValueError(f"r must be even, got {r}")
        if depth < 3:
            raise ValueError(f"depth must be at least 3, got {depth}")
        if gradient.shape != (N, K):
            raise ValueError(f"gradient must have shape {(N, K)}, got {tuple(gradient.shape)}")
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        chain = orthogonal_chain(N, K, depth, gradient, generator)
        full = functools.reduce(torch.matmul, reversed(chain))
        if K >= N:
            A = _moving(chain[0], functools.reduce(torch.matmul, reversed(chain[1:])).T @ gradient, r)
            B = full @ A.T
        else:
            B = _moving(chain[-1].T, functools.reduce(torch.matmul, reversed(chain[:-1])) @ gradient.T, r).T
            A = B.T @ full
        return cls(A, B, depth=depth, init_scale=init_scale, train_sides=train_sides)


def orthogonal_chain(N: int, K: int, depth: int, like: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
    """W_1 ... W_depth of width max(N, K), each orthogonal, or with orthonormal rows or columns."""
    w = max(N, K)
    shapes = [(w, K), *[(w, w)] * (depth - 2), (N, w)]
    return [nn.init.orthogonal_(torch.empty(shape), generator=generator).to(like) for shape in shapes]


def _moving(first: Tensor, gradient: Tensor, r: int) -> Tensor:
    """Orthonormal rows (r, n) that span what changes of a square matrix of the chain."""
    U, _, Vh = torch.linalg.svd(gradient)
    heads = torch.cat([first.T @ U[:, : r // 2], Vh[: r // 2].T], dim=1)
    return torch.linalg.qr(heads)[0].T.contiguous()
