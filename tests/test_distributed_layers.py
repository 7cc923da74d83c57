"""What lora_ops.distributed does to a layer: parts that are the whole, files, 4-bit weights, errors before any change."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_runs import Run, make_model, plan, shard, whole
from tiny_models import assert_untouched, injected, llama, snapshot
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D
from workers import Workers

import lora_ops
from lora_ops import FusedLoraLinear
from lora_ops.distributed import AdapterState, ColwiseLora, RowwiseLora, register_4bit

K, N, R, ROWS = 128, 64, 4, 6
STYLES = {"columns": ColwiseLora, "rows": RowwiseLora}


@pytest.fixture(scope="module")
def two():
    workers = Workers(2)
    yield workers
    workers.stop()


def make_layer(conv1d: bool = False, **options: Any) -> FusedLoraLinear:
    """Everything of it trains that can, and does something."""
    torch.manual_seed(0)
    layer = FusedLoraLinear.from_linear(Conv1D(N, K) if conv1d else nn.Linear(K, N), R, lora_alpha=2, **options)
    layer.bias.requires_grad_(True)
    for parameters in (layer.lora_B, layer.lora_B_bias):
        for p in parameters.values():
            nn.init.normal_(p)
    return layer


def make_x() -> Tensor:
    return torch.randn(2, ROWS, K, generator=torch.Generator().manual_seed(1), requires_grad=True)


def results(layer: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """y, and the gradients of a loss that tells its elements apart."""
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    gradients = {name: whole(p.grad) for name, p in layer.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad, **gradients}


def in_parts(style: str, options: dict[str, Any], along: int | None, checkpointed: bool) -> dict[str, Tensor]:
    mesh, layouts = init_device_mesh("cpu", (2,)), Replicate() if along is None else Shard(along)
    layer, x = make_layer(**options), make_x()
    layer = parallelize_module(layer, mesh, STYLES[style](input_layouts=layouts, output_layouts=layouts))
    mine = x if along is None else x.chunk(2, along)[dist.get_rank()]
    torch.manual_seed(2)
    y = checkpoint(layer, mine, use_reentrant=False) if checkpointed else layer(mine)
    assert type(y) is not DTensor
    # As a whole everywhere; every process has the whole loss.
    total = DTensor.from_local(y, mesh, [layouts]).redistribute(placements=[Replicate()]).to_local()
    found = results(layer, x, total)
    if along is not None:
        dist.all_reduce(found["x"])  # a process has its own rows' gradient
    return found


OPTIONS = {
    "dense": {},
    "nf4": {"quant": "nf4"},
    "lora_bias": {"lora_bias": True, "init_lora_weights": False},
    "dora": {"use_dora": True},
    "prepack": {"prepack": True},
    "conv1d": {"conv1d": True},
}


@pytest.mark.parametrize("along", [None, 1], ids=["whole", "sequence"])
@pytest.mark.parametrize(("style", "kind"), [(s, k) for s in STYLES for k in OPTIONS if (s, k) != ("rows", "dora")])
def test_parts_are_the_layer(kind: str, along: int | None, style: str, two: Workers) -> None:
    expected = results(layer := make_layer(**OPTIONS[kind]), x := make_x(), layer(x))
    for found in two.run(in_parts, style, OPTIONS[kind], along, kind == "dense"):
        assert found.keys() == expected.keys()
        for name, e in expected.items():
            torch.testing.assert_close(found[name], e, rtol=1e-5, atol=1e-5 * e.abs().max().item(), msg=name)


def test_a_whole_input_is_masked_alike_everywhere(two: Workers) -> None:
    options = {"lora_dropout": 0.5}
    layer, x = make_layer(**options), make_x()
    torch.manual_seed(2)
    expected = results(layer, x, layer(x))
    for found in two.run(in_parts, "columns", options, None, False):
        for name, e in expected.items():
            torch.testing.assert_close(found[name], e, rtol=1e-5, atol=1e-5 * e.abs().max().item(), msg=name)


def masks(steps: int) -> tuple[list[Tensor], Tensor]:
    """Which of its columns a process shows to A, and what its generator gives next."""
    layer = FusedLoraLinear(64, 32, r=1, lora_alpha=1, lora_dropout=0.5, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A["default"].fill_(1)
        layer.lora_B["default"].fill_(1)
    mesh, x = init_device_mesh("cpu", (2,)), torch.eye(32)
    # x's rows are this process's columns, and what each alone gives is left apart.
    parallelize_module(layer, mesh, RowwiseLora(output_layouts=Partial()))
    torch.manual_seed(3)
    with torch.no_grad():
        seen = [layer(x)[:, 0] != 0 for _ in range(steps)]
    return seen, torch.rand(())


def test_parts_of_an_input_are_masked_each_in_its_own_way(two: Workers) -> None:
    (first, next_first), (second, next_second) = two.run(masks, 2)
    for mask in (*first, *second):
        assert 4 < mask.sum() < 28
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[0], first[1])
    assert torch.equal(next_first, next_second)


# --- files --------------------------------------------------------------------------------------------------------------


def save(layout: str, quant: str | None, directory: str) -> str:
    mesh, model = init_device_mesh("cpu", (2,)), make_model(Run("one", quant))
    if layout == "tp":
        parallelize_module(model, mesh, plan())
    else:
        if quant:
            register_4bit(model)
        shard(model, mesh)
    return str(lora_ops.save_adapter(model, directory))


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("layout", ["fsdp", "tp"])
def test_a_sharded_adapter_is_saved_as_a_whole_one(layout: str, quant: str | None, two: Workers, tmp_path: Path) -> None:
    assert two.run(save, layout, quant, str(tmp_path / "sharded")) == [str(tmp_path / "sharded")] * 2
    lora_ops.save_adapter(make_model(Run("one", quant)), tmp_path / "whole")
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "sharded").iterdir()) == files
    for name in files:
        assert (tmp_path / "sharded" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def sharded_state(layout: str) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shapes of what a model's state dict has in this process, and what goes wrong with a weight that is not whole."""
    mesh, model = init_device_mesh("cpu", (2,)), make_model(Run("one", "nf4"))
    if layout == "tp":
        parallelize_module(model, mesh, plan())
    else:
        shard(register_4bit(model), mesh)
    model.load_state_dict(model.state_dict())
    layer, errors = model.model.layers[0].mlp.up_proj, []
    of_whole = [layer.weight.dequantize, lambda: layer.weight.to_bitsandbytes()] if layout == "fsdp" else []
    more = [lambda: layer.add_adapter("other", 4)] if layout == "tp" else []
    for use in (layer.merge, *of_whole, *more):
        try:
            use()
        except RuntimeError as error:
            errors.append(str(error))
    return {
        name: tuple(t.to_local().shape if isinstance(t, DTensor) else t.shape) for name, t in model.state_dict().items()
    }, errors


