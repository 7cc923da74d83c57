"""Adapters to combine, what PEFT makes of them, and how far a result is from what is wanted."""

import math

import compare
import numpy as np
import peft
import torch
from compare import F32
from torch import Tensor, nn

from lora_ops import Adapter, combine

F64 = torch.float64
K, N = 40, 24
OF_FACTORS = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
OF_DELTAS = ["ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"]
OF_ANY_RANK = ["cat", "svd", *OF_DELTAS]


def drawn(ranks=(4, 4), scalings=(2.0, 1.5, 0.25), dtype=F32, size=(N, K)) -> list[Adapter]:
    g = torch.Generator().manual_seed(sum(ranks))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=F64).to(dtype)

    return [Adapter(normal(r, size[1]), normal(size[0], r), s) for r, s in zip(ranks, scalings, strict=False)]


def options(method: str, density: float = 0.5, **others) -> dict:
    return others if method in ("cat", "svd", "linear") else {"density": density, **others}


def peft_s(adapters: list[Adapter], weights, method: str, *, use_rslora: bool = False, seed: int = 7, **options) -> Adapter:
    """What PEFT makes of them, in a model of one layer."""
    (n, _), (_, k), dtype = adapters[0].lora_B.shape, adapters[0].lora_A.shape, adapters[0].lora_A.dtype
    model, names = nn.Sequential(nn.Linear(k, n, dtype=dtype)), [f"a{i}" for i in range(len(adapters))]
    for name, (A, _, scaling) in zip(names, adapters, strict=True):
        r = A.shape[0]
        alpha = scaling * (math.sqrt(r) if use_rslora else r)
        config = peft.LoraConfig(r=r, lora_alpha=alpha, use_rslora=use_rslora, target_modules=["0"])
        if name == "a0":
            model = peft.get_peft_model(model, config, name, autocast_adapter_dtype=False)
        else:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
    layer, tuner = model.base_model.model[0], model.base_model
    for name, (A, B, _) in zip(names, adapters, strict=True):
        layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = A.clone(), B.clone()
    inject = tuner.inject_adapter

    def inject_then_seed(*args, **kwargs) -> None:  # the new adapter's initialisation draws random numbers, too
        inject(*args, **kwargs)
        torch.manual_seed(seed)

    tuner.inject_adapter = inject_then_seed
    tuner.add_weighted_adapter(names, list(weights), "new", combination_type=method, **options)
    return Adapter(layer.lora_A["new"].weight.data, layer.lora_B["new"].weight.data, layer.scaling["new"])


def ours(adapters: list[Adapter], weights, method: str, *, seed: int = 7, **options) -> Adapter:
    return combine(adapters, weights, method, generator=torch.Generator().manual_seed(seed), **options)


def delta(adapter: Adapter) -> Tensor:
    return adapter.scaling * (adapter.lora_B.double() @ adapter.lora_A.double())


def exact(adapters: list[Adapter], weights) -> Tensor:
    """Σ w_i s_i B_i A_i in long double, rounded once, to fp64."""
    total = np.zeros(exact_shape(adapters), np.longdouble)
    for (A, B, scaling), w in zip(adapters, weights, strict=True):
        wide_A, wide_B = (t.double().numpy().astype(np.longdouble) for t in (A, B))
        total += np.longdouble(w) * np.longdouble(scaling) * (wide_B @ wide_A)
    return torch.from_numpy(total.astype(np.float64))


def exact_shape(adapters: list[Adapter]) -> tuple[int, int]:
    return adapters[0].lora_B.shape[0], adapters[0].lora_A.shape[1]


def assert_as_near(actual: Adapter, eager: Adapter, wanted: Tensor) -> None:
    """ΔW is as near to the one wanted as PEFT's is."""
    dtype = actual.lora_A.dtype
    measured = compare.error(delta(actual).to(dtype), delta(eager).to(dtype), wanted)
    assert measured.within_bound, measured


def wrong_by(adapter: Adapter, wanted: Tensor) -> float:
    return ((delta(adapter) - wanted).norm() / wanted.norm()).item()
