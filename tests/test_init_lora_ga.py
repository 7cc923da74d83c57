"""LoRA-GA: the first step, the variance, the gradients; and what PEFT calls so."""

import copy
import warnings
import weakref

import peft
import pytest
import torch
from compare import assert_within_bound, error
from initialised import F64, linear, nearness, same_up_to_signs
from peft.tuners.lora.loraga import preprocess_loraga
from tiny_models import llama, tokens
from torch import Tensor, nn

import lora_ops
from lora_ops import LoraConfig, lora_layers
from lora_ops.init import initialize, lora_ga, lora_ga_peft
from lora_ops.init.calibrate import gather_gradients
from lora_ops.init.statistics import MeanGradient

R = 4
CONFIG = {"r": R, "lora_alpha": 16, "use_rslora": True, "target_modules": "all-linear"}


def cosine(a: Tensor, b: Tensor) -> float:
    return ((a * b).sum() / (a.norm() * b.norm())).item()


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    ids = tokens()
    return [{"input_ids": (ids + i) % 96, "labels": (ids + i) % 96} for i in range(count)]


def gradients(model: nn.Module, data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """By full fine-tuning: of every nn.Linear but the output layer."""
    model = copy.deepcopy(model)
    for batch in data:
        model(**batch).loss.backward()
    return {name: m.weight.grad for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}


def started(model: nn.Module, data: list[dict[str, Tensor]], init: str = "lora_ga", **options) -> nn.Module:
    model = lora_ops.add_lora(copy.deepcopy(model), LoraConfig(**CONFIG))
    return initialize(model, init, data, **options)


def best(G: Tensor, r: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vh[:r]


def test_the_first_step_is_full_fine_tuning_s_best_of_rank_2r() -> None:
    """ΔW of one small step of SGD on A and B, in every layer of a model, is along the best approximation of rank 2r of full
    fine-tuning's, of the length that it should have; plain LoRA's is not. fp64, where the step can be small."""
    base = llama().double()
    data = batches()
    G = gradients(base, data)
    eta = 1e-7

    def first_step(model: nn.Module) -> dict[str, Tensor]:
        layers = dict(lora_layers(model))
        before = {name: layer.delta_weight() for name, layer in layers.items()}
        for batch in data:
            model(**batch).loss.backward()
        torch.optim.SGD(lora_ops.lora_parameters(model), lr=eta).step()
        return {name: layer.delta_weight() - before[name] for name, layer in layers.items()}

    model = started(base, data, niter=None)
    with torch.no_grad():
        assert nearness(model(**data[0]).logits, base(**data[0]).logits) < 1e-10
    steps = first_step(model)
    assert steps.keys() == G.keys()
    for name, step in steps.items():
        wanted = -best(G[name], 2 * R)
        assert cosine(step, wanted) >= 0.9999
        k, s = len(G[name]) ** 0.25 / 16**0.5, 16 / R**0.5
        assert abs(step.norm() / wanted.norm() / (eta * s**2 * k**2) - 1) < 1e-3
    plain = first_step(lora_ops.add_lora(copy.deepcopy(base), LoraConfig(**CONFIG)))
    peft_s = first_step(started(base, data, "lora_ga_peft", niter=None))
    for name, step in steps.items():
        assert cosine(plain[name], -G[name]) < cosine(step, -G[name])
        assert cosine(peft_s[name], -best(G[name], 2 * R)) < 0.999


def test_scaled_for_gradient_descent_it_is_a_step_of_the_same_learning_rate() -> None:
    """scale="gd": k = 1 / s, and ΔW = -η times the best approximation of rank 2r itself."""
    base, data, eta = llama().double(), batches(1), 1e-7
    model = started(base, data, niter=None, scale="gd")
    before = {name: layer.delta_weight() for name, layer in lora_layers(model)}
    model(**data[0]).loss.backward()
    torch.optim.SGD(lora_ops.lora_parameters(model), lr=eta).step()
    for name, G in gradients(base, data).items():
        step = model.get_submodule(name).delta_weight() - before[name]
        assert nearness(step, -eta * best(G, 2 * R)) < 1e-3


def test_the_iteration_is_near_enough() -> None:
    """The authors' four iterations of 4r directions, on gradients of a model."""
    base = llama()
    data = batches(1)
    G = gradients(base, data)
    for name, layer in lora_layers(started(base, data)):
        A, B = layer.lora_A["default"].double(), layer.lora_B["default"].double()
        reached = (G[name].double() @ A.T @ A + B @ B.T @ G[name].double()).detach()
        assert cosine(reached, best(G[name].double(), 2 * R)) >= 0.9999


@pytest.mark.parametrize("count", [1, 3])
def test_one_gradient_is_that_of_all_batches(count: int) -> None:
    """...whatever dtype it rests in between, and a layer that is called twice is one layer."""
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).tanh())

    model = Twice()
    data = [torch.randn(7, 24) for _ in range(count)]
    loss = lambda m, x: m(x).square().sum()  # noqa: E731
    for x in data:
        loss(model, x).backward()
    G = model.layer.weight.grad.double()
    lora_ops.add_lora(model, LoraConfig(r=2, target_modules=["layer"]))
    initialize(model, "lora_ga", iter(data), loss=loss, niter=None)
    U, _, Vh = torch.linalg.svd(G)
    layer = model.layer
    for t, wanted in ((layer.lora_A["default"], Vh[:2]), (layer.lora_B["default"].T, U[:, 2:4].T)):
        unit = torch.nn.functional.normalize(t.double())
        assert ((unit * wanted).sum(1).abs() > 1 - 1e-6).all()


