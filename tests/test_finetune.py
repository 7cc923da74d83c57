"""examples/finetune.py on a tiny random Llama: the whole script as a user runs it, what it writes, and its verdict."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_language import tiny_llama, write_inputs
from tiny_models import assert_as_exact
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_ops

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import _report  # noqa: E402
import _run  # noqa: E402
import finetune  # noqa: E402

STEPS, LENGTH = 3, 32
OPTIONS = ["--steps", STEPS, "--length", LENGTH, "--r", 4, "--lr", 0.01, "--threads", 1]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("finetune"))


def fine_tune(inputs: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, EXAMPLES / "finetune.py", "--model", inputs / "model", "--text", inputs / "text.txt"]
    command += ["--out", out, *OPTIONS, *options]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def run(inputs: Path) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The finished script and its output directory."""
    return fine_tune(inputs, inputs / "out", "--dtype", "float32"), inputs / "out"


def test_the_script_ends_well(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """Exit status 0, a verdict per pair, and every file that the script promises."""
    done, out = run
    assert done.returncode == 0, done.stderr
    dense, quant = done.stdout.splitlines()[-2:]
    assert dense.startswith("VERDICT: PEFT and lora_ops agree")
    assert quant.startswith("VERDICT: PEFT + bitsandbytes and lora_ops NF4 agree")
    assert sorted(p.name for p in out.iterdir()) == ["adapter", "loss.png", "loss.svg", "results.json"]
    assert sorted(p.name for p in (out / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (out / "loss.svg").read_text()


def results_of(out: Path) -> dict[str, dict[str, Any]]:
    return json.loads((out / "results.json").read_text())


def test_all_runs_train(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """A figure for every step, and a held-out loss that falls; the frozen model's does not exist."""
    results = results_of(run[1])
    assert list(results) == ["PEFT", "lora_ops", "PEFT + bitsandbytes", "lora_ops NF4", "frozen"]
    for name, side in results.items():
        assert len(side["losses"]) == len(side["seconds"]) == STEPS
        assert side["decoded_tokens_per_s"] > 0
        if name != "frozen":
            assert side["held_out_after"] < side["held_out_before"] - 0.01
            assert side["peak_mib"] > 0


def test_4_bit_runs_are_in_4_bits(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """Both in the same: before training they lose what the other loses, and not what the dense model loses."""
    results = results_of(run[1])
    theirs, ours, dense = (results[name] for name in ("PEFT + bitsandbytes", "lora_ops NF4", "lora_ops"))
    assert ours["held_out_before"] == pytest.approx(theirs["held_out_before"], rel=1e-5)
    assert ours["held_out_before"] != pytest.approx(dense["held_out_before"], rel=1e-3)
    layers, weights = 2 * 7, 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    for side, code in ((theirs, 16 * 4), (ours, 0)):
        # Codes and scales; per layer their one scale, their offset, and the tables: bitsandbytes keeps that of the codes too.
        nbytes = weights / 2 + weights / 64 + layers * (4 + 4 + 256 * 4 + code)
        assert side["bits_per_weight"] == pytest.approx(8 * nbytes / weights)
        assert dense["weights_mib"] - side["weights_mib"] == pytest.approx((4 * weights - nbytes) / 2**20)
    assert dense["bits_per_weight"] is None


def test_both_sides_train_alike(inputs: Path, tmp_path: Path) -> None:
    """In float64 every loss is PEFT's: the same A, data, scaling and optimiser.

    In float32 AdamW makes a whole step of a gradient that is nothing but rounding, so that chance decides how far two
    runs part; what the kernels' rounding costs a model is measured in test_injected_models.py. transformers computes the
    loss itself in float32: its unit in the last place is the bound. There is no 4-bit run in float64.
    """
    done = fine_tune(inputs, tmp_path, "--dtype", "float64", "--quant", "none")
    assert done.returncode == 0, done.stderr
    results = results_of(tmp_path)
    assert list(results) == ["PEFT", "lora_ops", "frozen"]
    expected, actual = (
        np.array([*side["losses"], side["held_out_before"], side["held_out_after"]])
        for side in (results["PEFT"], results["lora_ops"])
    )
    assert (np.abs(actual - expected) <= np.spacing(np.float32(expected))).all(), actual - expected


def test_held_out_losses_leave_bitsandbytes_fit_to_train(inputs: Path) -> None:
    """A forward pass in eval mode would repack its weights, and gradients would stop there."""
    options = finetune.parse([str(word) for word in OPTIONS])
    run = _run.Run("PEFT + bitsandbytes", str(inputs / "model"), options)
    ids = np.arange(2 * LENGTH).reshape(2, LENGTH)

    def gradients() -> list[torch.Tensor]:
        tokens = torch.from_numpy(ids)
        loss = run.model.train()(input_ids=tokens, labels=tokens).loss
        return list(torch.autograd.grad(loss, [p for p in run.model.parameters() if p.requires_grad]))

    before = gradients()
    run.held_out(ids)
    assert any(g.abs().max() > 0 for g in before)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), before, strict=True))


def test_rows_that_bitsandbytes_gets_wrong(tmp_path: Path) -> None:
    """Are refused, by the layer's name."""
    tiny_llama(96).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj has rows of 96 weights"):
        _run.load_in_4_bits(str(tmp_path), torch.float32)


def test_peft_reads_the_adapter(inputs: Path, run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """From the files alone, and computes what lora_ops computes with them."""
    base, out = inputs / "model", run[1]
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight" in tensors
    assert len(tensors) == 2 * 7 * 2

    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out / "adapter").eval()
    config = lora_ops.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    ours = lora_ops.add_lora(AutoModelForCausalLM.from_pretrained(base), config).eval()
    state = {k.removeprefix("base_model.model.").replace(".weight", ".default"): v for k, v in tensors.items()}
    assert not ours.load_state_dict(state, strict=False).unexpected_keys

    ids = torch.tensor([AutoTokenizer.from_pretrained(base)("Paragraph 99: the lazy fox")["input_ids"]])
    with torch.no_grad():
        expected, actual = theirs(ids).logits, ours(ids).logits
        exact = copy.deepcopy(theirs).double()(ids).logits
        with theirs.disable_adapter():
            plain = theirs(ids).logits
    assert_as_exact([(actual, expected, exact)])
    assert (expected - plain).abs().max() > 0.1


@pytest.mark.parametrize(
    ("ours", "dropout", "bits", "agree"),
    [
        ([2.0, 1.015, 1.0], 0.0, None, False),
        ([2.0, 1.009, 1.0], 0.0, None, True),
        ([2.0, math.nan, 1.0], 0.0, None, False),
        ([math.inf, 1.0, 1.0], 0.0, None, False),
        ([2.0, 1.015, 1.0], 0.0, 4.13, True),
        ([2.0, 0.975, 1.0], 0.0, 4.13, False),
        ([2.0, 1.0, math.nan], 0.0, 4.13, False),
        ([2.1, 0.95, 1.0], 0.05, None, True),
        ([2.1, 1.1, 1.1], 0.05, None, False),
        ([2.0, math.nan, 1.0], 0.05, None, False),
    ],
)
def test_verdict(ours: list[float], dropout: float, bits: float | None, agree: bool) -> None:
    """Without dropout every step counts, with dropout the mean of the last; what is not finite never agrees."""
    runs = {"A": {"losses": [2.0, 1.0, 1.0], "bits_per_weight": bits}, "B": {"losses": ours, "bits_per_weight": bits}}
    line, verdict = _report.verdict(runs, ("A", "B"), dropout)
    assert verdict is agree
    assert ("DISAGREE" in line) is not agree


def test_what_is_held_out_is_not_trained_on() -> None:
    train, held = finetune.split(finetune.documents(None))
    assert "".join(finetune.documents(None)) == train + held
    assert 0.05 <= len(held) / len(train + held) < 0.15

    data = np.arange(10).reshape(5, 2)
    drawn = finetune.batches(data, steps=4, batch=2, seed=0)
    assert drawn.shape == (4, 2, 2)
    assert set(drawn.reshape(-1, 2)[:5, 0]) == {0, 2, 4, 6, 8}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")

    def fail(target: Path) -> None:
        target.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        _report.write(path, fail)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--r", "0"], "--r must be at least 1, got 0"),
        (["--dtype", "float64"], "--dtype must be bfloat16, float32 or float16 with --quant nf4, got float64"),
        (["--quant", "fp5"], "--quant: invalid choice: 'fp5'"),
        (["--dropout", "1"], "--dropout must be in [0, 1), got 1.0"),
        (["--model", "/nowhere"], "--model must be a directory, got /nowhere"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2, and the option with its value."""
    with pytest.raises(SystemExit) as error:
        finetune.parse(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_text_too_short() -> None:
    """Is an error that says by how much."""
    with pytest.raises(SystemExit, match="the held-out text has 3 tokens, fewer than --length 32"):
        finetune.blocks([1, 2, 3], 32, "held-out")
