"""Training in 2 and 4 processes is training in one: losses, gradients, the optimiser's state, and what was sent on the way.

The processes are real and talk over gloo; the model is a small Llama (distributed_runs.py).
"""

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed_runs import BATCH, LENGTH, MICROBATCHES, SIZES, Result, Run, trained
from tiny_models import VOCABULARY
from torch import Tensor
from workers import Workers

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import communication

LOSS = 1e-5  # at every step, of the loss
GRADIENT = 1e-5  # of a tensor's largest element
MOMENT = 1e-4  # likewise, of squares, after steps of AdamW in which tiny gradients count as much as large ones
MODEL = communication.Llama(
    hidden=SIZES["hidden_size"], intermediate=SIZES["intermediate_size"], layers=SIZES["num_hidden_layers"],
    vocabulary=VOCABULARY, kv=SIZES["hidden_size"], r=4, weight_bytes=4,
)  # fmt: skip
TOKENS = BATCH * LENGTH

every_quant = pytest.mark.parametrize("quant", [None, "nf4"])
worlds = pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])


Together = Callable[[int, Run], list[Result]]


@pytest.fixture(scope="module")
def together() -> Iterator[Together]:
    """A run by so many processes, once for all tests that ask for it."""
    groups = {world: Workers(world) for world in (2, 4)}
    yield functools.cache(lambda world, run: groups[world].run(trained, run))
    for group in groups.values():
        group.stop()


@functools.cache
def alone(run: Run) -> Result:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return trained(replace(run, layout="one"))
    finally:
        torch.set_num_threads(threads)


def assert_losses(actual: list[float], expected: list[float]) -> None:
    assert len(actual) == len(expected) > 0
    worst = max(abs(a / e - 1) for a, e in zip(actual, expected, strict=True))
    assert worst <= LOSS, f"losses {actual}, expected {expected}"


def assert_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float = GRADIENT) -> None:
    assert actual.keys() == expected.keys()
    for name, e in expected.items():
        error = ((actual[name] - e).abs().max() / e.abs().max()).item()
        assert error <= bound, f"{name}: {error:.2g}"


def of_all(results: list[Result]) -> dict[str, Tensor]:
    """Gradients of all processes: the stages of a pipeline have different parameters."""
    return {name: t for result in results for name, t in result.gradients.items()}


@worlds
@every_quant
@pytest.mark.parametrize("layout", ["ddp", "fsdp", "fsdp adapters", "tp", "pp"])
def test_several_processes_are_one(layout: str, quant: str | None, world: int, together: Together) -> None:
    run = Run(layout, quant)
    results, expected = together(world, run), alone(run)
    for result in results:
        assert_losses(result.losses, expected.losses)
        if layout != "pp":
            assert result.norm == pytest.approx(expected.norm, rel=1e-5)
    assert_tensors(of_all(results), expected.gradients)
    assert expected.losses[-1] < 0.8 * expected.losses[0]  # the steps count


@pytest.mark.slow
@every_quant
def test_two_ways_at_once(quant: str | None, together: Together) -> None:
    run = Run("fsdp and tp", quant)
    results, expected = together(4, run), alone(run)
    for result in results:
        assert_losses(result.losses, expected.losses)
        assert_tensors(result.gradients, expected.gradients)


@every_quant
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_dora_has_the_norms_of_whole_rows(layout: str, quant: str | None, together: Together) -> None:
    """They are kept from the first call on, of weights that come and go under fully_shard."""
    run = Run(layout, quant, steps=2, dora=True)
    expected = alone(run)
    for result in together(2, run):
        assert_losses(result.losses, expected.losses)
        assert_tensors(result.gradients, expected.gradients)


@every_quant
def test_a_half_precision_base_is_sharded_beside_fp32_adapters(quant: str | None, together: Together) -> None:
    """In one all-gather, of bf16, of fp32 and of bytes. The processes do DDP's arithmetic."""
    run = Run("fsdp", quant, steps=2, dtype=torch.bfloat16)
    results, expected = together(2, run), together(2, replace(run, layout="ddp"))
    for result, other in zip(results, expected, strict=True):
        assert_losses(result.losses, other.losses)
        assert_tensors(result.gradients, other.gradients)
        assert all(g.dtype == torch.float32 for g in result.gradients.values())
    blocks = SIZES["num_hidden_layers"]
    assert results[0].calls == {"all_gather": 1 + 2 * blocks, "reduce_scatter": blocks}