def test_a_layer_that_only_some_batches_reach_and_one_whose_output_is_written_to() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x).relu_()
            return self.second(y) if x.mean() > 0 else y

    model = lora_ops.add_lora(Branches(), LoraConfig(r=2, target_modules=["first", "second"]))
    loss = lambda m, x: m(x).square().sum()  # noqa: E731
    x = torch.rand(7, 24)
    initialize(model, "lora_ga", [x, -x], loss=loss)
    assert all(layer.starts for _, layer in lora_layers(model))
    with pytest.raises(ValueError, match="batches must reach every layer with the adapter, and did not reach second"):
        initialize(model, "lora_ga", [-x], loss=loss)


def test_the_variance_depends_neither_on_r_nor_on_the_widths() -> None:
    """Var(s x Aᵀ Bᵀ) = (α / γ)², for inputs of variance 1; with α / r in place of α / √r it does."""
    found = []
    for n, k, r in ((64, 64, 4), (64, 512, 16), (512, 64, 16), (512, 512, 64), (256, 128, 1)):
        g = torch.Generator().manual_seed(n + k + r)
        G = torch.randn(n, k, generator=g)
        W, x = torch.randn(n, k, generator=g), torch.randn(4000, k, generator=g)
        initial = lora_ga(W, r, 16 / r**0.5, G=G)
        base = nn.Linear(k, n)
        layer = lora_ops.FusedLoraLinear.from_linear(base, r, lora_alpha=16, use_rslora=True)
        layer.set_initial("default", initial, "lora_ga")
        found.append((x @ layer.delta_weight().T).var().item())
    assert max(abs(v - 1) for v in found) < 0.1, found


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
def test_directions_and_scales(direction: str) -> None:
    W, G = linear(F64, 1).weight.detach(), linear(F64, 2).weight.detach()
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    wanted = {"ArB2r": ([0, 1], [2, 3]), "A2rBr": ([2, 3], [0, 1]), "ArBr": ([1, 3], [0, 2])}
    initials = {
        scale: lora_ga(W, 2, 3.0, G=G, direction=direction, scale=scale, niter=None, generator=torch.Generator().manual_seed(0))
        for scale in ("stable", "gd", "unit", "weightS")
    }
    of_A, of_B = (
        (t @ x).abs().argmax(1).tolist() for t, x in ((initials["unit"].lora_A, Vh.T), (initials["unit"].lora_B.T, U))
    )
    assert sorted(of_A + of_B) == [0, 1, 2, 3]
    assert (of_A, of_B) == wanted.get(direction, (of_A, of_B))
    sigma = torch.linalg.svdvals(W)[:2]
    k = {"stable": 40**0.25 / 4, "gd": 1 / 3, "unit": 1.0, "weightS": (sigma / 3).sqrt().mean().item()}
    for scale, initial in initials.items():
        assert abs(initial.lora_A.norm() / 2**0.5 / k[scale] - 1) < 1e-12
        assert abs(initial.lora_B.norm() / 2**0.5 / k[scale] - 1) < 1e-12
        assert nearness(initial.weight + 3 * initial.lora_B @ initial.lora_A, W) < 1e-14
    wide = lora_ga(W, 2, 3.0, G=G, direction="ArB2r", niter=None)
    for small in (W, W / 1000):  # whose largest element is larger than the product's, or smaller
        clipped = lora_ga(small, 2, 3.0, G=G, direction="ArB2r", niter=None, norm_clip=True)
        ratio = (small.abs().max() / (3 * wide.lora_B @ wide.lora_A).abs().max()).clamp(max=1)
        assert nearness(clipped.lora_A, ratio.sqrt() * wide.lora_A) < 1e-12
        assert nearness(clipped.lora_B, ratio.sqrt() * wide.lora_B) < 1e-12
        assert (ratio < 1) == (small is not W)


