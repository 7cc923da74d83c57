"""EVA and CorDA: what a layer's inputs tell."""

import copy
import dataclasses
import importlib.util
import sys
import types
import warnings

import peft
import pytest
import torch
from initialised import F64, alignment, linear, nearness, same_up_to_signs
from tiny_models import assert_untouched, llama, snapshot, tokens
from torch import Tensor, nn

import lora_ops
from lora_ops import LoraConfig, lora_layers
from lora_ops.init import IncrementalPCA, corda, eva, initialize, redistributed

if importlib.util.find_spec("attr") is None:  # which PEFT's CorDA takes a dataclass from, and does not depend on
    sys.modules["attr"] = types.ModuleType("attr")
    sys.modules["attr"].dataclass = dataclasses.dataclass
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda

R = 4
CONFIG = {"r": R, "lora_alpha": 6, "target_modules": "all-linear"}


def skewed(rows: int, K: int, seed: int = 0) -> Tensor:
    """Inputs that hardly vary in some directions, and have a mean."""
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(K, K, generator=g, dtype=F64)).Q
    return torch.randn(rows, K, generator=g, dtype=F64) * torch.logspace(0, -2, K, dtype=F64) @ Q + 0.3


class Chain(nn.Module):
    """Two layers with the same input, whose first vary much in few directions, and two more."""

    def __init__(self, K: int = 24) -> None:
        super().__init__()
        self.q, self.k, self.up, self.down = (nn.Linear(K, K) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.q(x) * self.k(x)).relu())


def chain(**config) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = Chain().double()
    x = skewed(300, 24).reshape(3, 100, 24)
    lora_ops.add_lora(model, LoraConfig(**{"r": R, "lora_alpha": 8, "target_modules": ["q", "k", "up", "down"], **config}))
    return model, list(x)


