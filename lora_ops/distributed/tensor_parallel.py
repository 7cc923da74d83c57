"""Tensor parallelism: a FusedLoraLinear split over the processes of a mesh, each calling the fused kernels on its part.

    columnwise   y_p = x W_pᵀ + s (x Aᵀ) B_pᵀ + bias_p        W, B and bias by rows, A whole; x whole, y split
    rowwise      y = Σ_p x_p W_pᵀ + s (x_p A_pᵀ) Bᵀ + bias    W and A by columns, B and bias whole; x split, y summed

What is whole has a gradient that is a sum over the processes: A's (r, K) in the first, B's (N, r) in the second. Beside these,
only x's gradient of the first and y of the second are summed, as without an adapter.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from ..nn.linear import FusedLoraLinear
from ..quant import NF4Weight
from ..quant.parts import blocksize_of_part, part


class LoraParallel(ParallelStyle):
    """What `ColwiseLora` and `RowwiseLora` have in common. Adapters are added before `parallelize_module`, never after it.

    A and B become DTensors, as a dense weight and a bias do: optimisers, `clip_grad_norm_`, fully_shard on another dimension of
    the mesh and torch.distributed.checkpoint take them as they are. A 4-bit weight is cut where it lies: each process keeps the
    codes of its own part, which decode to the very same numbers.
    """

    input_layouts: Placement
    output_layouts: Placement
    use_local_output: bool
    # Of the layer's input and output; of the parameters, by name.
    takes: Placement
    gives: Placement
    placements: dict[str, Placement]

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts = input_layouts or self.takes
        self.output_layouts = output_layouts or type(self).output_layouts
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _check(module, device_mesh, self)
        assert isinstance(module, FusedLoraLinear)
        weight = module.weight
        if isinstance(weight, NF4Weight):  # the only part that may fail: first
            dim = self.placements["weight"].dim  # type: ignore[attr-defined]
            size = weight.shape[dim] // device_mesh.size()
            rank = device_mesh.get_local_rank()
            if device_mesh.size() > 1:
                blocksize_of_part(weight, dim, size, 2 * size)  # an error of one process is one of all
            module.weight = part(weight, dim, rank * size, (rank + 1) * size)
        for owner, key, placement in _parameters(module, self.placements):
            p = owner._parameters[key]
            assert p is not None
            split = distribute_tensor(p, device_mesh, [placement], src_data_rank=self.src_data_rank)
            owner._parameters[key] = nn.Parameter(split, requires_grad=p.requires_grad)
        module.__class__ = ParallelLoraLinear
        vars(module)["parallel"] = self
        vars(module)["mesh"] = device_mesh
        return module


class ColwiseLora(LoraParallel):
    """`torch.distributed.tensor.parallel.ColwiseParallel` of a FusedLoraLinear: out_features are split.

    Args:
        input_layouts: how x lies. None: whole in every process.
        output_layouts: how y is to lie. None: split along its last dimension.
        use_local_output: y as a plain tensor, not as a DTensor.

    Raises (in `parallelize_module`; the layer is as it was):
        TypeError: not a FusedLoraLinear.
        ValueError: out_features is no multiple of the number of processes, the layer is merged, or an adapter has a weight of
            its own (`lora_ops.init`); a 4-bit weight that cannot be cut there.
    """

    takes, gives, output_layouts = Replicate(), Shard(-1), Shard(-1)
    placements = dict.fromkeys(("weight", "bias", "lora_B", "lora_B_bias", "lora_magnitude_vector"), Shard(0)) | {
        "lora_A": Replicate()
    }


class RowwiseLora(LoraParallel):
    """`torch.distributed.tensor.parallel.RowwiseParallel` of a FusedLoraLinear: in_features are split.

    Args:
        input_layouts: how x lies. None: split along its last dimension.
        output_layouts: how y is to lie. None: whole in every process.
        use_local_output: y as a plain tensor, not as a DTensor.

    Dropout: the processes draw masks of their own for their parts of x.

    Raises (in `parallelize_module`; the layer is as it was):
        TypeError: not a FusedLoraLinear.
        ValueError: as `ColwiseLora`, of in_features; DoRA, whose norms are of whole rows.
    """

    takes, gives, output_layouts = Shard(-1), Partial(), Replicate()
    placements = dict.fromkeys(("weight", "lora_A"), Shard(1)) | dict.fromkeys(("bias", "lora_B", "lora_B_bias"), Replicate())


class ParallelLoraLinear(FusedLoraLinear):
    """A FusedLoraLinear that `ColwiseLora` or `RowwiseLora` has split. `in_features` and `out_features` are the whole layer's.

    Its state dict has DTensors, and no 4-bit weight: nobody holds one as a whole. `merge` is for whole layers.
    """

    parallel: LoraParallel
    mesh: DeviceMesh

    def forward(self, x: Tensor) -> Tensor:
        style, mesh = self.parallel, self.mesh
        x = _local_input(x, mesh, style)
        with self._local_parameters(), self._masks(x):
            y = super().forward(x)
        if style.output_layouts == style.gives and style.use_local_output:
            return y
        whole = DTensor.from_local(y, mesh, [style.gives], run_check=False).redistribute(placements=[style.output_layouts])
        return whole.to_local() if style.use_local_output else whole

    @contextmanager
    def _local_parameters(self) -> Iterator[None]:
        """The parameters as this process has them, for one call."""
        found = [(owner, key, owner._parameters[key]) for owner, key, _ in _parameters(self, self.parallel.placements)]
        try:
            for owner, key, p in found:
                owner._parameters[key] = self._local(p, bias="bias" in key or owner is self.lora_B_bias)  # type: ignore[assignment,arg-type]
            yield
        finally:
            for owner, key, p in found:
                owner._parameters[key] = p

    def _local(self, p: DTensor, *, bias: bool) -> Tensor:
        if not p.placements[0].is_replicate():
            return p.to_local()
        if p.requires_grad:
            # A redistribution to what it is: its backward is the sum over the processes.
            p = p.redistribute(placements=[Replicate()])
        local = p.to_local(grad_placements=[Partial()])
        # A sum has its bias from one of them.
        return local * 0 if bias and self.parallel.gives.is_partial() and self.mesh.get_local_rank() != 0 else local

    @contextmanager
    def _masks(self, x: Tensor) -> Iterator[None]:
        """Where each process has other columns of x, masks of its own. The generators go in step all the same: a whole x must
        be masked alike everywhere."""
        if not self.parallel.takes.is_shard() or not self.training or not any(self.lora_dropout.values()):
            yield
            return
        seed = int(torch.randint(2**62, (), device=x.device)) + self.mesh.get_local_rank()
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            (torch.cuda.manual_seed if x.is_cuda else torch.default_generator.manual_seed)(seed)
            yield

    def merge(self, to: torch.dtype | None = None) -> None:
        raise RuntimeError("merge needs a whole layer, and this one is split: save the adapter and merge it elsewhere")

    def _new_adapter(self, name: str, *args: Any, **initial: Any) -> None:
        raise RuntimeError(f'adapter "{name}" comes too late: adapters are added before a layer is split')

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if isinstance(self.weight, NF4Weight):
            nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        else:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        if isinstance(self.weight, NF4Weight):
            nn.Module._load_from_state_dict(self, *args)
        else:
            super()._load_from_state_dict(*args)


def _local_input(x: Tensor, mesh: DeviceMesh, style: LoraParallel) -> Tensor:
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [style.input_layouts], run_check=False)
    if x.placements != (style.takes,):
        x = x.redistribute(placements=[style.takes])
    # Each process knows what its part of the outputs says of a whole x.
    return x.to_local(grad_placements=[Partial()] if style.takes.is_replicate() else None)


def _parameters(module: FusedLoraLinear, placements: dict[str, Placement]) -> Iterator[tuple[nn.Module, str, Placement]]:
    """Every parameter of the layer: whose it is, under which key, and where it lies."""
    for name, placement in placements.items():
        if name in ("weight", "bias"):
            if isinstance(module._parameters.get(name), Tensor):
                yield module, name, placement
            continue
        for key in getattr(module, name):
            yield getattr(module, name), key, placement


def _check(module: nn.Module, mesh: DeviceMesh, style: LoraParallel) -> None:
    name = type(style).__name__
    if type(module) is not FusedLoraLinear:
        raise TypeError(f"{name} splits FusedLoraLinears, got {type(module).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"{name} needs a mesh of one dimension, got {mesh}")
    features, size = ("in_features" if style.takes.is_shard() else "out_features"), mesh.size()
    if getattr(module, features) % size:
        raise ValueError(f"{features} must be a multiple of the {size} processes, got {getattr(module, features)}")
    if module.merged:
        raise ValueError(f"{name} needs a layer that is not merged; call unmerge() first")
    if module.starts:
        raise ValueError(f"{name} needs adapters beside W0; {', '.join(map(repr, module.starts))} has a weight of its own")
    if module.lora_magnitude_vector and "lora_magnitude_vector" not in style.placements:
        raise ValueError(f"{name} cannot split DoRA, whose norms are of whole rows; ColwiseLora can")
