"""Initialisations: what A and B, and the weight beside them, begin with.

Every one is a function `f(weight, r, scaling, *, X=None, G=None, generator=None, dtype=None, **options) -> Initial`, registered
by PEFT's name for it, or the paper's. Those without data are names for `init_lora_weights`; all are for `initialize`.
"""

from .base import Initial
from .bits import allocate_bits
from .conversion import convert_to_plain_lora
from .corda import corda
from .eva import IncrementalPCA, eva, redistributed
from .lora_ga import lora_ga, lora_ga_peft
from .low_rank import low_rank
from .model import initialize
from .names import check_init_lora_weights, find, initialisations
from .quantised import loftq, qpissa
from .random import default, gaussian, init_a, init_b, offset, orthogonal
from .singular import LoraXS, lora_xs, milora, olora, pissa
from .weighted import lq_lora, lqer

__all__ = [
    "IncrementalPCA",
    "Initial",
    "LoraXS",
    "allocate_bits",
    "check_init_lora_weights",
    "convert_to_plain_lora",
    "corda",
    "default",
    "eva",
    "find",
    "gaussian",
    "init_a",
    "init_b",
    "initialisations",
    "initialize",
    "loftq",
    "lora_ga",
    "lora_ga_peft",
    "lora_xs",
    "low_rank",
    "lq_lora",
    "lqer",
    "milora",
    "offset",
    "olora",
    "orthogonal",
    "pissa",
    "qpissa",
    "redistributed",
]
