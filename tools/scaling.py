"""A SIMULATION of training on hundreds of workers: measured compute of one, a stated network, and communication.py's bytes.

    python tools/scaling.py --bandwidth 1.25 --latency 50
    python tools/scaling.py --lora-seconds 0.9 --qlora-seconds 1.0 --full-seconds 1.3      # measured elsewhere

Nothing of it is measured on more than one worker. A step takes compute + communication at worst, and at best the longer of the
two: the figure shows the range. Collectives run in rings: bytes / bandwidth, and a latency for each hop of each call.
Contention, stragglers, and what a process group does beside sending are left out.

Writes scaling.csv, .png and .svg.
"""

import argparse
import csv
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import communication
from communication import Llama, Volume

DDP_BUCKET = 25 << 20  # bytes, torch's default
WORKERS = [2**i for i in range(10)]
TUNINGS = ("lora", "qlora", "full")


@dataclass(frozen=True)
class Network:
    bandwidth: float  # bytes per second that leave a worker
    latency: float  # seconds of a hop

    def seconds(self, volume: Volume, calls: dict[str, int], workers: int) -> float:
        hops = {"all_reduce": 2 * (workers - 1), "all_gather": workers - 1, "reduce_scatter": workers - 1, "send": 1}
        waits = sum(hops[kind] * count for kind, count in calls.items())
        return communication.sent(volume, workers) / self.bandwidth + waits * self.latency


@dataclass(frozen=True)
class Row:
    method: str
    tuning: str
    workers: int
    tokens: int  # in a step, of all workers
    compute_s: float  # of a worker
    communication_s: float
    efficiency: float  # of compute + communication: tokens per second and worker, over those of one worker alone
    efficiency_overlapped: float  # of the longer of the two


def row(method: str, tuning: str, workers: int, tokens: int, alone: float, compute: float, communication_s: float) -> Row:
    """alone: seconds that one worker would take for its share of the tokens."""
    if workers == 1:
        communication_s = 0.0
    worst, best = compute + communication_s, max(compute, communication_s)
    return Row(method, tuning, workers, tokens, compute, communication_s, alone / worst, alone / best)


