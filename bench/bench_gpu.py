"""A GPU's times: the frozen layer, eager LoRA, PEFT, and lora_ops on each path; then training steps of a LLaMA.

    python bench/bench_gpu.py [OUT]                 writes gpu.csv, gpu.png, gpu.svg and gpu_model.csv into OUT (bench_out)
    python bench/bench_gpu.py --plot CSV OUT        OUT.png and OUT.svg of a gpu.csv, and its table; needs no GPU

bf16, r = 16. A layer's time is that of a CUDA graph of its forward, or of forward and backward: what the GPU needs, without
Python. `called` is the same without a graph: what a call takes where nothing else keeps the GPU busy. All sides take turns, and
the median of the rounds counts. A turn goes through several weights, so that small ones do not stay in the GPU's cache.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from report_gpu import plot, read, table
from torch import Tensor, nn

import lora_ops
from lora_ops import doctor, lora_linear, qlora_linear, quantize_nf4

BF16 = torch.bfloat16
R, SCALING = 16, 2.0
SHAPES = [(4096, 4096), (4096, 14336), (14336, 4096), (2048, 2048)]  # K, N
ROWS = [1, 8, 64, 512, 4096, 16384]
CYCLED = 128 << 20  # bytes of weights that turns go through: more than a cache holds


class Layer:
    """The operands of a case, and its sides, each a function of x."""

    def __init__(self, M: int, K: int, N: int, adapter: torch.dtype) -> None:
        def normal(*size: int, dtype: torch.dtype = BF16, std: float = 1.0) -> Tensor:
            return (torch.randn(size, device="cuda") * std).to(dtype)

        self.x, self.dy = normal(M, K), normal(M, N)
        self.weights = [normal(N, K, std=K**-0.5) for _ in range(max(1, min(8, CYCLED // (N * K * 2))))]
        self.quantized = [quantize_nf4(w) for w in self.weights]
        self.A = normal(R, K, dtype=adapter, std=K**-0.5).requires_grad_()
        self.B = normal(N, R, dtype=adapter, std=R**-0.5).requires_grad_()
        self.sides: dict[str, Callable[[Tensor, int], Tensor]] = {
            "F.linear": lambda x, i: F.linear(x, self.weights[i]),
            "eager": self.eager,
            "fused": self.fused,
            "split": self.fused,
            "NF4 fused": self.fused_4bit,
            "NF4 split": self.fused_4bit,
            "NF4 eager": self.eager_4bit,
        }

    def low_rank(self, x: Tensor) -> Tensor:
        """As PEFT's lora.Linear has it."""
        return F.linear(F.linear(x.to(self.A.dtype), self.A), self.B) * SCALING

    def eager(self, x: Tensor, i: int) -> Tensor:
        y = F.linear(x, self.weights[i])
        return (y + self.low_rank(x)).to(y.dtype)

    def eager_4bit(self, x: Tensor, i: int) -> Tensor:
        """The weight written out by our kernel, the rest eager: as bitsandbytes does it."""
        y = F.linear(x, self.quantized[i].dequantize(BF16))
        return (y + self.low_rank(x)).to(y.dtype)

    def fused(self, x: Tensor, i: int) -> Tensor:
        return lora_linear(x, self.weights[i], self.A, self.B, scaling=SCALING)

    def fused_4bit(self, x: Tensor, i: int) -> Tensor:
        return qlora_linear(x, self.quantized[i], self.A, self.B, scaling=SCALING)

    def run(self, side: str, backward: bool) -> None:
        """Once for each weight."""
        for i in range(len(self.weights)):
            if not backward:
                with torch.no_grad():
                    self.sides[side](self.x, i)
                continue
            x = self.x.detach().requires_grad_()
            wanted = [x] if side == "F.linear" else [x, self.A, self.B]
            torch.autograd.grad(self.sides[side](x, i), wanted, self.dy)


def events(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def forced(side: str) -> str:
    return side.rpartition(" ")[2] if side.endswith(("fused", "split")) else "auto"


def layer_times(
    M: int, K: int, N: int, adapter: torch.dtype, backward: bool, rounds: int = 15
) -> dict[str, tuple[float, float]]:
    """Seconds of each side for one layer, in a graph and called."""
    layer = Layer(M, K, N, adapter)
    graphs, runs = {}, {}
    for side in layer.sides:
        with doctor.forced_path(forced(side)):
            runs[side] = lambda side=side: layer.run(side, backward)
            graphs[side] = captured(runs[side])
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in layer.sides}
    for _ in range(rounds):
        for side, graph in graphs.items():
            in_graph = events(graph.replay)
            with doctor.forced_path(forced(side)):
                times[side].append((in_graph, events(runs[side])))
    count = len(layer.weights)
    return {side: tuple(statistics.median(t) / count for t in zip(*of, strict=True)) for side, of in times.items()}


