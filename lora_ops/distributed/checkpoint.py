"""An adapter and its optimiser through torch.distributed.checkpoint: saved by so many processes, resumed by so many others."""

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.nn.parallel import DistributedDataParallel


class AdapterState(Stateful):
    """What of a model trains, and the optimiser's state, by the parameters' names, for torch.distributed.checkpoint:

        dcp.save({"adapter": AdapterState(model, optimizer)}, checkpoint_id=path)
        dcp.load({"adapter": AdapterState(model, optimizer)}, checkpoint_id=path)

    The model may lie in any other way when it resumes: on other numbers of processes, under DDP, fully_shard or tensor
    parallelism, or in one process. The frozen weights are not in it: they come from where they came from.

    Args:
        model: with parameters that train; may be wrapped in DistributedDataParallel or compiled.
        optimizer: of these parameters, or None.

    Raises:
        ValueError: nothing of the model trains.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
            model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod  # type: ignore[assignment]
        self.model = model
        self.optimizer = optimizer
        if not self._parameters():
            raise ValueError("model has no parameter that trains; see add_lora")

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"model": {name: p.detach() for name, p in self._parameters().items()}}
        if self.optimizer is not None:
            state["optimizer"] = get_optimizer_state_dict(self.model, self.optimizer)
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, p in self._parameters().items():
            p.copy_(state_dict["model"][name])
        if self.optimizer is not None:
            set_optimizer_state_dict(self.model, self.optimizer, state_dict["optimizer"])
