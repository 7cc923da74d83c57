"""What a training step of a Llama sends, by formula. tests/test_distributed.py counts the bytes.

    python tools/communication.py      # writes the table of docs/distributed.md anew

A volume is {kind of collective: bytes of the whole}: an all-gather's output, a reduce-scatter's input, the tensor of an
all-reduce, or what one process sends to its neighbours.
"""

from dataclasses import dataclass
from pathlib import Path

BLOCK, GROUP, CODE = 64, 256, 256  # of 4-bit weights: weights with one scale, scales with one scale, the scales' values
Volume = dict[str, float]


@dataclass(frozen=True)
class Llama:
    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    kv: int  # columns of k and v
    r: int = 16  # LoRA of this rank in every linear layer of the blocks
    weight_bytes: int = 2
    adapter_bytes: int = 4

    @property
    def split(self) -> list[tuple[int, int]]:
        """(N, K) of a block's layers whose outputs tensor parallelism splits: q, k, v, gate, up."""
        H, I = self.hidden, self.intermediate
        return [(H, H), (self.kv, H), (self.kv, H), (I, H), (I, H)]

    @property
    def summed(self) -> list[tuple[int, int]]:
        """Of those whose outputs it sums: o, down."""
        return [(self.hidden, self.hidden), (self.hidden, self.intermediate)]

    @property
    def adapter(self) -> int:
        """Adapter bytes of a block: 4 r (N + K) of each of its layers."""
        return sum(self.r * (N + K) for N, K in self.split + self.summed) * self.adapter_bytes

    def block(self, processes: int = 1, *, nf4: bool = False) -> int:
        """Frozen bytes of a block, as fully_shard pads them."""
        norms = 2 * self.hidden * self.weight_bytes
        if not nf4:
            return sum(N * K for N, K in self.split + self.summed) * self.weight_bytes + norms
        return sum(_four_bit(N, K, processes) for N, K in self.split + self.summed) + norms

    @property
    def root(self) -> int:
        """Bytes of what is in no block: embedding, output layer, last norm."""
        return (2 * self.vocabulary + 1) * self.hidden * self.weight_bytes

    def trained(self, *, full: bool) -> int:
        """Bytes of all gradients."""
        return self.root + self.layers * self.block() if full else self.layers * self.adapter


def _four_bit(N: int, K: int, processes: int) -> int:
    """Codes, and scales in 8 bits with theirs."""

    def padded(n: int) -> int:
        return -(-n // processes) * processes

    scales = -(-N * K // BLOCK)
    rest = K % 128  # csrc/nf4.h
    row = K // 128 * 64 + (0 if rest == 0 else 32 if rest <= 64 else 64)
    return padded(N) * row + padded(scales) + 4 * (padded(-(-scales // GROUP)) + padded(CODE) + padded(1))


def ddp(model: Llama, *, full: bool = False) -> Volume:
    return {"all_reduce": model.trained(full=full)}


def fsdp(model: Llama, processes: int, *, full: bool = False, nf4: bool = False) -> Volume:
    """Blocks are gathered for the forward pass and again for the backward; what is in none once."""
    block = model.block(processes, nf4=nf4) + (0 if full else model.adapter)
    return {"all_gather": model.root + 2 * model.layers * block, "reduce_scatter": model.trained(full=full)}


def fsdp_adapters(model: Llama) -> Volume:
    """Where everything frozen is in `ignored_params`."""
    return {"all_gather": 2 * model.layers * model.adapter, "reduce_scatter": model.layers * model.adapter}


def tensor_parallel(model: Llama, tokens: int, *, full: bool = False) -> Volume:
    """tokens: of the whole batch, which every process sees.

    Of a block, two sums of activations forward and two backward, but for the first block's input: a frozen embedding asks for
    no gradient. And of the adapters, what every process has as a whole: A of the split layers, B of the summed ones.
    """
    activation = tokens * model.hidden * model.weight_bytes
    if full:
        return {"all_reduce": 4 * model.layers * activation}
    shared = sum(model.r * K for _, K in model.split) + sum(model.r * N for N, _ in model.summed)
    return {"all_reduce": (4 * model.layers - 1) * activation + model.layers * shared * model.adapter_bytes}


def pipeline(model: Llama, tokens: int, processes: int, rank: int) -> Volume:
    """Activations to the next stage, their gradients to the one before; nothing of any weight."""
    neighbours = (rank > 0) + (rank < processes - 1)
    return {"send": neighbours * tokens * model.hidden * model.weight_bytes}


def sent(volume: Volume, processes: int) -> float:
    """Bytes that leave each process where collectives run in rings: B (p − 1) / p for an all-gather or a reduce-scatter of B,
    twice that for an all-reduce."""
    ring = (processes - 1) / processes
    factors = {"all_reduce": 2 * ring, "all_gather": ring, "reduce_scatter": ring, "send": 1.0}
    return sum(factors[kind] * size for kind, size in volume.items())


# --- the page's table ---------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs" / "distributed.md"
BEGIN, END = "<!-- communication:begin -->\n", "<!-- communication:end -->"
PROCESSES, TOKENS = 8, 8192
EXAMPLE = Llama(hidden=2048, intermediate=8192, layers=16, vocabulary=128256, kv=512)


def table() -> str:
    m, p = EXAMPLE, PROCESSES
    rows: list[tuple[str, list[Volume | None]]] = [  # LoRA, QLoRA, full
        ("DDP", [ddp(m), ddp(m), ddp(m, full=True)]),
        ("FSDP2", [fsdp(m, p), fsdp(m, p, nf4=True), fsdp(m, p, full=True)]),
        ("FSDP2, adapters alone", [fsdp_adapters(m), fsdp_adapters(m), None]),
        ("TP", [tensor_parallel(m, TOKENS), tensor_parallel(m, TOKENS), tensor_parallel(m, TOKENS, full=True)]),
        ("PP, a stage with two neighbours", [pipeline(m, TOKENS, p, 1)] * 3),
    ]
    lines = ["| MB that leave a process in a step | LoRA | QLoRA | full fine-tuning |", "|---|---|---|---|"]
    for name, volumes in rows:
        cells = ("" if volume is None else f"{sent(volume, p) / 1e6:.1f}" for volume in volumes)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    before, rest = page.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