def inputs(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """Of every layer, all rows."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        layer.register_forward_hook(lambda m, args, y, name=name: seen.setdefault(name, []).append(args[0].detach()))
        for name, layer in lora_layers(model)
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(xs) for name, xs in seen.items()}


# --- EVA ----------------------------------------------------------------------------------------------------------------


def test_incremental_components_are_those_of_all_rows() -> None:
    """As long as they hold all that was seen: here rank 6 of 8."""
    x = skewed(90, 6) @ torch.randn(6, 20, dtype=F64)
    pca = IncrementalPCA(8)
    for part in (x[:3], x[3:30], x[30:31], x[31:]):  # of 3 rows nothing can be begun
        pca.update(part)
    seen = x[3:]
    _, S, Vh = torch.linalg.svd(seen - seen.mean(0), full_matrices=False)
    assert pca.components is not None
    assert pca.count == 87
    assert same_up_to_signs(pca.components[:6], Vh[:6]) < 1e-8
    assert nearness(pca.singular_values[:6], S[:6]) < 1e-10
    assert nearness(pca.explained_variance_ratio[:6], (S[:6] ** 2 / (S**2).sum())) < 1e-10


def test_eva_spans_the_directions_of_largest_variance() -> None:
    model, batches = chain()
    before = {name: layer(batches[0]) for name, layer in lora_layers(model)}
    seen = inputs(model, batches)
    initialize(model, "eva", batches, rho=1.0, tau=2.0)
    for name, layer in lora_layers(model):
        assert layer.r["default"] == R
        A, x = layer.lora_A["default"], seen[name]
        Vh = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh
        assert alignment(A, Vh[:R]) > 0.95  # three batches, each cut to R directions
        assert (A @ A.T - torch.eye(R)).abs().max() < 1e-6
        assert not layer.lora_B["default"].any()
        assert torch.equal(layer(batches[0]), before[name])


def test_ranks_go_where_variance_is_explained() -> None:
    model, batches = chain()
    initialize(model, "eva", iter(batches * 3), rho=3.0)
    layers = dict(lora_layers(model))
    ranks = {name: layer.r.get("default", 0) for name, layer in layers.items()}
    assert sum(ranks.values()) == 4 * R
    assert max(ranks.values()) <= 3 * R
    assert ranks["q"] == ranks["k"]
    assert len(set(ranks.values())) > 1
    for name, layer in layers.items():
        if ranks[name]:
            assert layer.lora_A["default"].shape == (ranks[name], 24)
            assert layer.lora_A["default"].requires_grad
            assert layer.scaling["default"] == 2.0  # lora_alpha grows with the rank
    assert redistributed({"a": torch.tensor([0.9, 0.05]), "b": torch.tensor([0.5, 0.4])}, 3) == {"a": 1, "b": 2}
    model, batches = chain()
    initialize(model, "eva", batches, rho=3.0, adjust_scaling_factors=False)
    assert {layer.lora_alpha["default"] for _, layer in lora_layers(model) if layer.r} == {8}


def test_a_layer_without_rank_has_no_adapter(tmp_path) -> None:
    """Its file says nothing of it, and is read by a model without."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    nn.init.zeros_(model[0].weight)
    model[0].weight.data[:2] = 1.0  # the second layer's input has one direction, the first one's has many
    fresh, x = copy.deepcopy(model), skewed(60, 24).float()
    nn.init.ones_(x[:, 5:])
    lora_ops.add_lora(model, LoraConfig(r=1, target_modules=["0", "1"]))
    initialize(model, "eva", [torch.randn(50, 24)], rho=2.0)
    ranks = [layer.r.get("default", 0) for _, layer in lora_layers(model)]
    assert sum(ranks) == 2
    if 0 in ranks:
        lora_ops.save_adapter(model, tmp_path)
        lora_ops.load_adapter(fresh, tmp_path)
        assert len(dict(lora_layers(fresh))) == 1
        assert torch.equal(fresh(x), model(x))


def test_eva_s_subspaces_and_ranks_are_peft_s() -> None:
    """PEFT's iteration gives what is near the exact components; padding and labels of -100 do not count."""
    base = llama()
    ids = tokens()
    batch = {"input_ids": ids, "attention_mask": (torch.arange(17) < 14).expand(3, 17).long(), "labels": ids.clone()}
    batch["labels"][:, :3] = -100
    data = [batch]
    config = peft.LoraConfig(**CONFIG, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), config)
        peft.initialize_lora_eva_weights(theirs, data, show_progress_bar=False)
    model = lora_ops.add_lora(base, LoraConfig(**CONFIG))
    initialize(model, "eva", data)
    found = {name: m for name, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    ours = {name: layer for name, layer in lora_layers(model) if "default" in layer.r}
    differences = 0
    for name in found.keys() | ours.keys():
        ranks = [side[name].r["default"] if name in side else 0 for side in (ours, found)]
        differences += abs(ranks[0] - ranks[1])
        if min(ranks) > 1:
            leading = min(ranks) // 2
            A, B = (side[name].lora_A["default"] for side in (ours, found))
            A, B = (t if isinstance(t, Tensor) else t.weight for t in (A, B))
            assert alignment(A[:leading], B[:leading]) > 0.98
    assert sum(layer.r["default"] for layer in ours.values()) == R * 14
    assert differences <= 6


def test_whiten_and_batches_that_are_too_small() -> None:
    x = skewed(50, 12)
    plain, white = (eva(torch.ones(3, 12, dtype=F64), R, 1.0, X=x, whiten=w).lora_A for w in (False, True))
    S = torch.linalg.svdvals(x - x.mean(0))[:R]
    assert nearness(white * S.sqrt()[:, None], plain) < 1e-10
    with pytest.raises(ValueError, match="r must be at most the number of directions that the inputs have, 0, got 4"):
        eva(torch.ones(3, 12), R, 1.0, X=x[:2])
    model, batches = chain()
    before = snapshot(model)
    with pytest.raises(ValueError, match="batches must reach every layer with the adapter, and did not reach q"):
        initialize(model, "eva", [batches[0][:2]])
    assert_untouched(model, before)


# --- CorDA --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_is_peft_s(method: str) -> None:
    base = nn.Sequential(linear(size=(20, 24)), nn.Tanh(), linear(size=(16, 20), seed=1))
    batches = list(skewed(240, 24).float().reshape(4, 1, 60, 24))  # PEFT's inputs are of one sequence
    for batch in batches:
        batch[0, 0, 0] = 9.0  # the largest magnitude is positive: PEFT divides by |max x|
    config = peft.LoraConfig(
        r=R,
        lora_alpha=6,
        target_modules=["0", "2"],
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=method),
    )
    theirs = copy.deepcopy(base)

    def run() -> None:
        for batch in batches:
            theirs(batch)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        preprocess_corda(theirs, config, run_model=run)
        theirs = peft.get_peft_model(theirs, config)
    model = lora_ops.add_lora(base, LoraConfig(r=R, lora_alpha=6, target_modules=["0", "2"]))
    initialize(model, "corda", batches, corda_method=method)
    layer, other = model[0], theirs.base_model.model[0]
    tolerance = 1e-3 if method == "ipm" else 0.05  # the smallest components are the least certain ones
    assert nearness(layer.weight, other.base_layer.weight) < tolerance
    assert nearness(layer.delta_weight(), 1.5 * other.lora_B["default"].weight @ other.lora_A["default"].weight) < tolerance
    assert nearness(layer.lora_A["default"].norm(), other.lora_A["default"].weight.norm()) < tolerance