def data_parallel(model: Llama, tokens: int, tuning: str, seconds: float, network: Network) -> list[Row]:
    """Each worker its own `tokens`."""
    full, nf4, L = tuning == "full", tuning == "qlora", model.layers
    rows = []
    for p in WORKERS:
        again = {"all_gather": 2 * L, "reduce_scatter": L}
        ddp = communication.ddp(model, full=full)
        ways = {
            "DDP": (ddp, {"all_reduce": -(-int(ddp["all_reduce"]) // DDP_BUCKET)}),
            "FSDP2": (
                communication.fsdp(model, p, full=full, nf4=nf4),
                {"all_gather": again["all_gather"] + 1, "reduce_scatter": L + full},
            ),
        }
        if not full:
            ways["FSDP2, adapters alone"] = (communication.fsdp_adapters(model), again)
        for method, (volume, calls) in ways.items():
            rows.append(row(method, tuning, p, p * tokens, seconds, seconds, network.seconds(volume, calls, p)))
    return rows


def model_parallel(
    model: Llama, tokens: int, tuning: str, seconds: float, network: Network, kv_heads: int, microbatches: int
) -> list[Row]:
    """One worker's tokens, by all of them."""
    full, L = tuning == "full", model.layers
    rows = []
    for p in WORKERS:
        if kv_heads % p == 0:
            volume = communication.tensor_parallel(model, tokens, full=full)
            calls = {"all_reduce": 4 * L if full else (4 + 7) * L - 1}
            rows.append(row("TP", tuning, p, tokens, seconds / p, seconds / p, network.seconds(volume, calls, p)))
        if p <= L:
            # A microbatch goes through p stages and back; they fill and drain.
            slots = microbatches + p - 1
            hop = tokens / microbatches * model.hidden * model.weight_bytes / network.bandwidth + network.latency
            rows.append(row("PP", tuning, p, tokens, seconds / p, seconds / p * slots / microbatches, 2 * slots * hop))
    return rows


def measured(model: Llama, heads: int, kv_heads: int, batch: int, length: int, tuning: str, steps: int = 3) -> float:
    """Seconds of a training step, forward, backward and AdamW, of a model with random weights: the fastest of a few."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import lora_ops

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=model.vocabulary, hidden_size=model.hidden, intermediate_size=model.intermediate,
        num_hidden_layers=model.layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).to(torch.bfloat16)
    if tuning != "full":
        lora_ops.add_lora(
            llama, lora_ops.LoraConfig(r=model.r, target_modules="all-linear"), quant="nf4" if tuning == "qlora" else None
        )
    optimizer = torch.optim.AdamW([p for p in llama.parameters() if p.requires_grad])
    ids, times = torch.randint(model.vocabulary, (batch, length)), []
    for _ in range(steps + 1):  # the first one warms up
        start = time.perf_counter()
        llama(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def draw(rows: list[Row], title: str, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "scaling", "axes.grid": True, "grid.alpha": 0.3, "font.size": 9})
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    colours = dict(zip(TUNINGS, ("tab:blue", "tab:orange", "black"), strict=True))
    for axes, methods in zip(panels, (("DDP", "FSDP2", "FSDP2, adapters alone"), ("TP", "PP")), strict=True):
        for method, line in zip(methods, ("-", "--", ":"), strict=False):
            for tuning in TUNINGS:
                mine = [r for r in rows if (r.method, r.tuning) == (method, tuning)]
                if not mine:
                    continue
                workers, worst, best = zip(*((r.workers, r.efficiency, r.efficiency_overlapped) for r in mine), strict=True)
                axes.plot(workers, worst, line, color=colours[tuning], label=f"{method}, {tuning}")
                axes.fill_between(workers, worst, best, color=colours[tuning], alpha=0.05)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="workers (simulated)", ylim=(0, 1.05))
        axes.legend(fontsize=8)
    panels[0].set(title="each worker its own tokens", ylabel="efficiency: line without overlap, band up to full overlap")
    panels[1].set(title="one worker's tokens by all of them")
    figure.suptitle(title)
    for ending, options in {"png": {"dpi": 110}, "svg": {"metadata": {"Date": None}}}.items():
        figure.savefig(out / f"scaling.{ending}", **options)
    plt.close(figure)


def simulate(
    model: Llama, tokens: int, seconds: dict[str, float], network: Network, kv_heads: int, microbatches: int
) -> list[Row]:
    rows: list[Row] = []
    for tuning in TUNINGS:
        rows += data_parallel(model, tokens, tuning, seconds[tuning], network)
        rows += model_parallel(model, tokens, tuning, seconds[tuning], network, kv_heads, microbatches)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
        ("hidden", 1024, "of the Llama"), ("intermediate", 2816, ""), ("layers", 16, ""),
        ("vocabulary", 32000, ""), ("heads", 16, ""), ("kv-heads", 8, ""), ("r", 16, "rank of the adapters"),
        ("batch", 2, "sequences of a worker in a step"), ("length", 256, "tokens of a sequence"),
        ("microbatches", 8, "of a pipeline"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--bandwidth", type=float, default=1.25, help="GB/s that leave a worker (default: 10 Gbit/s)")
    parser.add_argument("--latency", type=float, default=50.0, help="microseconds of a hop")
    for tuning in TUNINGS:
        parser.add_argument(f"--{tuning}-seconds", type=float, help="of a step on one worker (default: measured here)")
    parser.add_argument("--out", type=Path, default=Path("scaling_out"))
    args = parser.parse_args(argv)

    kv = args.hidden // args.heads * args.kv_heads
    model = Llama(args.hidden, args.intermediate, args.layers, args.vocabulary, kv, args.r)
    options: dict[str, Any] = vars(args)
    seconds = {
        tuning: options[f"{tuning}_seconds"] or measured(model, args.heads, args.kv_heads, args.batch, args.length, tuning)
        for tuning in TUNINGS
    }
    network = Network(args.bandwidth * 1e9, args.latency * 1e-6)
    rows = simulate(model, args.batch * args.length, seconds, network, args.kv_heads, args.microbatches)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "scaling.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(vars(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in vars(r).items()} for r in rows)
    steps = ", ".join(f"{tuning} {s:.3g} s" for tuning, s in seconds.items())
    draw(
        rows,
        f"SIMULATION: hidden {args.hidden}, {args.layers} blocks, r = {args.r}, {args.batch} x {args.length} tokens\n"
        f"a step on one worker, measured: {steps}; stated network: {args.bandwidth:g} GB/s, {args.latency:g} µs a hop",
        args.out,
    )
    print(f"simulated from a step of {steps}: {args.out}/scaling.csv, .png, .svg")


if __name__ == "__main__":
    main()
