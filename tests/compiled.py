"""What torch.compile makes of an operator or a layer, beside eager. Tests that use it name the fixture `no_compiled_code`."""

from collections.abc import Callable
from typing import Any

import torch
from observe import gradients
from torch import Tensor, nn


class Graphs:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph


def assert_compiled_is_eager(function: Callable[..., Tensor], case: Any, backend: str) -> None:
    """Results and gradients, bit for bit, of a function of x, A, B and bias, without a graph break."""
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for actual, expected in zip(gradients(compiled, case), gradients(function, case), strict=True):
        assert torch.equal(actual, expected)


def assert_compiled_layer_is_eager(layer: nn.Module, x: Tensor) -> None:
    """Output and gradients of A and B, bit for bit, with the same masks of dropout."""
    results = []
    for module in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        torch.manual_seed(1)
        y = module(x)
        y.square().sum().backward()
        results.append([y.detach(), layer.lora_A["default"].grad, layer.lora_B["default"].grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def assert_one_graph_serves_all_rows(function: Callable[[Tensor], Tensor], K: int, N: int) -> None:
    """A second number of rows compiles a general graph, a third nothing."""
    graphs = Graphs()
    compiled = torch.compile(function, fullgraph=True, backend=graphs)
    for rows in (3, 7, 20, 41):
        assert compiled(torch.randn(rows, K)).shape == (rows, N)
    assert graphs.count == 2
