"""The best approximation of low rank, plain or weighted: what all initialisations by singular vectors share."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def low_rank(
    M: Tensor,
    r: int,
    row_w: Tensor | None = None,
    col_w: Tensor | None = None,
    niter: int | None = None,
    *,
    q: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """U (N, r), S (r,), Vh (r, K) whose product U diag(S) Vh is the nearest of rank r to M (N, K): it minimises

        ‖ diag(row_w) (M − U diag(S) Vh) diag(col_w) ‖ in the Frobenius norm      (Eckart and Young 1936, of the scaled matrix)

    Without weights they are the leading singular triplets.

    Args:
        M: float32 or float64.
        r: at most min(N, K).
        row_w, col_w: (N,) and (K,), positive. None: ones.
        niter: None: exact. Otherwise that many subspace iterations from a random start (`torch.svd_lowrank`; Halko et al.
            2009, https://arxiv.org/abs/0909.4061).
        q: with niter, how many directions are iterated. None: r.
        generator: with niter, of the start. None: torch's default.
    """
    row = None if row_w is None else row_w.to(M.dtype)[:, None]
    col = None if col_w is None else col_w.to(M.dtype)
    if row is not None:
        M = row * M
    if col is not None:
        M = M * col
    if niter is None:
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    else:
        with drawing_from(generator):
            U, S, V = torch.svd_lowrank(M, q=min(q or r, *M.shape), niter=niter)
        Vh = V.T
    U, S, Vh = U[:, :r], S[:r], Vh[:r]
    return U if row is None else U / row, S, Vh if col is None else Vh / col


@contextmanager
def drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """torch's default generator seeded from `generator` for a while: for functions that take none."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