def test_all_oriented_components_are_the_weight() -> None:
    W, x = linear(F64, size=(20, 24)).weight.detach(), skewed(300, 24)
    full = corda(W, 20, 1.5, X=x)
    assert nearness(1.5 * full.lora_B @ full.lora_A, W) < 1e-9
    assert full.weight.abs().max() < 1e-9


def test_what_kpm_trains_matters_least_to_the_inputs() -> None:
    """Without the components that it trains, the outputs are nearer to what they were than without as many plain ones."""
    base, x = linear(F64, size=(20, 24)), skewed(300, 24)
    W = base.weight.detach()
    lost = {}
    for init, options in (("corda", {"corda_method": "kpm"}), ("corda_ipm", {"corda_method": "ipm"}), ("milora", {})):
        model = lora_ops.add_lora(nn.Sequential(copy.deepcopy(base)), LoraConfig(r=8, lora_alpha=12, target_modules=["0"]))
        initialize(model, init.split("_")[0], [x], **options)
        lost[init] = nearness(x @ model[0].weight.T, x @ W.T)
        assert nearness(model[0].weight + model[0].delta_weight(), W) < 1e-9
    assert lost["corda"] < 0.5 * lost["milora"] < lost["corda_ipm"]


def test_bad_arguments() -> None:
    model, batches = chain()
    before = snapshot(model)
    for arguments, options, message in (
        (("pizza",), {}, 'init must be one of "corda"'),
        (("eva",), {}, 'batches must be given for "eva"'),
        (("lora_ga",), {}, 'batches must be given for "lora_ga"'),
        (("pissa",), {"adapter_name": "other"}, "adapter_name must be an adapter of the model's LoRA layers, got 'other'"),
        (("eva", batches), {"rho": 0.5}, "rho must be >= 1, got 0.5"),
        (("corda", batches), {"corda_method": "both"}, 'q: corda_method must be "ipm" or "kpm"'),
        (("pissa",), {"quant": "int3"}, 'quant must be "nf4", "fp4" or None'),
        (("lora_xs",), {}, "q: init must give no core"),
        (("lq_lora",), {"bits": 4.2}, "bits must be None without quant"),
    ):
        with pytest.raises(ValueError) as caught:
            initialize(model, *arguments, **options)
        assert message in str(caught.value)
        assert_untouched(model, before)
