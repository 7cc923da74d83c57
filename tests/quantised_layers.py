"""Small layers with a weight in 4 bits, and the comparisons of them."""

import copy

import bitsandbytes
import torch
from compare import error
from tiny_models import K, N, eager, exactly, make_layer
from torch import nn

from lora_ops import NF4Weight

TENSORS = ["codes", "absmax", "nested_absmax", "nested_code", "offset"]


def make_quantised_layer(dtype=torch.float32, linear=None, quant="nf4", **options):
    return make_layer(dtype, linear, quant=quant, **options)


def linear4bit(dtype=torch.float32, quant_type="nf4", **options):
    linear = bitsandbytes.nn.Linear4bit(K, N, quant_type=quant_type, compute_dtype=dtype, **options)
    linear.weight.data = torch.randn(N, K).to(dtype)
    linear.bias.data = linear.bias.data.to(dtype)
    return linear.to("cpu")  # quantises


def assert_same_weight(a, b):
    assert isinstance(a, NF4Weight) and isinstance(b, NF4Weight)
    for name in TENSORS:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None and y is None) or (x.dtype == y.dtype and torch.equal(x, y)), name
    assert (a.shape, a.blocksize, a.quant_type) == (b.shape, b.blocksize, b.quant_type)


def dense(layer, dtype):
    """The layer with its weight as a parameter: what bitsandbytes would multiply by, or in float64 the exact one."""
    other = copy.deepcopy(layer)
    weight = other.weight.dequantize(dtype)
    other.weight = nn.Parameter(weight, requires_grad=False)
    return other.double() if dtype == torch.float64 else other


def assert_computes(layer, x):
    """As near to the exact output as PEFT's arithmetic over the dequantised weight."""
    exact = exactly(dense(layer, torch.float64), x)
    measured = error(layer(x), eager(dense(layer, x.dtype), x), exact)
    assert measured.within_bound, measured