@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_peft_s_own_is_peft_s(scale: str) -> None:
    base = nn.Sequential(linear())
    x = torch.randn(9, base[0].in_features)
    loss = lambda m, x: m(x).square().sum()  # noqa: E731
    config = peft.LoraConfig(
        r=R, lora_alpha=6, target_modules=["0"], init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig(scale=scale)
    )
    theirs = copy.deepcopy(base)
    preprocess_loraga(theirs, config, lambda: loss(theirs, x).backward())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(theirs, config)
    layer = theirs.base_model.model[0]
    lora_ops.add_lora(base, LoraConfig(r=R, lora_alpha=6, target_modules=["0"]))
    W0 = base[0].weight.detach()
    initialize(base, "lora_ga_peft", [x], loss=loss, scale=scale)
    assert same_up_to_signs(base[0].lora_A["default"], layer.lora_A["default"].weight) < 1e-3
    assert same_up_to_signs(base[0].lora_B["default"].T, layer.lora_B["default"].weight.T) < 1e-2
    assert nearness(base[0].weight + base[0].delta_weight(), W0) < 1e-5


def test_the_matrices_that_it_cannot_start_from() -> None:
    W = torch.randn(6, 8)
    for options, message in (
        ({"G": torch.zeros(6, 8)}, "G is zero"),
        ({"G": W, "direction": "BrA"}, "direction must be one of ArB2r"),
        ({"G": W, "scale": "huge"}, 'scale must be "stable"'),
        ({"G": W, "stable_gamma": 0}, "stable_gamma must be > 0"),
    ):
        for init in (lora_ga, lora_ga_peft):
            with pytest.raises(ValueError, match=message):
                init(W, 2, 1.0, **options)
    with pytest.raises(ValueError, match=r"r must be at most min\(N, K\) / 2 = 3"):
        lora_ga(W, 4, 1.0, G=W)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gathered_gradients_are_the_weight_s_own(dtype: torch.dtype) -> None:
    """Over two batches, the sum between them in the weight's dtype."""
    torch.manual_seed(0)
    layer, data = nn.Linear(48, 33).to(dtype), [torch.randn(2, 20, 48).to(dtype) for _ in range(2)]

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum() / 64

    def own(model: nn.Module, dtype: torch.dtype) -> Tensor:
        for x in data:
            loss(model, x.to(dtype)).backward()
        return model.weight.grad

    eager, exact = own(copy.deepcopy(layer), dtype), own(copy.deepcopy(layer).double(), F64)
    gathered = {"layer": MeanGradient(dtype)}
    gather_gradients(layer.requires_grad_(False), {"layer": layer}, data, gathered, lambda name: None, loss)
    G = gathered["layer"].total
    assert G.dtype == torch.float32
    assert_within_bound({"G": error(G.to(dtype), eager, exact)})


def test_a_gradient_is_gone_before_the_next_one_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one batch; with two, those of before are there in the weights' dtype. Parameters have no gradient afterwards."""
    model = lora_ops.add_lora(llama().bfloat16(), LoraConfig(**CONFIG))
    layers = len(dict(lora_layers(model)))
    made: list[weakref.ref[Tensor]] = []
    alive: list[list[torch.dtype]] = []
    update = MeanGradient.update

    def watched(self: MeanGradient, G: Tensor) -> None:
        alive.append([t.dtype for t in (ref() for ref in made) if t is not None])
        update(self, G)
        made.append(weakref.ref(G))

    monkeypatch.setattr(MeanGradient, "update", watched)
    initialize(model, "lora_ga", batches(1))
    assert alive == [[]] * layers
    made.clear(), alive.clear()
    initialize(model, "lora_ga", batches(2))
    assert alive == [[]] * 2 * layers
    assert all(p.grad is None for p in model.parameters())
