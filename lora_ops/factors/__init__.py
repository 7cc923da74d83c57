"""Factor providers: modules that make A, B and the small factors between them anew in every forward.

A provider is any `nn.Module` whose `forward(x)` returns `Factors`, by plain differentiable PyTorch; its parameters are what
trains. `FactoredLinear` multiplies with them.
"""

from .base import Factors

__all__ = ["Factors"]
