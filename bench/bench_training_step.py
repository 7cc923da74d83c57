"""A whole training step of a real model, the sides taking turns: frozen (no adapter at all), PEFT, lora_ops; and decoding.

A step is forward, loss, backward and AdamW, in bf16 with fp32 adapters, r = 16 on all linear layers. frozen runs forward and
backward to the embeddings' output, which is what the others do without their adapters. QLoRA: NF4 in blocks of 64, double
quantisation, everything else bf16; and PEFT's recipe, which turns everything else to fp32. Two threads unless
LORA_OPS_BENCH_THREADS says otherwise; the figure is the minimum of LORA_OPS_BENCH_STEPS (8) steps per side.
"""

import copy
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import lora_ops

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

STEPS = int(os.environ.get("LORA_OPS_BENCH_STEPS", "8"))
# PEFT's recipe takes several times as long as the others.
RECIPE_STEPS = 3
TOKENS = 40


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("LORA_OPS_BENCH_THREADS", "2")))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp().parent


# --- models -----------------------------------------------------------------------------------------------------------


def smollm2_files(cache: Path) -> Path:
    from finetune import smollm2 as dequantised

    return dequantised(cache / "model")


def smollm2(cache: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(smollm2_files(cache), dtype=torch.bfloat16)


def smollm2_4bit(cache: Path) -> nn.Module:
    from _run import load_in_4_bits

    return load_in_4_bits(str(smollm2_files(cache)), torch.bfloat16)


def llama_1b_width(cache: Path) -> nn.Module:
    """Four layers of the width of a 1B model, random weights."""
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=4, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def frozen(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return model


def with_peft(model: nn.Module, dropout: float = 0.0) -> nn.Module:
    config = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


def with_lora_ops(model: nn.Module, dropout: float = 0.0, quant: str | None = None) -> nn.Module:
    config = lora_ops.LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules="all-linear")
    return lora_ops.add_lora(model, config, quant=quant)


# --- taking turns -----------------------------------------------------------------------------------------------------


def step(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def run() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()

    return run


def minima(
    runs: dict[str, Callable[[], object]], benchmark, rounds: int, fewer: dict[str, int] | None = None
) -> dict[str, float]:
    """Seconds of every side. `fewer`: rounds of those that are long."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    rounds_of = dict.fromkeys(runs, rounds) | (fewer or {})

    def turn() -> None:
        for name, run in runs.items():
            if len(seconds[name]) <= rounds_of[name]:
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)

    benchmark.pedantic(turn, rounds=rounds, warmup_rounds=1)
    best = {name: min(times[1:]) for name, times in seconds.items()}
    benchmark.extra_info.update({f"{name} s": round(t, 5) for name, t in best.items()})
    return best


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("load", [smollm2, llama_1b_width])
def bench_training_step(load, dropout, benchmark, cache, capsys) -> None:
    base = load(cache)
    ids = torch.randint(0, base.config.vocab_size, (2, 256))
    models = {
        "frozen": frozen(copy.deepcopy(base)),
        "PEFT": with_peft(copy.deepcopy(base), dropout),
        "lora_ops": with_lora_ops(base, dropout),
    }
    best = minima({name: step(model, ids) for name, model in models.items()}, benchmark, STEPS)
    with capsys.disabled():
        print(
            f"\n{load.__name__}, dropout {dropout}: frozen {best['frozen']:.3f} s, PEFT {best['PEFT']:.3f} s, lora_ops "
            f"{best['lora_ops']:.3f} s: {best['lora_ops'] / best['frozen']:.2f} x frozen, "
            f"{best['PEFT'] / best['lora_ops']:.2f} x faster than PEFT"
        )


def bench_qlora_step(benchmark, cache, capsys) -> None:
    """SmolLM2. PEFT's recipe: prepare_model_for_kbit_training, which besides turns gradient checkpointing on."""
    ids = torch.randint(0, 49152, (2, 256))
    recipes = {"PEFT's recipe": True, "without checkpointing": False}
    models = {
        "frozen": frozen(smollm2(cache)),
        "PEFT + bitsandbytes": with_peft(smollm2_4bit(cache)),
        "lora_ops NF4": with_lora_ops(smollm2(cache), quant="nf4"),
    }
    for name, checkpointing in recipes.items():
        model = peft.prepare_model_for_kbit_training(smollm2_4bit(cache), use_gradient_checkpointing=checkpointing)
        models[name] = with_peft(model)
    runs = {name: step(model, ids) for name, model in models.items()}
    best = minima(runs, benchmark, STEPS, dict.fromkeys(recipes, min(RECIPE_STEPS, STEPS)))
    ours = best["lora_ops NF4"]
    with capsys.disabled():
        print(f"\nsmollm2, QLoRA: {', '.join(f'{name} {t:.3f} s' for name, t in best.items())}")
        ratios = (f"{t / ours:.2f} x faster than {name}" for name, t in best.items() if name not in ("frozen", "lora_ops NF4"))
        print(f"lora_ops NF4: {ours / best['frozen']:.2f} x frozen, {', '.join(ratios)}")


# --- decoding ---------------------------------------------------------------------------------------------------------


def decoder(model: nn.Module, prompt: Tensor) -> Callable[[], None]:
    """Each call decodes one token more."""
    out = model(input_ids=prompt, use_cache=True)

    def run() -> None:
        nonlocal out
        out = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)

    return run


def linear_layers(model: nn.Module) -> list[nn.Module]:
    """Those of the blocks: everything but the output layer, which no side quantises."""
    kinds = (nn.Linear, lora_ops.FusedLoraLinear)
    return [m for name, m in model.named_modules() if isinstance(m, kinds) and "lora_" not in name and "lm_head" not in name]


@torch.no_grad()
def bench_decoding(benchmark, cache, capsys) -> None:
    """SmolLM2, one sequence: a token by the whole model, and one row through all its linear layers alone.

    frozen and bitsandbytes without an adapter, bitsandbytes in eval mode: there it has a kernel of its own.
    """
    models = {
        "frozen": smollm2(cache),
        "lora_ops": with_lora_ops(smollm2(cache)),
        "lora_ops NF4": with_lora_ops(smollm2(cache), quant="nf4"),
        "bitsandbytes": smollm2_4bit(cache),
        "PEFT + bitsandbytes": with_peft(smollm2_4bit(cache)),
    }
    prompt = torch.randint(0, 49152, (1, 24))
    runs: dict[str, Callable[[], object]] = {name: decoder(model.eval(), prompt) for name, model in models.items()}
    rows = {K: torch.randn(1, 1, K, dtype=torch.bfloat16) for K in (576, 1536)}
    for name in ("frozen", "lora_ops", "lora_ops NF4", "bitsandbytes"):
        layers = linear_layers(models[name])
        runs[f"{name}, layers"] = lambda layers=layers: [layer(rows[layer.in_features]) for layer in layers]
    best = minima(runs, benchmark, TOKENS)
    with capsys.disabled():
        print(f"\nsmollm2, decoding: {', '.join(f'{name} {1 / best[name]:.1f} tokens/s' for name in models)}")
        layers = {name: best[f"{name}, layers"] for name in models if f"{name}, layers" in best}
        print(f"its {len(linear_layers(models['frozen']))} linear layers: ", end="")
        print(", ".join(f"{name} {t * 1e3:.2f} ms" for name, t in layers.items()), end=": ")
        print(", ".join(f"{layers[name] / layers['lora_ops NF4']:.2f} x {name}" for name in layers if name != "lora_ops NF4"))