def ceilings() -> tuple[float, float]:
    """bf16 flop/s of a large product of cuBLAS, and bytes/s of a copy, read and written."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=BF16) for _ in range(2))
    big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    product = statistics.median(events(lambda: a @ b) for _ in range(10))
    copy = statistics.median(events(lambda: big[: 1 << 29].copy_(big[1 << 29 :])) for _ in range(10))
    return 2 * 8192**3 / product, (1 << 30) / copy


def layers(out: Path) -> None:
    flops, bandwidth = ceilings()
    print(f"cuBLAS 8192^3 bf16: {flops / 1e12:.0f} TFLOP/s, copy: {bandwidth / 1e12:.2f} TB/s")
    rows = []
    for adapter in (torch.float32, BF16):
        for K, N in SHAPES:
            for M in ROWS:
                if adapter == BF16 and (K, N) != (4096, 4096):
                    continue
                for backward in (False, True):
                    times = layer_times(M, K, N, adapter, backward, rounds=9 if M > 4096 else 15)
                    name = str(adapter).removeprefix("torch.")
                    label = "f+b" if backward else "f  "
                    cells = "  ".join(f"{side} {t * 1e6:8.1f} ({c * 1e6:7.1f})" for side, (t, c) in times.items())
                    print(f"{name:8} {M:6} x {K:5} x {N:5} {label} us: {cells}", flush=True)
                    base = 2.0 * M * K * N * (2 if backward else 1)
                    for side, (t, called) in times.items():
                        rows.append(
                            {"adapter": name, "M": M, "K": K, "N": N, "pass": label.strip(), "side": side, "us": t * 1e6,
                             "called_us": called * 1e6, "base_tflops": base / t / 1e12}
                        )  # fmt: skip
                torch.cuda.empty_cache()
    write(out / "gpu.csv", rows)


# --- a model ----------------------------------------------------------------------------------------------------------


def llama(dropout: float, side: str, layers: int = 16) -> nn.Module:
    """1B parameters' worth of decoder layers, random weights."""
    import peft
    import transformers

    from lora_ops.integrations.peft import patch

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=32000,
    )  # fmt: skip
    torch.set_default_dtype(BF16)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if side == "frozen":
        model.requires_grad_(False)
        return model
    settings = {"r": R, "lora_alpha": 32, "lora_dropout": dropout, "target_modules": "all-linear", "init_lora_weights": False}
    if side.startswith("PEFT"):
        model = peft.get_peft_model(model, peft.LoraConfig(**settings))
        if side.endswith("patched"):
            patch(model)
        return model
    config = lora_ops.LoraConfig(**settings)
    lora_ops.add_lora(model, config, quant="nf4" if side.endswith("NF4") else None)
    return model


def step_times(
    dropout: float, sides: list[str], batch: int = 4, length: int = 1024, steps: int = 10
) -> dict[str, tuple[float, float, float]]:
    """Seconds of a step (median), peak GiB of memory beyond what lay there before, and the last loss."""
    found: dict[str, tuple[float, float, float]] = {}
    ids = torch.randint(32000, (batch, length), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    for side in sides:
        model = llama(dropout, side)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
        embeddings = model.get_input_embeddings()

        def step(model: nn.Module = model, optimizer=optimizer, embeddings: nn.Module = embeddings) -> Tensor:
            x = embeddings(ids).detach().requires_grad_()  # the frozen side, too, has a backward of all its layers
            loss = model(inputs_embeds=x, labels=ids).loss
            loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            return loss

        for _ in range(3):
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(10):
            start = time.perf_counter()
            loss = step()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        found[side] = (statistics.median(times), torch.cuda.max_memory_allocated() / 2**30, loss.item())
        del model, trained, optimizer, embeddings, step, loss
        torch.cuda.empty_cache()
    return found


def models(out: Path) -> None:
    rows = []
    for dropout in (0.0, 0.05):
        sides = ["frozen", "PEFT", "PEFT patched", "lora_ops"] + (["lora_ops NF4"] if dropout == 0.0 else [])
        for side, (seconds, peak, loss) in step_times(dropout, sides).items():
            what = f"LLaMA 16 x 2048, 4 x 1024 tokens, dropout {dropout}: {side:13}"
            print(f"{what} {seconds * 1e3:7.1f} ms, {peak:5.2f} GiB, loss {loss:.4f}", flush=True)
            rows.append({"dropout": dropout, "side": side, "ms": seconds * 1e3, "peak_gib": peak, "loss": loss})
    write(out / "gpu_model.csv", rows)


def write(file: Path, rows: list[dict]) -> None:
    with file.open("w", newline="") as f:
        writer = csv.DictWriter(f, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("bench_out"), metavar="OUT")
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("CSV", "OUT"))
    args = parser.parse_args()
    if args.plot:
        source, figure = args.plot
    else:
        args.out.mkdir(exist_ok=True)
        name = torch.cuda.get_device_name()
        print(f"{name}, torch {torch.__version__}, lora_ops {lora_ops.__version__}; by its data sheet {doctor.peaks(name)}")
        models(args.out)
        layers(args.out)
        source, figure = args.out / "gpu.csv", args.out / "gpu"
    cases = read(source)
    print(table(cases))
    plot(cases, figure)


if __name__ == "__main__":
    main()
