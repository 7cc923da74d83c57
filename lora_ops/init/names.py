"""Initialisations by name: PEFT's, or the paper's."""

import contextlib
import functools
import re
from typing import Any

from ..nn.settings import MOST_ITERATIONS
from .base import CALIBRATED, INITIALISATIONS, Initialisation

NUMBERED = {"pissa": {"niter": "niter"}, "loftq": {"iter": "loftq_iter"}}


def initialisations() -> dict[str, Initialisation]:
    """All of them, by name."""
    return dict(INITIALISATIONS)


def find(name: str) -> Initialisation:
    """The initialisation of that name; "pissa_niter_4" is "pissa" with niter=4, "loftq_iter_5" "loftq" with loftq_iter=5.

    Raises:
        ValueError: there is none, or the number is over MOST_ITERATIONS.
    """
    plain, option, number = re.fullmatch(r"(.*?)(?:_(niter|iter)_(\d+))?", name).groups()  # type: ignore[union-attr]
    init = INITIALISATIONS.get(plain)
    if init is None or option not in (None, *NUMBERED.get(plain, ())):
        names = ", ".join(f'"{other}"' for other in sorted(INITIALISATIONS))
        raise ValueError(f'init must be one of {names}, "pissa_niter_N" or "loftq_iter_N", got {name!r}')
    if option is None:
        return init
    if len(number) > 9 or int(number) > MOST_ITERATIONS:
        raise ValueError(f'init must have at most {MOST_ITERATIONS} iterations, as in "{plain}_{option}_4", got {name!r}')
    return functools.partial(init, **{NUMBERED[plain][option]: int(number)})


def check_init_lora_weights(name: Any) -> None:
    """Raises ValueError for what is no initialisation that a layer can have without data."""
    plain = re.sub(r"_n?iter_\d+$", "", name) if isinstance(name, str) else name
    others = {*CALIBRATED, "lora_xs"}  # the last one needs another kind of layer
    if plain in INITIALISATIONS and plain not in others:
        with contextlib.suppress(ValueError):
            find(name)
            return
    names = ", ".join(f'"{fit}"' for fit in sorted(INITIALISATIONS) if fit not in others)
    hint = f'; for "{plain}" see lora_ops.init' if plain in others else ""
    if plain != name and not hint:
        hint = f" (N is at most {MOST_ITERATIONS})"
    raise ValueError(f'init_lora_weights must be True, False, {names}, "pissa_niter_N" or "loftq_iter_N", got {name!r}{hint}')
