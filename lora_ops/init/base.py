"""What every initialisation has in common: its signature, its checks, its rounding. names.py finds them by name."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..quant import NF4Weight


class Initial(NamedTuple):
    """What an adapter begins with: y = x weightᵀ + scaling · ((x lora_Aᵀ) core) lora_Bᵀ."""

    lora_A: Tensor  # (r, K)  # noqa: N815
    lora_B: Tensor  # (N, r)  # noqa: N815
    weight: Tensor | NF4Weight | None = None  # (N, K), None: the weight stays what it is
    core: Tensor | None = None  # (r, r), None: there is none


Initialisation = Callable[..., Initial]

NEEDS = ("X", "G", "generator")
INITIALISATIONS: dict[str, Initialisation] = {}
CALIBRATED: set[str] = set()  # that cannot do without data


def initialisation(
    name: str, *, offset: bool = False, calibrated: bool = False
) -> Callable[[Callable[..., Initial]], Initialisation]:
    """Registers `fn(weight, r, scaling, ...)`, plain mathematics in fp32 (fp64 for an fp64 weight), as an initialisation:

        f(weight, r, scaling, *, X=None, G=None, generator=None, dtype=None, **options) -> Initial

    weight (N, K), float32, bfloat16, float16 or float64, stays as it is. X (M, K): inputs of the layer. G (N, K): gradient of
    the loss for the weight. Either is needed where `fn` has it as a parameter without a default. dtype: of A and B; None:
    float32 beside a half-precision weight, else the weight's.

    Args:
        name: PEFT's, or as in the paper.
        offset: Initial.weight is W0 − scaling · B A of the A and B that were rounded to `dtype`, rounded once to the weight's
            dtype, so that the layer starts as W0.
        calibrated: it cannot do without data.
    """

    def register(fn: Callable[..., Initial]) -> Initialisation:
        parameters = inspect.signature(fn).parameters

        @functools.wraps(fn)
        @torch.no_grad()
        def init(
            weight: Tensor,
            r: int,
            scaling: float,
            *,
            X: Tensor | None = None,
            G: Tensor | None = None,
            generator: torch.Generator | None = None,
            dtype: torch.dtype | None = None,
            **options: Any,
        ) -> Initial:
            given: dict[str, Any] = {"X": X, "G": G, "generator": generator}
            _check(name, weight, r, scaling, given, parameters, options)
            wide = torch.promote_types(weight.dtype, torch.float32)
            for key, t in given.items():
                if isinstance(t, Tensor):
                    given[key] = t.detach().to(wide)
            taken = {key: value for key, value in given.items() if key in parameters and value is not None}
            made = fn(weight.detach().to(wide), r, scaling, **taken, **options)
            dtype = dtype or wide
            A, B = (t.to(dtype).contiguous() for t in (made.lora_A, made.lora_B))
            base = made.weight
            if offset:
                base = weight.to(wide) - scaling * (B.to(wide) @ A.to(wide))
            if base is not None and not (isinstance(base, NF4Weight) and weight.dtype == torch.float64):
                base = base.to(weight.dtype)
            if not all(t is None or torch.isfinite(t).all() for t in (A, B, base if isinstance(base, Tensor) else None)):
                raise ValueError(f"{name!r} gives factors or a weight that are not finite in {dtype} and {weight.dtype}")
            return Initial(A, B, base, None if made.core is None else made.core.to(dtype))

        INITIALISATIONS[name] = init
        if calibrated:
            CALIBRATED.add(name)
        return init

    return register


def split(U: Tensor, S: Tensor, Vh: Tensor, scaling: float) -> Initial:
    """A = √(S/scaling) Vh, B = U √(S/scaling): scaling · B A = U S Vh."""
    root = (S / scaling).sqrt()
    return Initial(root[:, None] * Vh, U * root)


def _check(
    name: str, weight: Tensor, r: int, scaling: float, given: dict[str, Any], parameters: Any, options: dict[str, Any]
) -> None:
    if weight.dim() != 2 or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise ValueError(
            f"weight must be (N, K) in float32, bfloat16, float16 or float64, got shape {tuple(weight.shape)}, {weight.dtype}"
        )
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ValueError(f"r must be an integer >= 1, got {r!r}")
    if not math.isfinite(scaling) or scaling <= 0:
        raise ValueError(f"scaling must be a finite number > 0 for {name!r}, got {scaling!r}")
    N, K = weight.shape
    for key, shape in (("X", (None, K)), ("G", (N, K))):
        t = given[key]
        if t is None and key in parameters and parameters[key].default is inspect.Parameter.empty:
            raise ValueError(f"{key} must be given for {name!r}")
        if t is not None and (t.dim() != 2 or any(n not in (None, m) for n, m in zip(shape, t.shape, strict=True))):
            raise ValueError(f"{key} must be {'(M, K)' if key == 'X' else '(N, K)'} with weight {(N, K)}, got {tuple(t.shape)}")
    own = [key for key in parameters if key not in ("weight", "r", "scaling", *NEEDS)]
    for key in options:
        if key not in own:
            raise TypeError(f"{name!r} has no option {key!r}: it has {own}")


def check_rank(r: int, weight: Tensor, factor: int = 1) -> None:
    """Raises ValueError where a decomposition of the weight has fewer than `factor` · r directions."""
    most = min(weight.shape) // factor
    if r > most:
        what = "min(N, K)" if factor == 1 else f"min(N, K) / {factor}"
        raise ValueError(f"r must be at most {what} = {most} for a weight {tuple(weight.shape)}, got {r}")
