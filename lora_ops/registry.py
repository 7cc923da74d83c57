"""Every method of the LoRA family that the package has, declared where its code is: the source of docs/methods.md."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

CHANGES = {
    "I": "initialisation",
    "O": "optimiser",
    "P": "parametrisation of the low-rank path",
    "L": "training loop",
    "D": "calibrated on data",
    "Q": "quantiser",
    "C": "composition at inference",
}


@dataclass(frozen=True)
class Method:
    """One system of the family.

    name: as its authors call it, unique. equation: one line, in PyTorch's layouts. use: one line of code. changes: letters of
    `CHANGES`. source: paper or code. test: "file::test", beneath tests/, of what identifies the method. note: what was found
    wrong in a text or in official code, or "". code: what implements it.
    """

    name: str
    equation: str
    use: str
    changes: str
    source: str
    test: str
    note: str
    code: Any


_METHODS: dict[str, Method] = {}


def method(name: str, *, equation: str, use: str, changes: str, source: str, test: str, note: str = "") -> Callable[[T], T]:
    """Declares that the decorated function or class is what `name` is here. Several on one object: one for each name."""

    def declare(code: T) -> T:
        if name in _METHODS:
            raise ValueError(f"name {name!r} is declared twice")
        if not changes or set(changes) - set(CHANGES):
            raise ValueError(f"changes must be letters of {''.join(CHANGES)}, got {changes!r}")
        _METHODS[name] = Method(name, equation, use, changes, source, test, note, code)
        return code

    return declare


def methods() -> dict[str, Method]:
    """All of them, by name."""
    return dict(_METHODS)


# Systems that the package leaves out on purpose, and why.
BY_DESIGN = {
    "HiddenKey": "drops attention logits and hidden states of a feed-forward block: no low-rank product takes part",
    "LongLoRA's shifted sparse attention": "an attention kernel; what it trains besides, embeddings and norms, is above",
    "LoRAPrune's surgery": "cutting heads and channels out is particular to each model; its criterion is above",
    "LQ-LoRA's integer program": "the exact dynamic program over bits needs no solver",
    "Adapter, Prefix, Prompt, P-tuning, AdaptionPrompt, CPT": "tokens or serial networks of their own beside the model",
    "BitFit, norm tuning, Diff Pruning": "train or mask weights that are there: nothing to fuse",
    "OFT, BOFT, HRA, Bone, FourierFT, LoHa, LoKr, RandLoRA": "other algebra: rotations, Hadamard, Kronecker, Fourier",
    "GPTQ, AWQ, AQLM, EETQ, HQQ, torchao, Megatron": "formats of weights that others own",
    "MaLoRA, LongRA": "only their names were found",
}
