"""LoRA and QLoRA in several processes, by accelerate:

    accelerate launch --cpu --num_processes 2 examples/distributed.py --quant nf4

A small Llama with random weights learns to count. The batch is that of all processes together: the losses are those of one
process. On GPUs leave `--cpu` out; everything else stays.
"""

import argparse
import sys
from pathlib import Path

import _quiet  # noqa: F401
import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from transformers import LlamaConfig, LlamaForCausalLM

import lora_ops

VOCABULARY, LENGTH = 96, 24


def make_model(quant: str | None) -> LlamaForCausalLM:
    """The same in every process: what is frozen is never sent."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.16, **sizes))
    return lora_ops.add_lora(model, lora_ops.LoraConfig(r=8, target_modules="all-linear"), quant=quant)


def sequences(count: int) -> list[torch.Tensor]:
    """Each counts, from anywhere, by 1, 2 or 3."""
    g = torch.Generator().manual_seed(1)
    first, by = (torch.randint(low, high, (count, 1), generator=g) for low, high in ((0, VOCABULARY), (1, 4)))
    return list((first + by * torch.arange(LENGTH)) % VOCABULARY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quant", choices=["nf4", "fp4"], help="the frozen weights in 4 bits (default: as they are)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16, help="sequences in a step, of all processes together")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--out", type=Path, help="where to write the adapter, in PEFT's format")
    args = parser.parse_args()

    # The model's buffers never change: without this they would be sent in every step.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True), kwargs_handlers=[ddp])
    if args.batch % accelerator.num_processes:
        sys.exit(f"--batch must be a multiple of the {accelerator.num_processes} processes, got {args.batch}")
    model = make_model(args.quant)
    optimizer = torch.optim.AdamW(lora_ops.lora_parameters(model), lr=args.lr)
    loader = torch.utils.data.DataLoader(sequences(args.batch * args.steps), batch_size=args.batch)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for step, ids in enumerate(loader, 1):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        mean = accelerator.reduce(loss.detach(), "mean").item()
        accelerator.print(f"step {step}: loss {mean:.6f}")
    if args.out and accelerator.is_main_process:
        print(f"adapter: {lora_ops.save_adapter(accelerator.unwrap_model(model), args.out)}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
