"""Calls of the public operators as hypothesis draws them: what they are given, and whether the answer is right.

Right is reference.py in float64, on what the operator was given after autocast. Its sums of absolute values say how far a sum
may be off: by the rounding of as many terms as it has, in fp32, and once more in the dtype of the result. NaN and infinities
are where they are in float64.
"""

from dataclasses import dataclass
from typing import Any

import torch
from compare import BF16, F16, F32
from hypothesis import strategies as st
from torch import Tensor

import lora_ops
from lora_ops import NF4Weight, ops, reference
from lora_ops.functional import autocast_dtype

F64 = torch.float64
SIZES = (0, 1, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129, 192, 257, 300)
LEADS = ((), (0,), (1,), (2,), (3,), (5,), (8,), (14,), (17,), (40,), (41,), (65,), (1, 1), (2, 3), (0, 4), (4, 0), (3, 1, 5))
LAYOUTS = ("contiguous", "contiguous", "transposed", "wider rows", "every other column", "one row", "offset")
OPS = ("dense", "dense", "4-bit", "4-bit", "mixed", "mixed 4-bit", "layer", "layer 4-bit")
FACTORS = ("gate", "core", "out_scale")
SPECIAL = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}


@dataclass(frozen=True)
class Spec:
    op: str
    lead: tuple[int, ...]
    K: int
    N: int
    ranks: tuple[int, ...]  # of each adapter; all but mixed batches have one
    dtypes: tuple[torch.dtype, torch.dtype]  # of x and W0, and of A and B
    wide: frozenset[str]  # what is fp32 beside a half-precision x
    layouts: dict[str, str]
    bias: bool
    factors: frozenset[str]
    gate_of_rows: bool
    train: frozenset[str]  # what requires grad
    scaling: float
    dropout_p: float
    training: bool
    prepack: bool
    autocast: torch.dtype | None
    special: tuple[str, str] | None  # a value, and which tensor has one
    quant: tuple[int, bool, str]
    seed: int

    @property
    def quantised(self) -> bool:
        return self.op.endswith("4-bit")

    @property
    def mixed(self) -> bool:
        return self.op.startswith("mixed")


