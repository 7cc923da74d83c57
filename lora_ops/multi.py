"""Mixed batches: every row of a batch with an adapter of its own, in one call."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import multi_ops, qlora_ops
from .autograd import check_frozen
from .functional import _draw_seed, autocast_dtype
from .quant import NF4Weight
from .registry import method


class AdapterBank:
    """Any number of adapters of one layer by name: lora_A (r, K), lora_B (N, r) and a scaling each, every rank its own.

    Tensors are kept as they are, not copied: what trains them elsewhere trains them here. An adapter's index is its place; it
    stays its own until it is removed, when the next one added gets it. What lies in the bank and does not occur in a batch
    costs no time.
    """

    def __init__(self) -> None:
        self._index: dict[str, int] = {}
        self._A: list[Tensor | None] = []
        self._B: list[Tensor | None] = []
        self._scalings = torch.empty(0, dtype=torch.float64)
        self._free: list[int] = []

    @classmethod
    def _of(cls, adapters: Mapping[str, tuple[Tensor, Tensor, float]]) -> "AdapterBank":
        """Of lora_A, lora_B and scaling by name, unchecked: every call checks the adapters that occur in it."""
        bank = cls()
        bank._index = {name: i for i, name in enumerate(adapters)}
        bank._A, bank._B = [A for A, _, _ in adapters.values()], [B for _, B, _ in adapters.values()]
        bank._scalings = torch.tensor([scaling for _, _, scaling in adapters.values()], dtype=torch.float64)
        return bank

    @property
    def names(self) -> list[str]:
        return list(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def index(self, name: str) -> int:
        """What stands for the adapter in a tensor of adapter_ids. Raises ValueError for a name that is not in the bank."""
        if name not in self._index:
            raise ValueError(f"adapter_ids: there is no adapter {name!r}, only {self.names}")
        return self._index[name]

    def add(self, name: str, lora_A: Tensor, lora_B: Tensor, scaling: float) -> int:
        """Puts an adapter in and returns its index.

        Raises:
            ValueError: a name that is taken, a shape or device that does not fit, a scaling that is not finite.
            TypeError: lora_A and lora_B of two dtypes, or of no floating one.
        """
        if name in self._index:
            raise ValueError(f"name {name!r} is taken; remove it first")
        if lora_A.dim() != 2 or lora_A.shape[0] < 1:
            raise ValueError(f"lora_A must be (r, K) with r >= 1, got shape {tuple(lora_A.shape)}")
        r = lora_A.shape[0]
        if lora_B.dim() != 2 or lora_B.shape[1] != r:
            raise ValueError(f"lora_B must be (N, r) with r = {r} as in lora_A, got shape {tuple(lora_B.shape)}")
        if lora_A.dtype != lora_B.dtype or not lora_A.dtype.is_floating_point:
            raise TypeError(f"lora_A and lora_B must have one floating dtype, got {lora_A.dtype} and {lora_B.dtype}")
        if lora_A.device != lora_B.device:
            raise ValueError(f"lora_B must be on lora_A's device {lora_A.device}, got {lora_B.device}")
        if not math.isfinite(scaling):
            raise ValueError(f"scaling must be finite, got {scaling}")
        for A, B in zip(self._A, self._B, strict=True):
            if A is None or B is None:
                continue
            if (lora_A.shape[1], lora_B.shape[0]) != (A.shape[1], B.shape[0]):
                there, here = (A.shape[1], B.shape[0]), (lora_A.shape[1], lora_B.shape[0])
                raise ValueError(f"lora_A and lora_B must have (K, N) = {there} as the others in the bank, got {here}")
            break
        if self._free:
            place = self._free.pop()
        else:
            place = len(self._A)
            self._A.append(None)
            self._B.append(None)
            self._scalings = torch.cat([self._scalings, self._scalings.new_zeros(1)])
        self._A[place], self._B[place] = lora_A, lora_B
        self._scalings[place] = scaling
        self._index[name] = place
        return place

    def remove(self, name: str) -> None:
        """Takes an adapter out; the others keep their indices. Raises ValueError for a name that is not in the bank."""
        place = self.index(name)
        self._A[place] = self._B[place] = None
        self._free.append(place)
        del self._index[name]

    def _occurring(self, ids: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """A, B and scaling of the adapters that occur, and ids as their places among them."""
        distinct, place = torch.unique(ids, return_inverse=True)
        occur = distinct.tolist()
        without = occur[:1] == [-1]
        if without:
            occur, distinct = occur[1:], distinct[1:]
        if occur and occur[0] < 0:
            raise ValueError(f"adapter_ids must be -1 or the index of an adapter, got {occur[0]}")
        if occur and occur[-1] >= len(self._A):
            raise ValueError(f"adapter_ids must be -1 or the index of an adapter, below {len(self._A)}, got {occur[-1]}")
        A, B = [self._A[i] for i in occur], [self._B[i] for i in occur]
        if any(a is None for a in A):
            raise ValueError(f"adapter_ids has {next(i for i in occur if self._A[i] is None)}, whose adapter was removed")
        return A, B, self._scalings[distinct.to(self._scalings.device)], place - 1 if without else place

    def _all(self, ids: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """The same for all adapters: what a compiled graph is given must not depend on ids."""
        places = [i for i, A in enumerate(self._A) if A is not None]
        A, B = [self._A[i] for i in places], [self._B[i] for i in places]
        if len(places) == len(self._A):
            return A, B, self._scalings, ids  # type: ignore[return-value]
        place = torch.full((len(self._A) + 1,), len(places), device=ids.device)  # of one removed: no adapter's index
        place[places] = torch.arange(len(places), device=ids.device)
        place[-1] = -1
        return A, B, self._scalings[places], place[ids]  # type: ignore[return-value]


@method(
    "Mixed batch",
    equation="y_n = x_n W0ᵀ + s_i (x_n A_iᵀ) B_iᵀ + bias, i the adapter of row n, or none",
    use='multi_lora_linear(x, linear.weight, bank, ["law", None, "chemistry"])',
    changes="C",
    source="Punica: Chen et al. 2023, https://arxiv.org/abs/2310.18547; S-LoRA: Sheng et al. 2023, https://arxiv.org/abs/2311.03285",
    test="test_multi_lora.py::test_is_one_stacked_adapter_with_one_hot_gates",
)
def multi_lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    bank: AdapterBank,
    adapter_ids: Tensor | Sequence[str | int | None],
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """A frozen linear layer whose rows have an adapter each: y_n = x_n W0ᵀ + s_i (drop(x_n) A_iᵀ) B_iᵀ + bias, i = id of row n.

    Batches over adapters: Chen et al., "Punica: Multi-Tenant LoRA Serving", MLSys 2024 (https://arxiv.org/abs/2310.18547). Rows
    are not sorted, nothing is packed or copied per adapter, and no row waits for another's rank. The backward computes

        dS_n = s_i dy_n B_i       dx_n = dy_n W0 + drop'(dS_n A_i)       dA_i = Σ dS_nᵀ drop(x_n)       dB_i = s_i Σ dy_nᵀ S_n

    over the rows n of each adapter i. An adapter that does not occur gets no gradient (compiled by torch.compile: zeros).

    Args:
        x: (..., K), float32, bfloat16 or float16 (float64 runs the reference), any strides.
        weight: W0, (N, K), as in `lora_linear`, or an NF4Weight.
        bank: the adapters, in x's dtype, or float32 under a half-precision x; all that occur in one dtype.
        adapter_ids: which adapter each row has: indices (`bank.index`) as an int64 tensor whose shape is a leading part of
            x.shape[:-1] (per row, or per sequence), -1 for none; or a list of as many names, indices or None.
        bias, dropout_p, training: as in `lora_linear`.

    Returns:
        (..., N) in x's dtype; under `torch.autocast`, in the dtype that `F.linear` would return.

    Raises:
        ValueError: a shape, device, id or dropout_p that does not fit, or a weight that requires grad.
        TypeError: a dtype that does not fit.
    """
    if not isinstance(weight, NF4Weight) and torch.is_grad_enabled():
        check_frozen(weight)
    if len(weight.shape) != 2:
        raise ValueError(f"weight must be (N, K), got shape {tuple(weight.shape)}")
    K = weight.shape[1]
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"x must be (..., K) with K = {K} as in weight {tuple(weight.shape)}, got shape {tuple(x.shape)}")
    ids = _row_ids(x, bank, adapter_ids)
    unread = torch.compiler.is_compiling() or ids.is_meta
    As, Bs, scalings, ids = bank._all(ids) if unread else bank._occurring(ids)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, bias = x.to(dtype), bias if bias is None or bias.dtype == torch.float32 else bias.to(dtype)
        As, Bs = ([t if t.dtype in (dtype, torch.float32) else t.to(dtype) for t in ts] for ts in (As, Bs))
        if isinstance(weight, Tensor) and weight.dtype not in (dtype, torch.float32):
            weight = weight.to(dtype)
    tensors, blocksize, quant_type = qlora_ops.operand_of(weight)
    operand = tensors, K, blocksize, quant_type
    seed = None
    if training and dropout_p != 0.0:
        multi_ops.check(x, *operand, As, Bs, scalings, ids, bias, dropout_p)  # before the generator moves
        seed = _draw_seed(x)
    y, _ = multi_ops.multi_lora_forward(x, *operand, As, Bs, scalings, ids, bias, seed, float(dropout_p))
    return y


def _row_ids(x: Tensor, bank: AdapterBank, adapter_ids: Tensor | Sequence[str | int | None]) -> Tensor:
    """An index for each row of x, (rows,) int64."""
    if not isinstance(adapter_ids, Tensor):
        indices = [-1 if i is None else bank.index(i) if isinstance(i, str) else i for i in adapter_ids]
        adapter_ids = torch.tensor(indices, dtype=torch.int64, device=x.device)
    if adapter_ids.dtype != torch.int64:
        raise TypeError(f"adapter_ids must be int64, got {adapter_ids.dtype}")
    if adapter_ids.device != x.device:
        raise ValueError(f"adapter_ids must be on x's device {x.device}, got {adapter_ids.device}")
    rows, given = x.shape[:-1], adapter_ids.shape
    if given != rows[: len(given)]:
        raise ValueError(f"adapter_ids must have a leading part of x's shape {tuple(rows)} without K, got shape {tuple(given)}")
    if len(given) == len(rows) == 1:
        return adapter_ids
    return adapter_ids.reshape((*given, *(1,) * (len(rows) - len(given)))).expand(rows).reshape(-1)
