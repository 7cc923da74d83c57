"""ComPEFT: three values, one scale, in a file."""

import math
from pathlib import Path

import pytest
import torch
from no_room import full_disk
from safetensors.torch import save_file
from tiny_models import Mlp, injected
from torch import Tensor

from lora_ops.compose import TernaryTensors, adapter_tensors, compress, set_adapter_tensors


def drawn(*shapes: tuple[int, ...]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {f"t{i}": torch.randn(shape, generator=g) for i, shape in enumerate(shapes)}


@pytest.mark.parametrize("density", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("alpha", [1.0, 2.5])
def test_ternary_with_one_scale(density: float, alpha: float) -> None:
    tensors = drawn((8, 30), (50, 8), (3,))
    tensors["t1"] *= 10  # the largest of all together are not the largest of each
    task = torch.cat([t.flatten() for t in tensors.values()])
    compressed = compress(tensors, density, alpha)
    result = compressed.decompress()
    values = torch.cat([t.flatten() for t in result.values()])
    assert [t.shape for t in result.values()] == [t.shape for t in tensors.values()]
    scale = alpha * task.std().item()
    assert set(values.tolist()) == ({-scale, scale} if density == 1 else {-scale, 0.0, scale}) or len(values.unique()) <= 3
    torch.testing.assert_close(values.abs().max(), torch.tensor(scale))
    kept = values != 0
    assert kept.sum() == int(density * task.numel())
    assert torch.equal(values.sign()[kept], task.sign()[kept])
    if density < 1:
        assert task[kept].abs().min() >= task[~kept].abs().max()


@pytest.mark.parametrize("n", [2, 4, 5, 6, 11])
def test_files_and_sizes(n: int, tmp_path: Path) -> None:
    tensors = drawn((n,))
    compressed = compress(tensors, 0.5)
    assert compressed.bits == 8 * math.ceil(n / 5) + 32
    compressed.save(tmp_path / "adapter.safetensors")
    loaded = TernaryTensors.load(tmp_path / "adapter.safetensors")
    assert loaded.shapes == {"t0": (n,)}
    assert torch.equal(loaded.decompress()["t0"], compressed.decompress()["t0"])
    torch.testing.assert_close(loaded.decompress(torch.float64)["t0"].float(), compressed.decompress()["t0"])


def test_bits_of_a_perfect_code() -> None:
    compressed = compress(drawn((1000,)), 0.25)
    entropy = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert math.isclose(compressed.entropy_bits, 1000 * (entropy + 0.25) + 32)
    assert compressed.entropy_bits < compressed.bits < 32 * 1000 / 19


def test_a_model_s_adapter() -> None:
    torch.manual_seed(0)
    model = injected(Mlp())
    x = torch.randn(3, 12)
    tensors = adapter_tensors(model)
    assert tensors["block.0.lora_A"].shape == (4, 16)
    ternary = compress(tensors, 0.3).decompress()
    before = model(x)
    set_adapter_tensors(model, ternary)
    assert not torch.allclose(model(x), before)
    assert all(torch.equal(t, ternary[name]) for name, t in adapter_tensors(model).items())
    again = compress(ternary, 0.3).decompress()
    assert all(torch.equal(t.sign(), ternary[name].sign()) for name, t in again.items())


def test_errors(tmp_path: Path) -> None:
    tensors = drawn((4,))
    for density in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"density must be in .*got {density}"):
            compress(tensors, density)
    with pytest.raises(ValueError, match="alpha must be a positive number, got 0"):
        compress(tensors, 0.5, 0.0)
    for bad in ({}, {"t": torch.tensor([1.0, math.nan])}):
        with pytest.raises(ValueError, match="finite values"):
            compress(bad, 0.5)
    save_file({"packed": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"other must hold packed, scale and shapes"):
        TernaryTensors.load(tmp_path / "other")
    compressed = compress(drawn((20,)), 0.5)
    TernaryTensors(1.0, compressed.packed[:-1], compressed.shapes).save(tmp_path / "short")
    with pytest.raises(ValueError, match="short is damaged: 3 bytes for 20 elements"):
        TernaryTensors.load(tmp_path / "short")
    model = injected(Mlp())
    with pytest.raises(ValueError, match=r"block\.0\.lora_A is not in both"):
        set_adapter_tensors(model, {})
    wrong = {**adapter_tensors(model), "block.0.lora_A": torch.ones(2, 2)}
    with pytest.raises(ValueError, match=r"must have shape \(4, 16\), got \(2, 2\)"):
        set_adapter_tensors(model, wrong)
    with pytest.raises(ValueError, match="got 'other'"):
        adapter_tensors(model, "other")


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "adapter.safetensors"
    TernaryTensors(1.0, torch.zeros(1, dtype=torch.uint8), {"t": (5,)}).save(path)
    before = path.read_bytes()
    with full_disk(100), pytest.raises(OSError, match=r"adapter.safetensors is not written, and what was there stays"):
        TernaryTensors(2.0, torch.zeros(1, dtype=torch.uint8), {"t": (5,)}).save(path)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [before]
