"""Adapters chosen by whose training data an input is near to: by cosines to centroids, or by the nearest prototype."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import method
from .routing import mean_hidden_state


@method(
    "Token-Level Adaptation",
    equation="g = softmax(c), c_k = cos(embedding of the tokens so far, centroid_k), the largest c_k times 4",
    use='compose.add_router(model, ["law", "chemistry"], compose.CentroidRouter(centroids))',
    changes="C",
    source="Belofsky 2023, https://arxiv.org/abs/2311.10847",
    test="test_centroids.py::test_token_level_weights",
    note="The official code merges by PEFT's `linear`, whose cross terms make it another sum. Where every cosine is negative, "
    "the factor 4 gives the nearest adapter the smallest weight.",
)
class CentroidRouter(nn.Module):
    """g = softmax(c) of a sequence, c_k = cos(e, centroid_k), after the largest c_k is multiplied by `temperature`.

    Token-Level Adaptation: Belofsky 2023 (https://arxiv.org/abs/2311.10847). e is an embedding of the tokens so far; `generate`
    with `use_cache=False` weighs the adapters anew for every token.

    Args:
        centroids: (n, d), the mean embedding of each adapter's training data.
        temperature: of the largest cosine alone.
        embed: `embed(model, *args, **kwargs)`, with the arguments of the model's forward, returns (batch, d). None: the mean of
            the frozen model's last hidden state.

    Raises:
        ValueError: centroids that are no matrix.
    """

    centroids: Tensor

    def __init__(self, centroids: Tensor, temperature: float = 4.0, embed: Callable[..., Tensor] = mean_hidden_state) -> None:
        if centroids.dim() != 2:
            raise ValueError(f"centroids must be (adapters, d), got shape {tuple(centroids.shape)}")
        super().__init__()
        self.register_buffer("centroids", centroids)
        self.temperature, self.embed = temperature, embed

    def forward(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return self.weights(self.embed(model, *args, **kwargs))[:, None]

    def weights(self, embeddings: Tensor) -> Tensor:
        """(..., n) of embeddings (..., d)."""
        cosines = F.cosine_similarity(embeddings[..., None, :].to(self.centroids.dtype), self.centroids, dim=-1)
        largest = cosines.argmax(-1, keepdim=True)
        return cosines.scatter(-1, largest, self.temperature * cosines.gather(-1, largest)).softmax(-1)


@method(
    "CoLoR",
    equation="W = W0 + s B_k A_k, k the adapter that has the prototype nearest to the input's features",
    use='compose.add_router(model, ["law", "chemistry"], compose.PrototypeRouter([compose.kmeans(x, 5) for x in inputs]))',
    changes="C",
    source="Wistuba et al. 2023, https://arxiv.org/abs/2311.17601",
    test="test_centroids.py::test_prototypes_choose_as_a_mixed_batch",
)
class PrototypeRouter(nn.Module):
    """A gate of one 1 for each sequence, at the adapter whose prototypes hold the nearest to its features.

    CoLoR: Wistuba et al., "Continual Learning with Low Rank Adaptation", 2023 (https://arxiv.org/abs/2311.17601). Every task
    has an adapter and, by `kmeans` of the frozen model's features of its data, prototypes; inputs need not name their task.

    Args:
        prototypes: (k_i, d) of each adapter.
        features: `features(model, *args, **kwargs)` returns (batch, d), as `embed` of `CentroidRouter`.

    Raises:
        ValueError: prototypes that are no matrices of one width.
    """

    prototypes: Tensor
    adapter_of: Tensor

    def __init__(self, prototypes: Sequence[Tensor], features: Callable[..., Tensor] = mean_hidden_state) -> None:
        if not prototypes or any(p.dim() != 2 or p.shape[1] != prototypes[0].shape[-1] for p in prototypes):
            raise ValueError(f"prototypes must be (k, d) of one d, got {[tuple(p.shape) for p in prototypes]}")
        super().__init__()
        self.register_buffer("prototypes", torch.cat(list(prototypes)))
        owners = [torch.full((len(p),), i, device=p.device) for i, p in enumerate(prototypes)]
        self.register_buffer("adapter_of", torch.cat(owners))
        self.adapters, self.features = len(prototypes), features

    def forward(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        chosen = self.select(self.features(model, *args, **kwargs))
        return F.one_hot(chosen, self.adapters).to(self.prototypes.dtype)[:, None]

    def select(self, features: Tensor) -> Tensor:
        """The index of the nearest prototype's adapter, (batch,), of features (batch, d)."""
        distances = torch.cdist(features.to(self.prototypes.dtype), self.prototypes)
        return self.adapter_of[distances.argmin(-1)]


@torch.no_grad()
def kmeans(features: Tensor, k: int, *, iterations: int = 50, generator: torch.Generator | None = None) -> Tensor:
    """k centres of features (n, d) by Lloyd's iteration from k-means++ seeds (Arthur and Vassilvitskii 2007), (k, d).

    Raises:
        ValueError: k is not in [1, n].
    """
    n = features.shape[0]
    if not 1 <= k <= n:
        raise ValueError(f"k must be in [1, {n}], the number of features, got {k}")
    centres = features[torch.randint(n, (1,), generator=generator)]
    for _ in range(k - 1):
        squares = torch.cdist(features, centres).min(-1).values.square()
        squares = squares if squares.sum() > 0 else torch.ones_like(squares)  # all of them are centres
        centres = torch.cat([centres, features[squares.multinomial(1, generator=generator)]])
    for _ in range(iterations):
        owner = torch.cdist(features, centres).argmin(-1)
        counts = torch.bincount(owner, minlength=k)
        means = torch.zeros_like(centres).index_add(0, owner, features) / counts.clamp(min=1)[:, None]
        moved = torch.where(counts[:, None] > 0, means, centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres
