"""Training runs of a small Llama, the same in one process and in several: what test_distributed*.py compares.

Every process makes the same model and the same global batch from seeds. `LAYOUTS` says how it then lies.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny_models import VOCABULARY, injected, llama
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from traffic import Traffic

from lora_ops.distributed import AdapterState, ColwiseLora, RowwiseLora, register_4bit

BATCH, LENGTH, MICROBATCHES = 8, 17, 4
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_key_value_heads": 4}


@dataclass(frozen=True)
class Run:
    layout: str  # one of LAYOUTS
    quant: str | None = None
    steps: int = 4
    dtype: torch.dtype = torch.float32
    dora: bool = False
    full: bool = False  # every weight trains, and there is no adapter
    save: str | None = None  # where to, at the end
    resume: str | None = None  # where from


class Result(NamedTuple):
    losses: list[float]  # of the global batch, step by step
    gradients: dict[str, Tensor]  # of the first step, whole
    norm: float  # theirs; of a stage's own parameters in a pipeline
    calls: dict[str, int]  # of the last step
    bytes: dict[str, int]
    moments: dict[str, Tensor]  # Adam's second ones, at the end, whole


def make_model(run: Run) -> nn.Module:
    torch.manual_seed(0)
    model = llama(**SIZES).to(run.dtype)
    return model if run.full else injected(model, run.quant, lora_alpha=8, use_dora=run.dora)


def batch() -> Tensor:
    """The global batch of every step."""
    g = torch.Generator().manual_seed(1)
    first, by = (torch.randint(low, high, (BATCH, 1), generator=g) for low, high in ((0, 90), (1, 4)))
    return (first + by * torch.arange(LENGTH)) % VOCABULARY


class Layout:
    """One process, and what the others do otherwise. `loss` has the batch's mean and leaves gradients of it."""

    def __init__(self, model: nn.Module, mesh: DeviceMesh | None, run: Run) -> None:
        self.model, self.mesh, self.run = model, mesh, run

    def part(self, ids: Tensor) -> Tensor:
        return ids

    def loss(self, ids: Tensor) -> Tensor:
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    def mean(self, loss: Tensor) -> float:
        return loss.item()


class DataParallel(Layout):
    def part(self, ids: Tensor) -> Tensor:
        return ids.chunk(self.mesh.size())[self.mesh.get_rank()]

    def mean(self, loss: Tensor) -> float:
        total = loss.float()
        dist.all_reduce(total)
        return total.item() / self.mesh.size()


class Ddp(DataParallel):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.model = DistributedDataParallel(self.model, broadcast_buffers=False)


class Fsdp(DataParallel):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self.run.quant:
            register_4bit(self.model)
        shard(self.model, self.mesh)


class FsdpAdapters(DataParallel):
    """Adapters alone are sharded: what is frozen, in 4 bits or not, stays whole."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        shard(self.model, self.mesh, ignored_params={p for p in self.model.parameters() if not p.requires_grad})


def shard(model: nn.Module, mesh: DeviceMesh, **options: Any) -> None:
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


class Tensors(Layout):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        parallelize_module(self.model, self.mesh, plan(self.run.full))


def plan(full: bool = False) -> dict[str, ParallelStyle]:
    whole, layers = Replicate(), "model.layers.*"
    colwise, rowwise = (ColwiseParallel(), RowwiseParallel()) if full else (ColwiseLora(), RowwiseLora())
    hidden = {"hidden_states": whole}
    return {
        # The input of several layers is made a DTensor once: its gradients are summed once.
        f"{layers}.self_attn": PrepareModuleInput(input_kwarg_layouts=hidden, desired_input_kwarg_layouts=hidden),
        **{f"{layers}.self_attn.{name}": colwise for name in ("q_proj", "k_proj", "v_proj")},
        f"{layers}.self_attn.o_proj": rowwise,
        f"{layers}.mlp": PrepareModuleInput(input_layouts=whole, desired_input_layouts=whole),
        **{f"{layers}.mlp.{name}": colwise for name in ("gate_proj", "up_proj")},
        f"{layers}.mlp.down_proj": rowwise,
    }


class Both(DataParallel):
    """Two ways of the data, two of the tensors."""

    def __init__(self, model: nn.Module, mesh: DeviceMesh, run: Run) -> None:
        both = init_device_mesh("cpu", (2, mesh.size() // 2), mesh_dim_names=("data", "tensors"))
        super().__init__(model, both["data"], run)
        parallelize_module(model, both["tensors"], plan())
        shard(model, self.mesh)

    def part(self, ids: Tensor) -> Tensor:
        return ids.chunk(2)[self.mesh.get_local_rank()]

    def mean(self, loss: Tensor) -> float:
        total = loss.clone()
        dist.all_reduce(total)
        return total.item() / dist.get_world_size()


class Stage(nn.Module):
    """Some blocks of a Llama, the first with the embedding, the last with the output layer. Names stay the model's."""

    def __init__(self, model: nn.Module, index: int, stages: int) -> None:
        super().__init__()
        inner, blocks = model.model, len(model.model.layers)
        mine = range(index * blocks // stages, (index + 1) * blocks // stages)
        self.model = nn.Module()
        self.model.layers = nn.ModuleDict({str(i): inner.layers[i] for i in mine})
        self.model.rotary_emb = inner.rotary_emb
        if index == 0:
            self.model.embed_tokens = inner.embed_tokens
        if index == stages - 1:
            self.model.norm, self.lm_head = inner.norm, model.lm_head

    def forward(self, x: Tensor) -> Tensor:
        inner = self.model
        hidden = inner.embed_tokens(x) if hasattr(inner, "embed_tokens") else x
        position_ids = torch.arange(hidden.shape[1])[None]
        rotary = inner.rotary_emb(hidden, position_ids)
        for block in inner.layers.values():
            hidden = block(hidden, position_ids=position_ids, position_embeddings=rotary)
        return self.lm_head(inner.norm(hidden)) if hasattr(self, "lm_head") else hidden


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


class Pipeline(Layout):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        rank, stages = self.mesh.get_rank(), self.mesh.size()
        self.model = Stage(self.model, rank, stages)
        stage = PipelineStage(self.model, rank, stages, torch.device("cpu"))
        self.schedule = ScheduleGPipe(stage, MICROBATCHES, next_token_loss)

    def loss(self, ids: Tensor) -> Tensor:
        first, last = self.mesh.get_rank() == 0, self.mesh.get_rank() == self.mesh.size() - 1
        losses: list[Tensor] = []
        self.schedule.step(*((ids,) if first else ()), **({"target": ids, "losses": losses} if last else {}))
        return torch.stack(losses).mean().detach() if last else torch.zeros(())

    def mean(self, loss: Tensor) -> float:
        total = loss.clone()
        dist.all_reduce(total)
        return total.item()


LAYOUTS: dict[str, type[Layout]] = {
    "one": Layout, "ddp": Ddp, "fsdp": Fsdp, "fsdp adapters": FsdpAdapters, "tp": Tensors, "fsdp and tp": Both, "pp": Pipeline,
}  # fmt: skip


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def trained(run: Run, beside: Callable[[nn.Module], Any] | None = None) -> Result:
    """The run, by this process and those beside it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if dist.is_initialized() else None
    layout = LAYOUTS[run.layout](make_model(run), mesh, run)
    parameters = {name.removeprefix("module."): p for name, p in layout.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.01)
    state = None if run.full else {"adapter": AdapterState(layout.model, optimizer)}
    if run.resume:
        dcp.load(state, checkpoint_id=run.resume)
    losses, gradients, norm = [], {}, 0.0
    for step in range(run.steps):
        with Traffic() as traffic:
            loss = layout.loss(layout.part(batch()))
        losses.append(layout.mean(loss))
        if step == 0:
            gradients = {name: whole(p.grad).clone() for name, p in parameters.items()}
            if not run.full:
                norm = whole(nn.utils.clip_grad_norm_(parameters.values(), 1e9)).item()
        optimizer.step()
        optimizer.zero_grad()
    if run.save:
        dcp.save(state, checkpoint_id=run.save)
    moments = {name: whole(optimizer.state[p]["exp_avg_sq"]) for name, p in parameters.items()}
    return Result(losses, gradients, norm, dict(traffic.calls), dict(traffic.bytes), moments)