# --- what is sent -------------------------------------------------------------------------------------------------------


def formula(run: Run, world: int, rank: int) -> communication.Volume:
    full, nf4 = run.full, run.quant is not None
    return {
        "ddp": lambda: communication.ddp(MODEL, full=full),
        "fsdp": lambda: communication.fsdp(MODEL, world, full=full, nf4=nf4),
        "fsdp adapters": lambda: communication.fsdp_adapters(MODEL),
        "tp": lambda: communication.tensor_parallel(MODEL, TOKENS, full=full),
        "pp": lambda: communication.pipeline(MODEL, TOKENS, world, rank),
    }[run.layout]()


# A run's last step: in the first two, stages tell each other what they will send, and DDP its buckets.
KINDS = [Run(layout, quant) for layout in ("ddp", "fsdp", "fsdp adapters", "tp", "pp") for quant in (None, "nf4")]
KINDS += [Run(layout, full=True, steps=3) for layout in ("ddp", "fsdp", "tp", "pp")]


@worlds
@pytest.mark.parametrize("run", KINDS, ids=lambda run: f"{run.layout}-{'full' if run.full else run.quant or 'lora'}")
def test_bytes_are_the_formulas(run: Run, world: int, together: Together) -> None:
    for rank, result in enumerate(together(world, run)):
        assert result.bytes == formula(run, world, rank)


@every_quant
@pytest.mark.parametrize("layout", ["ddp", "fsdp", "fsdp adapters", "tp", "pp"])
def test_no_gradient_is_sent_but_the_adapters(layout: str, quant: str | None, together: Together) -> None:
    """Gradients are what is reduced. Under tensor parallelism activations are, too: the number of sums tells them apart, one
    for each adapter matrix that every process has as a whole."""
    result, expected = together(2, Run(layout, quant))[0], alone(Run("one", quant))
    adapters = sum(g.nbytes for g in expected.gradients.values())
    blocks = SIZES["num_hidden_layers"]
    if layout == "pp":
        assert result.calls == {"send": MICROBATCHES}
    elif layout == "tp":
        assert result.calls == {"all_reduce": 7 * blocks + 4 * blocks - 1}
        activations = (4 * blocks - 1) * TOKENS * SIZES["hidden_size"] * 4
        assert 0 < result.bytes["all_reduce"] - activations < adapters
    else:
        assert result.bytes["all_reduce" if layout == "ddp" else "reduce_scatter"] == adapters
        assert set(result.calls) <= {"all_reduce", "reduce_scatter", "all_gather"}


# --- checkpoints --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        ("fsdp", [(1, "one"), (2, "tp")]),
        pytest.param("fsdp", [(4, "fsdp"), (4, "tp")], marks=pytest.mark.slow),
        pytest.param("ddp", [(1, "one"), (4, "ddp"), (4, "fsdp")], marks=pytest.mark.slow),
        pytest.param("tp", [(1, "one"), (4, "tp"), (4, "ddp")], marks=pytest.mark.slow),
    ],
    ids=str,
)
@every_quant
def test_resumes_at_another_world_size(
    saved: str, resumed: list[tuple[int, str]], quant: str | None, together: Together, tmp_path: Path
) -> None:
    """Saved by two processes after two steps of AdamW; two more steps anywhere else are those of a run without a break."""
    expected = alone(Run("one", quant))
    first = Run(saved, quant, steps=2, save=str(tmp_path))
    assert_losses(together(2, first)[0].losses, expected.losses[:2])
    for world, layout in resumed:
        rest = Run(layout, quant, steps=2, resume=str(tmp_path))
        results = together(world, rest) if world > 1 else [trained(rest)]
        for result in results:
            assert_losses(result.losses, expected.losses[2:])
            assert_tensors(result.moments, expected.moments, MOMENT)
