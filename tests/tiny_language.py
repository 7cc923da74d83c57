"""A tiny random Llama with its tokenizer, and a text: what examples/finetune.py takes."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tiny_llama(intermediate_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            # At the default scale of 0.02 the layers hardly change what the embeddings say.
            torch.nn.init.normal_(layer.weight, std=0.2)
    return model


def write_inputs(root: Path) -> Path:
    """Puts the model, model/, and the text, text.txt, into a folder, and returns it."""
    text = root / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {i}: the quick brown fox jumps over the lazy dog." for i in range(60)))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False))
    tiny_llama(128).save_pretrained(root / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(root / "model")
    return root
