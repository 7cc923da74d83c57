"""PEFT scripts of every kind with the one added line: the losses stay what they are.

Trainer, TRL's SFTTrainer and accelerate, on a tiny Llama and data in a fixed order; that the losses are the same is
`compare.assert_same_losses`, and that the layers ran fused is counted.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import compare
import datasets
import pytest
import torch
import transformers
import trl
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from compare import BF16, F32
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft_layers import PhiloxDropout
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ops.integrations.peft import layers, patch, report, unpatch

VOCABULARY, LENGTH, BATCH, STEPS, BLOCKS = 64, 12, 4, 6, 2
FUSED = 7 * BLOCKS  # layers
CONFIG: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}

Patch = Callable[[nn.Module], nn.Module]


# --- model and data ---------------------------------------------------------------------------------------------------


def llama(dtype: torch.dtype = F32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=BLOCKS, num_attention_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            # At the default scale of 0.02 the layers hardly change what the embeddings say.
            nn.init.normal_(layer.weight, std=0.15)
    return model.to(dtype)


@functools.cache
def llama_files(directory: Path) -> Path:
    llama().save_pretrained(directory)
    return directory


def llama_4bit(directory: Path) -> LlamaForCausalLM:
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=BF16
    )
    return LlamaForCausalLM.from_pretrained(llama_files(directory), dtype=BF16, quantization_config=settings)


def with_lora(model: nn.Module, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**CONFIG, **options))


def sequences() -> list[list[int]]:
    """Each counts upwards, from one of four beginnings."""
    return [[3 + (4 * (i % 4) + n) % 16 for n in range(LENGTH)] for i in range(BATCH * STEPS)]


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))])}
    of_words = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    of_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=of_words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


# --- scripts, each as it is (`patch` does nothing) or with the added line ----------------------------------------------

SETTINGS: dict[str, Any] = {
    "max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": 0.01, "logging_steps": 1, "seed": 0,
    "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False,
}  # fmt: skip


def trained(trainer: transformers.Trainer, **resume: Any) -> list[float]:
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(**resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trainer_of(model: nn.Module, out: Path, **settings: Any) -> transformers.Trainer:
    rows = [{"input_ids": ids, "labels": ids} for ids in sequences()]
    arguments = transformers.TrainingArguments(str(out), **SETTINGS | settings)
    return transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:BATCH])


def sft_trainer_of(model: nn.Module, out: Path, peft_config: LoraConfig | None, **settings: Any) -> trl.SFTTrainer:
    """As it is by default: under autocast to bf16, with gradient checkpointing."""
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"text": [" ".join(f"w{i}" for i in ids) for ids in sequences()]})
    return trl.SFTTrainer(
        model, trl.SFTConfig(str(out), **SETTINGS | settings), train_dataset=rows, processing_class=tokenizer(),
        peft_config=peft_config,
    )  # fmt: skip


def with_accelerate(model: nn.Module, mixed_precision: str, checkpointing: bool) -> list[float]:
    """Two batches for every step of the optimiser."""
    AcceleratorState._reset_state(reset_partial_state=True)  # one of a process, whose precision is that of the first use
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=2)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    loader = torch.utils.data.DataLoader(torch.tensor(sequences()), batch_size=BATCH)
    model, optimizer, loader = accelerator.prepare(model.train(), optimizer, loader)
    losses = []
    for _ in range(2):
        for ids in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def nothing(model: nn.Module) -> nn.Module:
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The layers that ran fused, call by call."""
    made: list[nn.Module] = []
    fused = layers.fused_forward
    monkeypatch.setattr(layers, "fused_forward", lambda layer, x: (made.append(layer), fused(layer, x))[1])
    return made


# --- the same losses ----------------------------------------------------------------------------------------------------

CHECKPOINTING: dict[str, dict[str, Any]] = {
    "no checkpointing": {"gradient_checkpointing": False},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "not reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_trainer(dtype: torch.dtype, checkpointing: str, tmp_path: Path, calls: list[nn.Module]) -> None:
    settings = CHECKPOINTING[checkpointing]
    expected = trained(trainer_of(with_lora(llama(dtype)), tmp_path, **settings))
    assert calls == []
    actual = trained(trainer_of(patch(with_lora(llama(dtype))), tmp_path, **settings))
    assert len(calls) == FUSED * STEPS * (1 + settings["gradient_checkpointing"])
    compare.assert_same_losses(actual, expected)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"lora_dropout": 0.1}], ids=str)
def test_trainer_with_options(options: dict, tmp_path: Path, calls: list[nn.Module]) -> None:
    """Under autocast. The stock layers are given the masks that the fused ones draw."""
    stock = with_lora(llama(), **options)
    for layer in stock.modules():
        if isinstance(layer, LoraLayer) and "lora_dropout" in options:
            layer.lora_dropout["default"] = PhiloxDropout(options["lora_dropout"])
    expected = trained(trainer_of(stock, tmp_path, bf16=True))
    actual = trained(trainer_of(patch(with_lora(llama(), **options)), tmp_path, bf16=True))
    assert len(calls) == FUSED * STEPS
    compare.assert_same_losses(actual, expected)