def test_state_of_sharded_4bit_weights(two: Workers) -> None:
    """fully_shard: by rows, all of it. Tensor parallelism: nobody has the weight; its adapter is there."""
    name = "model.layers.0.mlp.up_proj"
    state, errors = two.run(sharded_state, "fsdp")[0]
    assert state[f"{name}.qweight.codes"] == (128, 64)
    assert state[f"{name}.qweight.absmax"] == (256 * 128 // 64 // 2,)
    assert f"{name}.weight" not in state
    assert len(errors) == 3
    assert "registered" in errors[0] and "a sharded weight cannot be read as a whole" in errors[1]
    state, errors = two.run(sharded_state, "tp")[0]
    assert [key for key in state if key.startswith(name)] == [f"{name}.lora_A.default", f"{name}.lora_B.default"]
    assert state[f"{name}.lora_B.default"] == (128, 4)
    assert len(errors) == 2
    assert "this one is split" in errors[0] and 'adapter "other" comes too late' in errors[1]


# --- register_4bit ------------------------------------------------------------------------------------------------------


def test_a_registered_model_computes_what_it_did() -> None:
    model, ids = injected(llama(), quant="nf4", use_dora=True), torch.arange(12).view(2, 6)
    before, names = model(input_ids=ids).logits, {name for name, _ in model.named_parameters()}
    layers = dict(lora_ops.lora_layers(model))
    assert register_4bit(model) is model
    assert register_4bit(model) is model
    assert torch.equal(model(input_ids=ids).logits, before)
    assert dict(lora_ops.lora_layers(model)) == layers
    new = {name: p for name, p in model.named_parameters() if name not in names}
    tensors = ("codes", "absmax", "nested_absmax", "nested_code", "offset")
    assert set(new) == {f"{name}.qweight.{t}" for name in layers for t in tensors}
    assert not any(p.requires_grad for p in new.values())
    other = register_4bit(injected(llama(), quant="nf4", use_dora=True))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(input_ids=ids).logits, before)


