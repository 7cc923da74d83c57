"""Factor providers: modules that make A, B and the small factors between them anew in every forward.

A provider is any `nn.Module` whose `forward(x)` returns `Factors`, by plain differentiable PyTorch; its parameters are what
trains. `FactoredLinear` multiplies with them. Functions return one for a layer, in float32: the layer casts it.
"""

from .bank import VBLora, VectorBank
from .base import Factors, shape_of, widest
from .blocks import MELora, QALora
from .chain import DeepLora
from .directions import combination
from .own import aflora, asymmetric, flora, gated, ia3, trilora
from .pair import Gated, Pair
from .seeded import IntrinsicDimension, Nola, Theta
from .selected import MixLora
from .spectral import SpectralAdapter, SVDiff, sam_parser
from .tensor_train import LorettaAdp, LorettaRep, TensorTrain
from .tied import lotr, lotr_pair, tied_lora, tied_pair, vera

__all__ = [
    "DeepLora",
    "Factors",
    "Gated",
    "IntrinsicDimension",
    "LorettaAdp",
    "LorettaRep",
    "MELora",
    "MixLora",
    "Nola",
    "Pair",
    "QALora",
    "SVDiff",
    "SpectralAdapter",
    "TensorTrain",
    "Theta",
    "VBLora",
    "VectorBank",
    "aflora",
    "asymmetric",
    "combination",
    "flora",
    "gated",
    "ia3",
    "lotr",
    "lotr_pair",
    "sam_parser",
    "shape_of",
    "tied_lora",
    "tied_pair",
    "trilora",
    "vera",
    "widest",
]
