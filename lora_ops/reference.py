"""The meaning of every operator, in eager PyTorch: the oracle of the tests, and what runs where there is no kernel.

Shapes, row-major as in PyTorch: x (M, K), weight (N, K) frozen, lora_A (r, K), lora_B (N, r), bias (N,).

    S = drop(x) Aᵀ                              y = x W0ᵀ + scaling · S Bᵀ + bias

    dS = scaling · dy B                         dx = dy W0 + drop'(dS A)
    dA = dSᵀ drop(x)      dB = scaling · dyᵀ S        dbias = Σ_rows dy

drop(x) = x ∘ keep / (1 - p), and drop' is the same mask and factor. Nothing here is fast, and nothing is clever.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_PHILOX_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit numbers, in int64 arithmetic that never overflows."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


def dropout_bits(seed: Tensor, M: int, K: int) -> Tensor:
    """(M, K) int64: the 16 random bits of each element of x. Element (m, k) owns those of the counter

    (16 · (k // 128) + (k % 32) // 2,  m,  m >> 32,  0): half k % 2 of output word (k % 128) // 32, as in csrc/philox.h.
    """
    device = seed.device
    k = torch.arange(K, device=device)
    row = torch.arange(M, device=device).unsqueeze(1)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox((16 * (k // 128) + (k % 32) // 2, row & _LOW, row >> 32, zero), seed)
    word = torch.stack([w.expand(M, K) for w in words]).gather(0, ((k % 128) // 32).expand(1, M, K))[0]
    return torch.where(k % 2 == 1, word >> 16, word) & 0xFFFF


def dropout_keep(seed: Tensor, p: float, M: int, K: int) -> Tensor:
    """(M, K) bool: which elements of x survive."""
    return dropout_bits(seed, M, K) >= dropout_threshold(p)


def _dropped(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    if seed is None:
        return x
    keep = dropout_keep(seed, p, x.shape[0], x.shape[1])
    return x * keep / (1 - p)


def _wide(*tensors: Tensor | None) -> list[Tensor]:
    """Accumulation is fp32; fp64 stays fp64, which is how this file serves as the oracle."""
    return [t if t is None or t.dtype == torch.float64 else t.float() for t in tensors]  # type: ignore[misc]


def _in_its_own_dtypes(fn: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Autocast has acted on an operator's arguments; it must not round what happens inside."""

    @functools.wraps(fn)
    def called(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        device = args[0].device.type  # type: ignore[attr-defined]
        if not torch.amp.is_autocast_available(device):
            return fn(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return fn(*args, **kwargs)

    return called


@_in_its_own_dtypes
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
    y = F.linear(wx, W, b) + scaling * (S @ B.T)
    return y.to(x.dtype), S


@_in_its_own_dtypes
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
    """dx, dA, dB, dbias, each only if `need` asks for it: dx in dy's dtype, dA and dB in their own,
    dbias in fp32 (fp64 for fp64): a bias may be fp32 beside a half-precision x.

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
        dbias = g.sum(0).to(torch.promote_types(dy.dtype, torch.float32))
    return dx, dA, dB, dbias


# --- the general form: factors between A and B, and behind the product --------------------------------------------------


def _times(a: Tensor, b: Tensor | None) -> Tensor:
    return a if b is None else a * b


@_in_its_own_dtypes
def lora_general_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    core: Tensor | None,
    out_scale: Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = out_scale ∘ (x W0ᵀ + scaling · ((S ∘ gate) core) Bᵀ) + bias; S = drop(x) Aᵀ; z, in x's dtype, is what out_scale
    multiplies, in half precision x W0ᵀ alone: then no more is rounded than eager PyTorch rounds.

    gate is (r,) or (M, r), core (r, r), out_scale (N,).
    """
    wx, W, A, B, b, g, R, m = _wide(x, weight, lora_A, lora_B, bias, gate, core, out_scale)
    S = _dropped(wx, seed, dropout_p) @ A.T
    S1 = _times(S, g)
    S2 = S1 if R is None else S1 @ R
    base, tail = wx @ W.T, scaling * (S2 @ B.T)
    y = _times(base + tail, m)
    if b is not None:
        y = y + b
    return y.to(x.dtype), S, (base if x.dtype.itemsize == 2 else base + tail).to(x.dtype)


@_in_its_own_dtypes
def lora_general_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gate: Tensor | None,
    core: Tensor | None,
    out_scale: Tensor | None,
    S: Tensor | None,
    z: Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    need: tuple[bool, ...] = (True,) * 7,
) -> list[Tensor | None]:
    """dx, dA, dB, dbias, dgate, dcore, dout_scale, each only if `need` asks for it, the last four in fp32 at least.

        dz = dy ∘ out_scale       dS2 = scaling · dz B      dS1 = dS2 coreᵀ           dS = dS1 ∘ gate
        dx = dz W0 + drop'(dS A)  dA = dSᵀ drop(x)          dB = scaling · dzᵀ S2     dbias = Σ_rows dy
        dgate = dS1 ∘ S           dcore = S1ᵀ dS2           dout_scale = Σ_rows dy ∘ z

    x is needed for dA alone, z for dout_scale alone, S for dB, dgate, dcore and dout_scale. dgate of a gate (r,) is summed over
    the rows.
    """
    wdy, W, A, B, g, R, m = _wide(dy, weight, lora_A, lora_B, gate, core, out_scale)
    need_dx, need_dA, need_dB, need_dbias, need_dgate, need_dcore, need_dout_scale = need
    grads: list[Tensor | None] = [None] * 7
    dz = _times(wdy, m)
    dS2 = scaling * (dz @ B)
    dS1 = dS2 if R is None else dS2 @ R.T
    dS = _times(dS1, g)
    if need_dx:
        grads[0] = (dz @ W + _dropped(dS @ A, seed, dropout_p)).to(dy.dtype)
    if need_dA:
        assert x is not None
        grads[1] = (dS.T @ _dropped(_wide(x)[0], seed, dropout_p)).to(lora_A.dtype)
    if need_dB or need_dcore or need_dout_scale:
        assert S is not None
        S1 = _times(S, g)
        S2 = S1 if R is None else S1 @ R
    if need_dB:
        grads[2] = (scaling * (dz.T @ S2)).to(lora_B.dtype)
    if need_dbias:
        grads[3] = wdy.sum(0)
    if need_dgate:
        assert S is not None and gate is not None
        grads[4] = (dS1 * S).sum(0) if gate.dim() == 1 else dS1 * S
    if need_dcore:
        grads[5] = S1.T @ dS2
    if need_dout_scale:
        assert z is not None
        grads[6] = (wdy * (z + scaling * (S2 @ B.T) if dy.dtype.itemsize == 2 else z)).sum(0)
    return grads


# --- an adapter for each row ------------------------------------------------------------------------------------------


@_in_its_own_dtypes
def multi_lora_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scalings: list[float],
    adapter_ids: Tensor,
    bias: Tensor | None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y (M, N), row n by adapter adapter_ids[n], or by W0 alone where that is -1; S (M, largest r), zeros behind each rank."""
    _check_ids(adapter_ids, len(lora_A))
    wx, W, b = _wide(x, weight, bias)
    dropped = _dropped(wx, seed, dropout_p)
    r = max((A.shape[0] for A in lora_A), default=0)
    y, S = wx @ W.T, wx.new_zeros(x.shape[0], r)
    if lora_A:  # not in place: under torch.func.vmap the adapters may be many where the rest is one
        rows = [(adapter_ids == i).nonzero()[:, 0] for i in range(len(lora_A))]
        own = [dropped[n] @ _wide(A)[0].T for n, A in zip(rows, lora_A, strict=True)]
        added = [scaling * (t @ _wide(B)[0].T) for t, B, scaling in zip(own, lora_B, scalings, strict=True)]
        y = y.index_add(0, torch.cat(rows), torch.cat(added))
        S = S.index_copy(0, torch.cat(rows), torch.cat([torch.nn.functional.pad(t, (0, r - t.shape[1])) for t in own]))
    if b is not None:
        y = y + b
    return y.to(x.dtype), S


@_in_its_own_dtypes
def multi_lora_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scalings: list[float],
    adapter_ids: Tensor,
    S: Tensor | None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    need: tuple[bool, list[bool], list[bool], bool],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], Tensor | None]:
    """dx, every dA, every dB, dbias, each only if `need` asks for it. An adapter without rows gets zeros."""
    g, W = _wide(dy, weight)
    need_dx, need_dA, need_dB, need_dbias = need
    dx = g @ W if need_dx else None
    through = None if dx is None else torch.zeros_like(dx)
    dropped = None if x is None else _dropped(_wide(x)[0], seed, dropout_p)
    dA: list[Tensor | None] = [None] * len(lora_A)
    dB: list[Tensor | None] = [None] * len(lora_A)
    for i, (A, B) in enumerate(zip(lora_A, lora_B, strict=True)):
        rows = adapter_ids == i
        dS = scalings[i] * (g[rows] @ _wide(B)[0])
        if through is not None:
            through[rows] = dS @ _wide(A)[0]
        if need_dA[i]:
            assert dropped is not None
            dA[i] = (dS.T @ dropped[rows]).to(A.dtype)
        if need_dB[i]:
            assert S is not None
            dB[i] = (scalings[i] * (g[rows].T @ S[rows, : A.shape[0]])).to(B.dtype)
    if dx is not None and through is not None:
        dx = (dx + _dropped(through, seed, dropout_p)).to(dy.dtype)
    return dx, dA, dB, g.sum(0).to(torch.promote_types(dy.dtype, torch.float32)) if need_dbias else None


def _check_ids(adapter_ids: Tensor, count: int) -> None:
    wrong = adapter_ids[(adapter_ids < -1) | (adapter_ids >= count)]
    if wrong.numel():
        raise ValueError(f"adapter_ids must be -1 or the index of an adapter, below {count}, got {int(wrong[0])}")


# --- 4-bit weights ----------------------------------------------------------------------------------------------------
#
# The weight is flattened row by row and cut into blocks, each with one scale: weight = code · absmax. To the last bit what
# bitsandbytes does on a CPU, where that is right. Codes here are one per byte; lora_ops/quant/layout.py packs them.

CODES_4BIT = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    # Code 8 is a second zero, which positive numbers round to.
    "fp4": tuple(sign * v / 12 for sign in (1.0, -1.0) for v in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)),
}  # fmt: skip
NESTED_BLOCKSIZE = 256


def code_4bit(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """The 16 values of "nf4" or "fp4", fp32, indexed by code."""
    return torch.tensor(CODES_4BIT[quant_type], dtype=torch.float32, device=device) + 0.0  # no -0


def _blocks(flat: Tensor, blocksize: int) -> Tensor:
    return torch.nn.functional.pad(flat, (0, -flat.numel() % blocksize)).view(-1, blocksize)


def quantize_4bit(weight: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    """Codes (n,) uint8 of the flattened weight and absmax (ceil(n / blocksize),) fp32.

    The code is the nearest to weight / absmax, the lower one half way between two. NF4: Dettmers et al., "QLoRA: Efficient
    Finetuning of Quantized LLMs", NeurIPS 2023 (https://arxiv.org/abs/2305.14314).
    """
    n = weight.numel()
    blocks = _blocks(weight.detach().float().reshape(-1), blocksize)
    absmax = blocks.abs().amax(1)
    largest = absmax.clamp(min=1e-38)
    scaled = blocks * (1.0 / largest)[:, None]
    if n % blocksize:  # the last, partial block is divided, not multiplied, and its scale is never zero
        scaled[-1], absmax[-1] = blocks[-1] / largest[-1], largest[-1]
    values, ascending = code_4bit(quant_type, weight.device).sort(stable=True)
    codes = ascending[torch.bucketize(scaled.view(-1)[:n], (values[:-1] + values[1:]) / 2)]
    return codes.to(torch.uint8), absmax


def dequantize_4bit(codes: Tensor, absmax: Tensor, blocksize: int, quant_type: str, dtype: torch.dtype) -> Tensor:
    """code · absmax in codes' shape: multiplied in fp32 and rounded once to dtype; in fp64 for float64, exactly."""
    wide = torch.promote_types(dtype, torch.float32)
    value = code_4bit(quant_type, codes.device).to(wide)[codes.long()].view(-1)
    scale = absmax.to(wide).repeat_interleave(blocksize)[: value.numel()]
    return (value * scale).to(dtype).view(codes.shape)


@functools.cache
def nested_code() -> Tensor:
    """The 256 values, ascending, that absmax is quantised to: bitsandbytes' signed dynamic map. 0, 1, and with either sign
    10^(i - 6) times the middles of 2^i equal parts of [0.1, 1], i = 0 ... 6.

    Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", ICLR 2016 (https://arxiv.org/abs/1511.04561).
    """
    positive = []
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1, dtype=torch.float32, device="cpu")
        positive.append(10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2))
    halves = torch.cat(positive)
    return torch.cat([-halves, halves, torch.tensor([0.0, 1.0], device="cpu")]).sort().values


@functools.cache
def _nested_bins() -> Tensor:
    """(65536,) uint8: the code nearest to each of as many equal steps from -1 to 1."""
    code = nested_code()
    steps = 2 * torch.arange(65536, dtype=torch.float32, device="cpu") / 65535 - 1
    return torch.bucketize(steps, (code[:-1] + code[1:]) / 2).to(torch.uint8)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation: codes (blocks,) uint8, their nested_absmax (ceil(blocks / 256),) and offset (), both fp32.

    offset = mean(absmax), on a CPU as one thread sums it: of two equal rows torch gives none to several threads.
    absmax - offset, over its block's largest magnitude, goes to the nearest of 65536 steps and from there to the nearest
    code: not always to the nearest code, but to bitsandbytes'.
    """
    offset = absmax.expand(2, -1).mean(1)[0].clone() if absmax.is_cpu else absmax.mean()
    blocks = _blocks(absmax - offset, NESTED_BLOCKSIZE)
    nested_absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / nested_absmax)[:, None]).clamp(-1, 1)
    step = ((scaled + 1) * 0.5 * 65535 + 0.5).nan_to_num(0.0).int()  # NaN: 0 / 0, a block of zeros
    codes = _nested_bins().to(absmax.device)[step.view(-1)[: absmax.numel()]]
    return codes, nested_absmax, offset


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, code: Tensor, offset: Tensor) -> Tensor:
    """absmax (blocks,) fp32 = code[codes] · nested_absmax + offset, rounded after each of the two operations."""
    scale = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: codes.numel()]
    return code[codes.long()] * scale + offset