def test_a_cast_leaves_registered_scales_alone() -> None:
    model = injected(nn.Sequential(nn.Linear(64, 64)), quant="nf4")
    weight = model[0].weight.dequantize()
    register_4bit(model).to(torch.bfloat16)
    assert model[0].bias.dtype == torch.bfloat16
    assert torch.equal(model[0].weight.dequantize(), weight)


def merged(**options: Any) -> nn.Module:
    return lora_ops.merge_lora(injected(llama(), **options))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: injected(llama()), "model has no layer with a 4-bit weight"),
        (lambda: merged(quant="nf4"), r"q_proj is merged; call unmerge_lora"),
        (
            lambda: injected(llama(), quant="nf4", init_lora_weights="loftq"),
            "q_proj has an adapter with a weight of its own",
        ),
    ],
)
def test_what_cannot_be_registered(make: Any, message: str) -> None:
    before = snapshot(model := make())
    with pytest.raises(ValueError, match=message):
        register_4bit(model)
    assert_untouched(model, before)


def test_nothing_trains() -> None:
    with pytest.raises(ValueError, match="model has no parameter that trains"):
        AdapterState(nn.Linear(2, 2).requires_grad_(False))


# --- tensor parallelism -------------------------------------------------------------------------------------------------


def refuse(style: str, options: dict[str, Any], shape: tuple[int, int], merge: bool) -> str:
    layer: nn.Module = (
        FusedLoraLinear.from_linear(nn.Linear(*shape), R, **options) if options is not None else nn.Linear(*shape)
    )
    if merge:
        layer.merge()
    before = snapshot(layer)
    try:
        parallelize_module(layer, init_device_mesh("cpu", (2,)), STYLES[style]())
    except (ValueError, TypeError) as error:
        assert_untouched(layer, before)
        assert type(layer) in (FusedLoraLinear, nn.Linear)
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("style", "options", "shape", "merge", "message"),
    [
        ("columns", None, (64, 64), False, "TypeError: ColwiseLora splits FusedLoraLinears, got Linear"),
        ("columns", {}, (64, 63), False, "ValueError: out_features must be a multiple of the 2 processes, got 63"),
        ("rows", {}, (63, 64), False, "ValueError: in_features must be a multiple of the 2 processes, got 63"),
        ("rows", {}, (64, 64), True, "ValueError: RowwiseLora needs a layer that is not merged"),
        ("columns", {"init_lora_weights": "pissa"}, (64, 64), False, "ValueError: ColwiseLora needs adapters beside W0"),
        ("rows", {"use_dora": True}, (64, 64), False, "ValueError: RowwiseLora cannot split DoRA"),
        ("columns", {"quant": "nf4"}, (40, 6), False, "ValueError: rows of 40 from 3 on: the cut must fall"),
        ("rows", {"quant": "nf4"}, (96, 64), False, r"ValueError: columns \d+ to \d+ of 96: the cut must fall"),
    ],
)
def test_what_cannot_be_split(
    style: str, options: dict[str, Any] | None, shape: tuple[int, int], merge: bool, message: str, two: Workers
) -> None:
    assert all(re.match(message, found) for found in two.run(refuse, style, options, shape, merge))
