"""A whole training step of a real model, three ways taking turns: frozen (no adapter at all), PEFT, lora_ops.

A step is forward, loss, backward and AdamW, in bf16 with fp32 adapters, r = 16 on all linear layers. frozen runs forward and
backward to the embeddings' output, which is what the other two do without their adapters. Two threads unless
LORA_OPS_BENCH_THREADS says otherwise; the figure is the minimum of LORA_OPS_BENCH_STEPS (8) steps per side.
"""

import copy
import os
import sys
import time
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import nn

import lora_ops

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

STEPS = int(os.environ.get("LORA_OPS_BENCH_STEPS", "8"))


def smollm2(cache: Path) -> nn.Module:
    from finetune import smollm2 as dequantised

    return transformers.AutoModelForCausalLM.from_pretrained(dequantised(cache / "model"), dtype=torch.bfloat16)


def llama_1b_width(cache: Path) -> nn.Module:
    """Four layers of the width of a 1B model, random weights."""
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=4, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def frozen(model: nn.Module, dropout: float) -> nn.Module:
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return model


def with_peft(model: nn.Module, dropout: float) -> nn.Module:
    config = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


def with_lora_ops(model: nn.Module, dropout: float) -> nn.Module:
    config = lora_ops.LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules="all-linear")
    return lora_ops.add_lora(model, config)


SIDES = {"frozen": frozen, "PEFT": with_peft, "lora_ops": with_lora_ops}


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("load", [smollm2, llama_1b_width])
def bench_training_step(load, dropout, benchmark, tmp_path_factory, capsys) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("LORA_OPS_BENCH_THREADS", "2")))
    torch.manual_seed(0)
    base = load(tmp_path_factory.getbasetemp().parent)
    ids = torch.randint(0, base.config.vocab_size, (2, 256))
    runs = {}
    for name, wrap in SIDES.items():
        model = wrap(copy.deepcopy(base), dropout).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        runs[name] = (model, torch.optim.AdamW(trained, lr=1e-4) if trained else None)
    seconds: dict[str, list[float]] = {name: [] for name in runs}

    def turn() -> None:
        for name, (model, optimizer) in runs.items():
            start = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            if optimizer:
                optimizer.step()
                optimizer.zero_grad()
            seconds[name].append(time.perf_counter() - start)

    benchmark.pedantic(turn, rounds=STEPS, warmup_rounds=1)
    torch.set_num_threads(threads)
    best = {name: min(times[1:]) for name, times in seconds.items()}
    benchmark.extra_info.update({f"{name} s": round(t, 4) for name, t in best.items()})
    with capsys.disabled():
        print(
            f"\n{load.__name__}, dropout {dropout}: frozen {best['frozen']:.3f} s, PEFT {best['PEFT']:.3f} s, lora_ops "
            f"{best['lora_ops']:.3f} s: {best['lora_ops'] / best['frozen']:.2f} x frozen, "
            f"{best['PEFT'] / best['lora_ops']:.2f} x faster than PEFT"
        )
