"""`prepack=True`: the kept panels follow the weight, change no result and cost no state."""

import copy
import pickle
import weakref

import pytest
import torch
from compare import error
from tiny_models import DTYPES, K, N, assert_computes, eager, make_layer, make_x
from torch import nn


def overwritten_in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(2)


def loaded(layer):
    layer.load_state_dict({**layer.state_dict(), "weight": torch.randn(N, K)})


def replaced(layer):
    layer.weight = nn.Parameter(torch.randn(N, K), requires_grad=False)


def merged_and_unmerged(layer):
    layer.merge()
    layer.unmerge()


def cast_and_back(layer):
    """Twice over, so that the allocator hands out an address that it had handed out before."""
    for _ in range(8):
        layer.to(torch.bfloat16).to(torch.float32)


@pytest.mark.parametrize("change", [overwritten_in_place, loaded, replaced, merged_and_unmerged, cast_and_back])
def test_panels_follow_the_weight(change):
    layer, fresh = make_layer(prepack=True), make_layer(prepack=True)
    x = make_x()
    before = layer(x)
    change(layer)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), fresh(x))
    assert torch.equal(layer(x), before) == (change is merged_and_unmerged)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 13, 64, 130])
def test_panels_change_no_result(dtype, rows):
    layer = make_layer(dtype, prepack=True)
    x = torch.randn(rows, K).to(dtype)
    assert_computes(layer, x)


@pytest.mark.parametrize("prepack", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype, prepack):
    """Under autocast the layer is within the bound, with panels of another dtype already kept."""
    layer = make_layer(dtype, prepack=prepack)
    x = make_x(dtype)
    exact = eager(copy.deepcopy(layer).double(), x.double())
    layer(x)  # leaves panels that are of no use under autocast
    with torch.autocast("cpu", torch.bfloat16):
        measured = error(layer(x), eager(layer, x), exact)
    assert measured.within_bound, measured


def test_a_replaced_weight_s_address_is_not_reused_while_its_panels_are_kept():
    """Panels are known by their weight's address: while that is taken, no other weight can be mistaken for it."""
    layer = make_layer(prepack=True)
    with torch.no_grad():
        layer(make_x())
        old = weakref.ref(layer.weight.untyped_storage())
        replaced(layer)
        assert old() is not None
        layer(make_x())
        assert old() is None


def test_casting_keeps_no_old_weight():
    layer = make_layer(prepack=True)
    layer(make_x())
    old = weakref.ref(layer.weight.untyped_storage())
    layer.to(torch.bfloat16)
    assert old() is None


def test_panels_cost_no_state():
    layer = make_layer(prepack=True)
    keys = sorted(layer.state_dict())
    layer(make_x())
    assert sorted(layer.state_dict()) == keys
    assert len(pickle.dumps(layer)) < 2 * sum(p.nbytes for p in layer.parameters())


def test_panels_of_an_inference_tensor():
    with torch.inference_mode():
        layer = make_layer(prepack=True)
        for _ in range(2):
            assert_computes(layer, make_x())