@pytest.mark.parametrize(
    ("dtype", "checkpointing"),
    [(F32, "no checkpointing"), (F32, "not reentrant"), (BF16, "no checkpointing"), (BF16, "reentrant")],
)
def test_sft_trainer(dtype: torch.dtype, checkpointing: str, tmp_path: Path, calls: list[nn.Module]) -> None:
    """It makes the PEFT model itself."""

    def losses(patch: Patch) -> list[float]:
        trainer = sft_trainer_of(llama(dtype), tmp_path, LoraConfig(**CONFIG), **CHECKPOINTING[checkpointing])
        patch(trainer.model)
        return trained(trainer)

    expected = losses(nothing)
    assert calls == []
    actual = losses(patch)
    assert len(calls) == FUSED * STEPS * (1 + CHECKPOINTING[checkpointing]["gradient_checkpointing"])
    compare.assert_same_losses(actual, expected)


def test_sft_trainer_with_a_4bit_model(tmp_path: Path, calls: list[nn.Module]) -> None:
    """QLoRA, with bitsandbytes' layers; TRL makes the adapters bf16."""

    def losses(patch: Patch) -> list[float]:
        model = patch(with_lora(llama_4bit(tmp_path / "base")))
        trainer = sft_trainer_of(model, tmp_path, None)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {BF16}
        return trained(trainer)

    compare.assert_same_losses(losses(patch), losses(nothing))
    assert len(calls) == FUSED * STEPS * 2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate(mixed_precision: str, checkpointing: bool, calls: list[nn.Module]) -> None:
    expected = with_accelerate(with_lora(llama()), mixed_precision, checkpointing)
    actual = with_accelerate(patch(with_lora(llama())), mixed_precision, checkpointing)
    assert len(calls) == FUSED * 2 * STEPS * (1 + checkpointing)
    compare.assert_same_losses(actual, expected)


# --- wrong patches ------------------------------------------------------------------------------------------------------


def negated(t: Tensor) -> Tensor:
    """t, with a gradient of the wrong sign."""
    t = t * 1
    if t.requires_grad:
        t.register_hook(torch.neg)
    return t


WRONG: dict[str, Callable[..., tuple]] = {
    "scaling": lambda x, A, B, scaling: (x, A, B, 1.25 * scaling),
    "no gradient of A": lambda x, A, B, scaling: (x, A.detach(), B, scaling),
    "gradient of x negated": lambda x, A, B, scaling: (negated(x), A, B, scaling),
}


@contextmanager
def wrong_patch(wrong: str) -> Iterator[None]:
    """While it lasts, patched layers compute something else."""

    def linear(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, *, scaling: float, **options: Any) -> Tensor:
        x, A, B, scaling = WRONG[wrong](x, A, B, scaling)
        return right(x, weight, A, B, scaling=scaling, **options)

    right = layers.lora_linear
    layers.lora_linear = linear
    try:
        yield
    finally:
        layers.lora_linear = right


SCRIPTS: dict[str, Callable[[Patch, Path], list[float]]] = {
    "Trainer": lambda patch, out: trained(trainer_of(patch(with_lora(llama())), out)),
    "SFTTrainer": lambda patch, out: trained(sft_trainer_of(patch(with_lora(llama())), out, None)),
    "accelerate": lambda patch, out: with_accelerate(patch(with_lora(llama())), "no", False),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_patch_is_noticed(script: str, tmp_path: Path) -> None:
    expected = SCRIPTS[script](nothing, tmp_path)
    for wrong in WRONG:
        with wrong_patch(wrong):
            actual = SCRIPTS[script](patch, tmp_path)
        with pytest.raises(AssertionError, match="loss"):
            compare.assert_same_losses(actual, expected)


# --- beside the losses --------------------------------------------------------------------------------------------------


def test_generate_after_training(tmp_path: Path) -> None:
    """With checkpointing, which turns the cache off while it trains."""
    model = patch(with_lora(llama()))
    trained(trainer_of(model, tmp_path, **CHECKPOINTING["not reentrant"], num_train_epochs=5, max_steps=-1))
    prompt = torch.tensor([ids[: LENGTH // 2] for ids in sequences()[:3]])
    options = {"max_new_tokens": LENGTH // 2, "do_sample": False, "pad_token_id": 0}
    tokens = model.eval().generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
    assert torch.equal(unpatch(model).generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options), tokens)


def test_a_run_is_saved_and_resumed(tmp_path: Path) -> None:
    """Bit for bit; and what it saves, PEFT reads."""
    straight = patch(with_lora(llama()))
    losses = trained(trainer_of(straight, tmp_path, save_strategy="steps", save_steps=STEPS // 2))
    resumed = patch(with_lora(llama()))
    trainer = trainer_of(resumed, tmp_path)
    assert trained(trainer, resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}")) == losses
    trainer.save_model(str(tmp_path / "last"))
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "last").state_dict()
    for model in (straight, resumed):
        assert all(torch.equal(loaded[name], t) for name, t in model.state_dict().items())


def test_evaluation_between_steps_leaves_4bit_layers_as_they_are(tmp_path: Path, calls: list[nn.Module]) -> None:
    """A stock layer's forward pass in eval mode repacks the weight on a CPU, after which its input has no gradient."""
    losses = []
    for settings in ({}, {"eval_strategy": "steps", "eval_steps": 2}):
        model = patch(with_lora(llama_4bit(tmp_path / "base")))
        losses.append(trained(trainer_of(model, tmp_path, **settings)))
        assert report(model).not_fused == {}
    assert losses[0] == losses[1]
    assert len(calls) == FUSED * (STEPS + STEPS + STEPS // 2)
