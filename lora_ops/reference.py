"""The meaning of every operator, in eager PyTorch: the oracle of the tests, and what runs where there is no kernel.

Shapes, row-major as in PyTorch: x (M, K), weight (N, K) frozen, lora_A (r, K), lora_B (N, r), bias (N,).

    S = drop(x) Aᵀ                              y = x W0ᵀ + scaling · S Bᵀ + bias

    dS = scaling · dy B                         dx = dy W0 + drop'(dS A)
    dA = dSᵀ drop(x)      dB = scaling · dyᵀ S        dbias = Σ_rows dy

drop(x) = x ∘ keep / (1 - p), and drop' is the same mask and factor. Nothing here is fast, and nothing is clever.
"""

import torch
from torch import Tensor

_PHILOX_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit numbers, in int64 arithmetic that never overflows."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011). Counter words and results are int64 tensors holding 32-bit numbers."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        hi0, lo0 = _multiply(c0, _PHILOX_MULTIPLIER[0])
        hi1, lo1 = _multiply(c2, _PHILOX_MULTIPLIER[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _LOW, (k1 + _PHILOX_WEYL[1]) & _LOW
    return c0, c1, c2, c3


def dropout_threshold(p: float) -> int:
    """Of 65536 equally likely 16-bit numbers, how many drop an element."""
    return min(round(p * 65536), 65535)


def dropout_keep(seed: Tensor, p: float, M: int, K: int) -> Tensor:
    """(M, K) bool: which elements of x survive. Element (m, k) owns 16 bits of the counter

    (16 · (k // 128) + (k % 32) // 2,  m,  m >> 32,  0): half k % 2 of output word (k % 128) // 32, as in csrc/philox.h.
    """
    device = seed.device
    k = torch.arange(K, device=device)
    row = torch.arange(M, device=device).unsqueeze(1)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox((16 * (k // 128) + (k % 32) // 2, row & _LOW, row >> 32, zero), int(seed))
    word = torch.stack([w.expand(M, K) for w in words]).gather(0, ((k % 128) // 32).expand(1, M, K))[0]
    bits = torch.where(k % 2 == 1, word >> 16, word) & 0xFFFF
    return bits >= dropout_threshold(p)


def _dropped(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    if seed is None:
        return x
    keep = dropout_keep(seed, p, x.shape[0], x.shape[1])
    return x * keep / (1 - p)


def _wide(*tensors: Tensor | None) -> list[Tensor]:
    """Accumulation is fp32; fp64 stays fp64, which is how this file serves as the oracle."""
    return [t if t is None or t.dtype == torch.float64 else t.float() for t in tensors]  # type: ignore[misc]


def lora_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y (M, N) in x's dtype and S (M, r) in fp32 (fp64 for fp64 inputs)."""
    wx, W, A, B, b = _wide(x, weight, lora_A, lora_B, bias)
    S = _dropped(wx, seed, dropout_p) @ A.T
    y = wx @ W.T + scaling * (S @ B.T)
    if b is not None:
        y = y + b
    return y.to(x.dtype), S


def lora_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    need: tuple[bool, bool, bool, bool] = (True, True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dA, dB, dbias, each only if `need` asks for it: dx and dbias in dy's dtype, dA and dB in their own.

    x is needed for dA alone, S for dB alone.
    """
    g, W, A, B = _wide(dy, weight, lora_A, lora_B)
    need_dx, need_dA, need_dB, need_dbias = need
    dx = dA = dB = dbias = None
    if need_dx or need_dA:
        dS = scaling * (g @ B)
    if need_dx:
        dx = (g @ W + _dropped(dS @ A, seed, dropout_p)).to(dy.dtype)
    if need_dA:
        assert x is not None
        (wx,) = _wide(x)
        dA = (dS.T @ _dropped(wx, seed, dropout_p)).to(lora_A.dtype)
    if need_dB:
        assert S is not None
        dB = (scaling * (g.T @ S)).to(lora_B.dtype)
    if need_dbias:
        dbias = g.sum(0).to(dy.dtype)
    return dx, dA, dB, dbias