@st.composite
def specs(draw: Any) -> Spec:
    op = draw(st.sampled_from(OPS))
    mixed, layer = op.startswith("mixed"), op.startswith("layer")
    sizes = st.sampled_from([n for n in SIZES if n or not (layer or op.endswith("4-bit"))])
    rank = st.sampled_from((1, 1, 2, 4, 8, 16, 17, 33, 64))
    names = ["x", "lora_A", "lora_B", "bias", *FACTORS]
    factors = frozenset() if mixed or layer else draw(st.sets(st.sampled_from(FACTORS)).map(frozenset))
    dtypes = [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)]
    return Spec(
        op=op,
        lead=draw(st.sampled_from(LEADS)),
        K=draw(sizes),
        N=draw(sizes),
        ranks=tuple(draw(st.lists(rank, min_size=1, max_size=4))) if mixed else (draw(rank),),
        dtypes=draw(st.sampled_from(dtypes if layer else [*dtypes, (F64, F64)])),
        wide=draw(st.sets(st.sampled_from(("weight", "bias", *FACTORS))).map(frozenset)),
        layouts={name: draw(st.sampled_from(LAYOUTS)) for name in (*names, "weight", "dy")},
        bias=draw(st.booleans()),
        factors=factors,
        gate_of_rows=draw(st.booleans()),
        train=draw(st.sets(st.sampled_from(names)).map(frozenset)),
        scaling=draw(st.sampled_from((0.0, 1.0, -0.5, 2.0, 1e-3, 7.0))),
        dropout_p=draw(st.sampled_from((0.0, 0.0, 0.05, 0.5, 1e-6, 0.99))),
        training=draw(st.booleans()),
        prepack=draw(st.booleans()),
        autocast=draw(st.sampled_from((None, None, BF16, F16))),
        special=draw(st.none() | st.tuples(st.sampled_from(list(SPECIAL)), st.sampled_from([*names, "weight", "dy"]))),
        quant=draw(st.tuples(st.sampled_from((32, 64, 256)), st.booleans(), st.sampled_from(("nf4", "fp4")))),
        seed=draw(st.integers(0, 2**31)),
    )


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same numbers, elsewhere in memory."""
    if t.dim() == 0 or t.numel() == 0 or layout == "contiguous":
        return t
    if layout == "transposed" and t.dim() > 1:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "wider rows":
        return torch.nn.functional.pad(t, (3, 2), value=torch.nan)[..., 3:-2]
    if layout == "every other column":
        return torch.stack([t, torch.full_like(t, torch.nan)], -1).flatten(-2)[..., ::2]
    if layout == "one row" and t.dim() > 1:  # one in memory, as often as it takes
        return t[:1].expand(t.shape)
    return torch.cat([t.new_full((1,), torch.nan), t.reshape(-1)])[1:].view(t.shape)


class Call:
    """A spec's tensors, and what comes out of the operator and out of reference.py."""

    def __init__(self, spec: Spec) -> None:
        self.spec, (dtype, adapter) = spec, spec.dtypes
        g, N, K, r = torch.Generator().manual_seed(spec.seed), spec.N, spec.K, max(spec.ranks)
        half = dtype in (BF16, F16)

        def normal(name: str, *size: int, std: float = 1.0, of: torch.dtype = dtype) -> Tensor:
            t = torch.randn(size, generator=g, dtype=F64) * std
            if spec.special and spec.special[1] == name and t.numel():
                t.view(-1)[int(torch.randint(t.numel(), (), generator=g))] = SPECIAL[spec.special[0]]
            of = F32 if half and name in spec.wide else of
            return laid_out(t.to(of), spec.layouts.get(name, "contiguous"))

        self.x, self.dy = normal("x", *spec.lead, K), normal("dy", *spec.lead, N)
        self.weight: Tensor | NF4Weight = normal("weight", N, K, std=max(K, 1) ** -0.5)
        if spec.quantised:
            self.weight = lora_ops.quantize_nf4(self.weight.nan_to_num(0, 1, -1).float(), *spec.quant)
        self.As = [normal("lora_A", r, K, std=max(K, 1) ** -0.5, of=adapter) for r in spec.ranks]
        self.Bs = [normal("lora_B", N, r, std=r**-0.5, of=adapter) for r in spec.ranks]
        self.bias = normal("bias", N) if spec.bias else None
        sizes = {"gate": (*spec.lead, r) if spec.gate_of_rows else (r,), "core": (r, r), "out_scale": (N,)}
        self.factors = {name: normal(name, *sizes[name]) if name in spec.factors else None for name in FACTORS}
        self.rows = torch.Size(spec.lead).numel()
        self.ids = torch.randint(-1, len(spec.ranks), spec.lead, generator=g) if spec.mixed else None
        self.scalings = [spec.scaling + i for i in range(len(spec.ranks))]

    def tensors(self) -> dict[str, Tensor]:
        """What may train."""
        named = {"x": self.x, **{f"lora_A{i}": t for i, t in enumerate(self.As)}}
        named |= {f"lora_B{i}": t for i, t in enumerate(self.Bs)} | {"bias": self.bias, **self.factors}
        return {name: t for name, t in named.items() if t is not None}

    def trains(self, name: str) -> bool:
        if self.spec.op.startswith("layer"):
            return name.startswith("lora_") or (name == "x" and "x" in self.spec.train)
        return name.rstrip("0123456789") in self.spec.train

    def run(self, device: str = "cpu") -> tuple[Tensor, dict[str, Tensor]]:
        """y, and the gradients of what trains."""
        spec = self.spec
        leaves = {n: t.detach().to(device).requires_grad_(self.trains(n)) for n, t in self.tensors().items()}
        weight = self.weight.to(device)
        options: dict[str, Any] = {"dropout_p": spec.dropout_p, "training": spec.training, "bias": leaves.get("bias")}
        if spec.op.startswith("layer"):
            layer = self.layer()
            leaves |= {"lora_A0": layer.lora_A["default"], "lora_B0": layer.lora_B["default"]}

        torch.manual_seed(spec.seed)
        with torch.autocast("cpu", spec.autocast or BF16, enabled=spec.autocast is not None):
            if spec.op.startswith("layer"):
                y = layer(leaves["x"])
            elif spec.mixed:
                bank = lora_ops.AdapterBank()
                for i, scaling in enumerate(self.scalings):
                    bank.add(str(i), leaves[f"lora_A{i}"], leaves[f"lora_B{i}"], scaling)
                assert self.ids is not None
                y = lora_ops.multi_lora_linear(leaves["x"], weight, bank, self.ids.to(device), **options)
            else:
                options |= {name: leaves.get(name) for name in FACTORS}
                if isinstance(weight, Tensor) and self.prepacks():
                    options["panels"] = lora_ops.pack_weight(weight, self.x.dtype)
                linear = lora_ops.qlora_linear if spec.quantised else lora_ops.lora_linear
                y = linear(leaves["x"], weight, leaves["lora_A0"], leaves["lora_B0"], scaling=spec.scaling, **options)
        wanted = {n: t for n, t in leaves.items() if t.requires_grad}
        if not wanted or not y.requires_grad:
            return y.detach(), {}
        grads = torch.autograd.grad(y, list(wanted.values()), self.dy.to(y), allow_unused=True)
        return y.detach(), {n: g for n, g in zip(wanted, grads, strict=True) if g is not None}

    def prepacks(self) -> bool:
        spec = self.spec
        return spec.prepack and spec.op == "dense" and spec.autocast is None and self.x.dtype != F64 and spec.N * spec.K > 0

    def layer(self) -> lora_ops.FusedLoraLinear:
        spec = self.spec
        linear = torch.nn.Linear(spec.K, spec.N, bias=spec.bias, dtype=self.x.dtype)
        if isinstance(self.weight, Tensor):
            self.weight = self.weight.to(self.x.dtype)
            linear.weight.data = self.weight
        if self.bias is not None:
            self.bias = self.bias.to(self.x.dtype)
            linear.bias.data = self.bias
        blocksize, double_quant, quant = spec.quant
        options: dict[str, Any] = {"prepack": spec.prepack} if not spec.quantised else {
            "quant": quant, "blocksize": blocksize, "double_quant": double_quant,
        }  # fmt: skip
        layer = lora_ops.FusedLoraLinear.from_linear(
            linear, spec.ranks[0], lora_alpha=8.0, lora_dropout=spec.dropout_p, adapter_dtype=self.As[0].dtype, **options
        )
        if isinstance(self.weight, NF4Weight):
            layer.load_state_dict(layer.state_dict() | self.weight.to(dtype=linear.weight.dtype).to_bitsandbytes())
        with torch.no_grad():
            layer.lora_A["default"].copy_(self.As[0])
            layer.lora_B["default"].copy_(self.Bs[0])
        self.scalings = [8.0 / spec.ranks[0]]
        return layer.train(spec.training)

    def exact(self, *, magnitudes: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """y and every gradient in float64; or the sums of the absolute values of their terms."""
        spec = self.spec
        with torch.autocast("cpu", spec.autocast or BF16, enabled=spec.autocast is not None):
            cast = autocast_dtype(self.x)

        def given(t: Tensor, rounded: bool = False) -> Tensor:
            if cast is not None and (rounded or t.dtype not in (cast, F32)):
                t = t.to(cast)
            return t.double().abs() if magnitudes else t.double()

        W = self.weight.dequantize(F64) if isinstance(self.weight, NF4Weight) else given(self.weight)
        W = W.abs() if magnitudes else W
        As, Bs = [given(t) for t in self.As], [given(t) for t in self.Bs]
        x, dy = given(self.x, True).reshape(self.rows, spec.K), given(self.dy.to(self.dtype)).reshape(self.rows, spec.N)
        b = None if self.bias is None else given(self.bias)
        scalings = [abs(s) if magnitudes else s for s in self.scalings]
        seed, p = None, spec.dropout_p if spec.training else 0.0
        if p:
            torch.manual_seed(spec.seed)
            seed = torch.randint(0, 2**62, (), dtype=torch.int64)
        if self.ids is not None:
            ids, count = self.ids.reshape(-1), len(As)
            y, S = reference.multi_lora_forward(x, W, As, Bs, scalings, ids, b, p, seed)
            need = (True, [True] * count, [True] * count, True)
            dx, dA, dB, dbias = reference.multi_lora_backward(dy, x, W, As, Bs, scalings, ids, S, p, seed, need=need)
            grads = {"x": dx, "bias": dbias}
            grads |= {f"lora_A{i}": t for i, t in enumerate(dA)} | {f"lora_B{i}": t for i, t in enumerate(dB)}
        else:
            gate, core, scale = (None if t is None else given(t) for t in self.factors.values())
            gate = gate.reshape(self.rows, spec.ranks[0]) if gate is not None and gate.dim() != 1 else gate
            y, S, z = reference.lora_general_forward(x, W, As[0], Bs[0], b, gate, core, scale, scalings[0], p, seed)
            need = (True,) * 4 + tuple(t is not None for t in (gate, core, scale))
            by_place = reference.lora_general_backward(
                dy, x, W, As[0], Bs[0], gate, core, scale, S, z, scalings[0], p, seed, need=need
            )
            grads = dict(zip(("x", "lora_A0", "lora_B0", "bias", *FACTORS), by_place, strict=True))
        shaped = {n: grads[n].reshape(t.shape) for n, t in self.tensors().items()}  # type: ignore[union-attr]
        return y.reshape(*spec.lead, spec.N), shaped

    @property
    def dtype(self) -> torch.dtype:
        """Of y."""
        return self.spec.autocast if self.spec.autocast is not None and self.x.dtype != F64 else self.x.dtype

    def check(self) -> None:
        y, grads = self.run()
        exact_y, exact = self.exact()
        sums_y, sums = self.exact(magnitudes=True)
        tensors = self.tensors()
        self._close("y", y, exact_y, sums_y, self.dtype)
        assert grads.keys() == {n for n in tensors if self.trains(n) and self._is_reached(n)}
        for name, grad in grads.items():
            self._close(name, grad, exact[name], sums[name], tensors[name].dtype)
        if not self.spec.op.startswith("layer") and self.spec.autocast is None and not self.prepacks():
            on_meta, _ = self.run("meta")
            assert (on_meta.shape, on_meta.dtype) == (y.shape, y.dtype)

    def _is_reached(self, name: str) -> bool:
        """An adapter that no row has gets no gradient."""
        if self.ids is None or not name.startswith("lora_"):
            return True
        return int(name.removeprefix("lora_A").removeprefix("lora_B")) in self.ids.reshape(-1).tolist()

    def _close(self, name: str, actual: Tensor, exact: Tensor, sums: Tensor, dtype: torch.dtype) -> None:
        assert (actual.dtype, actual.shape) == (dtype, exact.shape), name
        rounded = exact.to(dtype)
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(actual), kind(rounded)), f"{name}: {kind.__name__} in other places"
        spec, info = self.spec, torch.finfo(dtype)
        terms = spec.K + spec.N + self.rows + 2 * sum(spec.ranks) + 8
        unit = terms * torch.finfo(F64 if self.x.dtype == F64 else F32).eps
        if spec.quantised and self.dtype in (BF16, F16):  # codes are rounded where products are in half precision
            unit += torch.finfo(self.dtype).eps
        if ops.base_on_torch(self.dtype):  # which rounds its product, and a wide weight
            unit += 2 * torch.finfo(self.dtype).eps
        # Rounded on the way: dz = dy ∘ out_scale and, for its gradient, z; under autocast, what goes back through a cast.
        if name != "y" and (spec.factors & {"out_scale"} or self.dtype != self.x.dtype or spec.autocast):
            unit += 2 * max(torch.finfo(self.dtype).eps, torch.finfo(self.As[0].dtype).eps)
        smallest = max(torch.finfo(t).smallest_normal * torch.finfo(t).eps for t in (dtype, self.dtype))
        bound = unit * sums + info.eps * exact.abs() + smallest
        off = (actual.double() - exact).abs()
        finite = rounded.isfinite()
        wrong = (off > bound) & finite
        if wrong.any():
            i = int(((off / bound).nan_to_num(0) * finite).argmax())
            flat = (t.reshape(-1)[i].item() for t in (actual, exact, bound))
            raise AssertionError("{}: got {}, exact {}, may be off by {}, {} are wrong".format(name, *flat, int(wrong.sum())))
