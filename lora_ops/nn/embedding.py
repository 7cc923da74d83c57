"""FusedLoraEmbedding: an embedding and its adapters."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from .. import log
from ..embedding import add_low_rank
from ..registry import method
from .dense import DenseAdapters
from .settings import AdapterOptions, check_adapter_name


@method(
    "LoRA of embeddings",
    equation="y = E[id] + s A[:, id]ᵀ Bᵀ, A = 0 and B normal at first",
    use='add_lora(model, LoraConfig(target_modules=["embed_tokens"]))',
    changes="P",
    source="Hu et al. 2021, https://arxiv.org/abs/2106.09685; microsoft/LoRA",
    test="test_embedding.py::test_merging_is_exact_and_leaves_who_shares_the_weight_alone",
)
class FusedLoraEmbedding(DenseAdapters):
    """Drop-in for `nn.Embedding` with a trainable low-rank update: y = W0[ids] + scaling · (Aᵀ)[ids] Bᵀ, times `embed_scale`.

    Parameters: `weight` (V, N), frozen; `lora_embedding_A[name]` (r, V) and `lora_embedding_B[name]` (N, r), PEFT's names,
    trainable; `lora_A` and `lora_B` are the same. Rows of A and W0 are looked up, and one product adds the low-rank term: ΔW
    = (B A)ᵀ is never formed. `padding_idx`, `max_norm`, `norm_type` and `scale_grad_by_freq` act on the rows of Aᵀ as they do
    on those of the weight, as in PEFT: the gradient of A's column `padding_idx` is zero, and with `max_norm` the
    columns of A that are looked up are scaled down to it. Gradients are dense with `sparse`, too (in PEFT the backward fails
    then). Dropout does not act on an embedding, as in PEFT.

    Args:
        num_embeddings, embedding_dim: V and N.
        r, lora_alpha, use_rslora, adapter_dtype: see `FusedLoraLinear`.
        lora_dropout: is kept, and has no effect.
        padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse: see `nn.Embedding`.
        init_lora_weights: True or "gaussian" (A zero, B normal: the layer starts as W0), or False (both normal).
        device, dtype: of the weight.

    Raises:
        ValueError, TypeError: an argument out of its range, by name.
    """

    _ids = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 8,
        *,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[AdapterOptions],
    ) -> None:
        settings = self._settings(r, options)
        super().__init__()
        of_ids = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        self._wrap(nn.Embedding(num_embeddings, embedding_dim, *of_ids, device=device, dtype=dtype))
        self._new_adapter("default", settings)
        self.active_adapters = ["default"]

    @classmethod
    def from_embedding(
        cls, embedding: nn.Module, r: int = 8, *, adapter_name: str = "default", **options: Unpack[AdapterOptions]
    ) -> Self:
        """Wraps an `nn.Embedding`, sharing its weight, which is frozen: nothing is copied.

        transformers' embeddings that scale what they return (`embed_scale`: Gemma 3, BART, ...) are taken, too: the low-rank
        term is scaled as well.

        Raises:
            TypeError: another kind of layer.
            ValueError: an argument out of its range, by name.
        """
        settings = cls._settings(r, options)
        check_adapter_name(adapter_name)
        if not is_embedding(embedding):
            raise TypeError(f"embedding must be an nn.Embedding with its own forward, got {type(embedding).__name__}")
        return cls._around(embedding, adapter_name, settings)

    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool
    sparse: bool

    def _wrap(self, embedding: Any) -> None:
        self.num_embeddings = self.in_features = embedding.num_embeddings
        self.embedding_dim = self.out_features = embedding.embedding_dim
        for name in self._ids:
            setattr(self, name, getattr(embedding, name))
        self._setup(embedding.weight, None)
        scale = getattr(embedding, "embed_scale", None)
        if isinstance(scale, Tensor):
            self.register_buffer("embed_scale", scale, persistent="embed_scale" not in embedding._non_persistent_buffers_set)
        else:
            self.embed_scale = scale

    def _setup_adapters(self) -> None:
        super()._setup_adapters()
        self.lora_embedding_A, self.lora_embedding_B = (self._modules.pop(name) for name in ("lora_A", "lora_B"))

    @property
    def lora_A(self) -> nn.ParameterDict:  # type: ignore[override]
        return self.lora_embedding_A  # type: ignore[return-value]

    @property
    def lora_B(self) -> nn.ParameterDict:  # type: ignore[override]
        return self.lora_embedding_B  # type: ignore[return-value]

    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str = "default", init_lora_weights: bool | str = True) -> None:
        """Initialises A and B anew (see `init_lora_weights` of the layer)."""
        A, B = self.lora_A[adapter_name], self.lora_B[adapter_name]
        if A.is_meta:
            return
        nn.init.normal_(B)
        if init_lora_weights is False:
            nn.init.normal_(A)
        else:
            nn.init.zeros_(A)

    def forward(self, ids: Tensor) -> Tensor:
        y = self._lookup(ids, self.weight)
        scale = self.embed_scale
        if scale is not None:
            y = y * (scale.to(self.weight.dtype) if isinstance(scale, Tensor) else scale)
        if self._is_frozen_layer:
            return y
        if log.ON:
            log.say("lookups and one product for each adapter, by torch")
        names = self.active_adapters
        looked_up = [self._lookup(ids, self.lora_A[name].T) for name in names]
        return add_low_rank(y, looked_up, [self.lora_B[name] for name in names], [self.scaling[name] for name in names], scale)

    def _lookup(self, ids: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(ids, weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq)

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        return (B @ A).T

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._merged_repr()}"


def is_embedding(module: nn.Module) -> bool:
    """Whether it is an nn.Embedding that does what its class says, or, known by its name, one of transformers' that scale."""
    if not isinstance(module, nn.Embedding) or "forward" in vars(module):
        return False
    scales = type(module).__name__.endswith("ScaledWordEmbedding") and hasattr(module, "embed_scale")
    return scales or (type(module).forward is nn.Embedding.forward and not hasattr(module, "embed_scale"))
