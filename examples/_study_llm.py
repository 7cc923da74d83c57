"""The language model of study.py: SmolLM2-135M-Instruct learns CPython's documentation, the upper half of its blocks adapted.

Learning rates are climbed: each method begins with three neighbours on the one grid and goes on towards the best as long as it
is the outermost tried.
"""

import copy
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import _quiet  # noqa: F401
import finetune
import numpy as np
import torch
import transformers
from _study_cells import WORST, Cell, Row, Size, best_lr, pick
from _study_methods import METHODS, Setup, start, train
from torch import Tensor, nn

GRID = tuple(1e-5 * 10 ** (k / 2) for k in range(9))  # to 0.1
BEGIN = {"full": 2, "VeRA": 6, "LoRA-GA": 3, "PiSSA": 3, "OLoRA": 3, "LoRA+": 3}  # where the climb begins; others: 4
BATCH, LENGTH, CALIBRATION = 1, 64, 8
VALIDATION, TEST = 4, 6  # blocks


def wanted(rows: Iterable[Row], size: Size) -> list[Cell]:
    """The runs that come next, by what is known."""
    found = []
    for method in METHODS:
        done = pick(rows, part="smollm2", method=method, seed=0)
        tried = sorted({row["lr"] for row in done}) or sorted(GRID[k] for k in _around(BEGIN.get(method, 4)))
        if done:
            best, at = best_lr(done, "val_loss"), [GRID.index(lr) for lr in tried]
            if best == tried[0] and at[0] > 0:
                tried = [GRID[at[0] - 1], *tried]
            elif best == tried[-1] and at[-1] < len(GRID) - 1:
                tried = [*tried, GRID[at[-1] + 1]]
            else:
                found += [Cell("smollm2", "methods", method, best, seed) for seed in range(size.seeds)]
        found += [Cell("smollm2", "methods", method, lr, 0) for lr in tried]
    return list(dict.fromkeys(found))


def _around(k: int) -> range:
    return range(k - 1, k + 2)


def prepare(model: Path) -> None:
    """Writes the checkpoint where it is missing."""
    model.parent.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()
    finetune.smollm2(model)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


@cache
def loaded(directory: Path | None) -> tuple[nn.Module, np.ndarray, Tensor, list[float]]:
    """Model, training blocks, held-out blocks and their losses. Without a directory: a random Llama and bytes."""
    transformers.utils.logging.disable_progress_bar()
    if directory is None:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        ids = [list(text.encode()) for text in finetune.split(finetune.documents(None))]
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        ids = [tokenizer(text)["input_ids"] for text in finetune.split(finetune.documents(None))]
    blocks = [finetune.blocks(part, LENGTH, name) for part, name in zip(ids, ("training", "held-out"), strict=True)]
    apart = len(blocks[1]) // (VALIDATION + TEST)
    held_out = torch.from_numpy(blocks[1][::apart][: VALIDATION + TEST])
    return model, blocks[0], held_out, evaluate(model, held_out)


def run(cell: Cell, size: Size, directory: Path | None) -> dict[str, Any]:
    base, blocks, held_out, before = loaded(directory)
    model = copy.deepcopy(base)
    if cell.method == "full":
        model.float()  # bfloat16 would round most of its updates away
    torch.manual_seed(cell.seed)
    ids = torch.from_numpy(finetune.batches(blocks, size.lm_steps + CALIBRATION, BATCH, cell.seed))
    n = model.config.num_hidden_layers
    setup = Setup(
        targets=rf"model\.layers\.({'|'.join(map(str, range(n // 2, n)))})\..*_proj",
        steps=size.lm_steps,
        batches=list(ids[size.lm_steps :]),
        loss=loss,
    )
    begun, init_s = start(model, cell.method, setup)
    found = train(model, begun, cell.lr, ids[: size.lm_steps], loss)
    losses = found.pop("losses")
    after = evaluate(model, held_out)
    return found | {
        "init_s": init_s,
        "before": float(np.mean(before[VALIDATION:])),
        "val_loss": float(np.mean(after[:VALIDATION])),
        "loss": float(np.mean(after[VALIDATION:])),
        "curve": " ".join(f"{value:.4g}" for value in losses),
    }


@torch.no_grad()
def evaluate(model: nn.Module, ids: Tensor) -> list[float]:
    """The loss of each block."""
    model.eval()
    return [min(value, WORST) if np.isfinite(value) else WORST for value in (loss(model, b).item() for b in ids.split(1))]
