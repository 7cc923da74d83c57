"""Gates learned on other data than A and B: BiLoRA and AutoLoRA."""

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..registry import method
from ..training import TrainingMethod, low_rank_paths
from .bilevel import Bilevel, Loss
from .regularizers import Regularizer, binary_entropy, orthogonality


class _Softmax(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values.softmax(-1)


GATES: dict[str, type[nn.Module] | None] = {"real": None, "softmax": _Softmax, "sigmoid": nn.Sigmoid}


@method(
    "BiLoRA",
    equation="min over Λ of L(D₂; P*, Q*, Λ) + γ₂ H(Λ), P*, Q* = argmin of L(D₁; P, Q, Λ) + γ₁ (‖P Pᵀ - I‖, ‖Qᵀ Q - I‖)",
    use="method = methods.bilora(model, lambda: model(x).square().mean(), lambda: model(x).abs().mean())",
    changes="PL",
    source="Qiang et al. 2024, https://arxiv.org/abs/2403.13037",
    test="test_bilevel.py::test_hypergradient_is_the_exact_one",
)
def bilora(
    model: nn.Module,
    train_loss: Loss,
    validation_loss: Loss,
    *,
    gate: str = "real",
    unroll_lr: float = 0.0,
    orthogonality_weight: float = 0.1,
    entropy_weight: float = 0.0,
) -> TrainingMethod:
    """The gates follow the gradient of the validation loss through one step of A and B on the training loss; A and B follow the
    training loss, which the user's backward has taken.

    Args:
        model: gated paths. Make the optimiser of its parameters after this call.
        train_loss, validation_loss: of the present batch of each half of the data, as often as they are called.
        gate: the gate is "real", or the "softmax" or "sigmoid" of what trains.
        unroll_lr: learning rate of that step of A and B; 0: alternating descent.
        orthogonality_weight: γ₁.
        entropy_weight: γ₂ of `binary_entropy`, which makes "sigmoid" or "softmax" gates nearly 0 or 1.

    Raises:
        ValueError: no gated path, another gate, or an entropy of gates that are "real".
    """
    if gate not in GATES:
        raise ValueError(f"gate must be one of {', '.join(GATES)}, got {gate!r}")
    if entropy_weight and gate == "real":
        raise ValueError(f'entropy_weight must be 0 for "real" gates, which are no shares of 1, got {entropy_weight}')
    paths, transform = low_rank_paths(model, gated=True), GATES[gate]
    outer = []
    for path in paths:
        provider = path.layer.factors
        if transform is not None:
            parametrize.register_parametrization(provider, "gate", transform())
        outer.append(provider.gate if transform is None else provider.parametrizations.gate.original)
    inner = [p for path in paths for p in (path.lora_A, path.lora_B)]

    def outer_loss() -> Tensor:
        gates = [path.gate for path in paths if path.gate is not None]
        return validation_loss() + entropy_weight * binary_entropy(gates) if entropy_weight else validation_loss()

    return TrainingMethod(
        Regularizer(orthogonality_weight, lambda: orthogonality(paths)),
        Bilevel(outer, inner, train_loss, outer_loss, unroll_lr),
    )


@method(
    "AutoLoRA",
    equation="ΔW = s Σ softmax(α)_k b_k a_kᵀ, α on validation data; ranks with softmax(α)_k >= 1 / r stay",
    use="method = methods.autolora(model, lambda: model(x).square().mean(), lambda: model(x).abs().mean())",
    changes="PL",
    source="Zhang et al. 2024, https://arxiv.org/abs/2403.09113",
    test="test_bilevel.py::test_autolora_finds_ranks",
)
def autolora(model: nn.Module, train_loss: Loss, validation_loss: Loss, *, unroll_lr: float = 3e-4) -> TrainingMethod:
    """`bilora` with softmax gates, equal at first, and no regulariser. Then read `autolora_ranks` and train plain LoRA of them
    from the start.

    Raises:
        ValueError: no gated path.
    """
    found = bilora(model, train_loss, validation_loss, gate="softmax", unroll_lr=unroll_lr, orthogonality_weight=0.0)
    for path in low_rank_paths(model, gated=True):
        nn.init.ones_(path.layer.factors.parametrizations.gate.original)
    return found


def autolora_ranks(model: nn.Module) -> dict[str, int]:
    """How many of each path's gates are at least 1 / r, one at the least, by the layer's name: a `rank_pattern`.

    Raises:
        ValueError: no gated path.
    """
    gates = {path.name: path.gate for path in low_rank_paths(model, gated=True)}
    return {name: max(1, int((g >= 1 / len(g)).sum())) for name, g in gates.items() if g is not None}
