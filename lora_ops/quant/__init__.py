"""4-bit weights: quantise, dequantise, bitsandbytes' state in and out."""

from .weight import NF4Weight, quantize_nf4

__all__ = ["NF4Weight", "quantize_nf4"]
