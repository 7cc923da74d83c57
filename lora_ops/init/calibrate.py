"""What a model's batches tell of its layers' inputs and gradients, gathered by hooks and thrown away as soon as it is used."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .statistics import MeanGradient

Loss = Callable[[nn.Module, Any], Tensor]


def gather_inputs(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    gathered: dict[str, Any],
    *,
    rows: Callable[[Any], Tensor | None] = lambda batch: None,
    finished: Callable[[], bool] = lambda: False,
) -> None:
    """Runs the model over batches, without gradients, and hands every layer's inputs, (rows, K) in fp32 at least, to the
    `update` of what gathers them. Layers that one after the other get the very same input, as q_proj, k_proj and v_proj do,
    gather together.

    Args:
        rows: of a batch, which positions count: a boolean tensor with the leading dimensions of layers' inputs. None: all.
        finished: asked after every batch; True ends it.
    """
    counted: Tensor | None = None
    first_batch = True
    leader: dict[str, str] = {}  # of a layer the one that it gathers with
    latest: tuple[str, Tensor] | None = None  # the leader that was called last, and its input

    def hook(name: str) -> Callable[..., None]:
        def gather(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            nonlocal latest
            follows = latest is not None and args[0] is latest[1] and _alike(gathered[name], gathered[latest[0]])
            if follows and first_batch and latest is not None and name not in leader:
                leader[name] = latest[0]
                gathered[name] = gathered[latest[0]]
            if name not in leader:
                gathered[name].update(_rows_of(args[0], counted))
                latest = name, args[0]
            elif latest is None or args[0] is not latest[1]:
                raise RuntimeError(f"{name} had the input of {leader[name]} in the first batch, and has another one now")

        return gather

    with torch.no_grad(), _hooks(layers[name].register_forward_hook(hook(name)) for name in gathered):
        for batch in batches:
            counted = rows(batch)
            call(model, batch)
            first_batch, latest = False, None
            if finished():
                return


def gather_gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    gathered: dict[str, Any],
    done: Callable[[str], None],
    loss: Loss | None,
) -> None:
    """Runs the model forward and backward over batches, and hands every layer's gradient for its weight, G = dyᵀ x (N, K) in
    fp32 at least, to the `update` of what gathers them, the moment that dy is there: one G at a time exists beside what is
    gathered. Weights need no gradient of their own, and get none.

    Args:
        done: called with a layer's name when the last batch's backward has passed it.
    """
    pending = dict.fromkeys(layers, 0)
    last = False

    def hook(name: str) -> Callable[..., Any]:
        def forward(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            y = y if y.requires_grad else y.detach().requires_grad_().clone()  # a leaf could not be written to in place
            x = args[0].detach()
            pending[name] += 1

            def backward(dy: Tensor) -> None:
                gathered[name].update(_gradient(dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])))
                pending[name] -= 1
                if pending[name] == 0:
                    if last:
                        done(name)
                    elif isinstance(gathered[name], MeanGradient):
                        gathered[name].rest()

            y.register_hook(backward)
            return y

        return forward

    with torch.enable_grad(), _hooks(layer.register_forward_hook(hook(name)) for name, layer in layers.items()):
        for batch, is_last in _with_last(batches):
            last = is_last
            pending.update(dict.fromkeys(pending, 0))
            (call(model, batch).loss if loss is None else loss(model, batch)).backward()


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch: a mapping is its keyword arguments, a tuple or list its arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def attended(batch: Any) -> Tensor | None:
    """The positions of a batch that are no padding, and that labels, if there are any, do not leave out (-100)."""
    if not isinstance(batch, Mapping):
        return None
    masks = [batch[key] for key in ("attention_mask",) if batch.get(key) is not None]
    masks += [batch["labels"] != -100] if batch.get("labels") is not None else []
    return torch.stack([mask.bool() for mask in masks]).all(0) if masks else None


def _gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dyᵀ x in fp32 at least; of bf16 rounded once to it, as the weight's own gradient would be, at a fraction of the time."""
    if dy.dtype == x.dtype == torch.bfloat16:
        return (dy.T @ x).to(torch.float32)
    wide = torch.promote_types(dy.dtype, torch.float32)
    return dy.to(wide).T @ x.to(wide)


def _rows_of(x: Tensor, counted: Tensor | None) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    if counted is not None and x.shape[:-1] == counted.shape:
        return x[counted.to(x.device)].to(wide)
    return x.reshape(-1, x.shape[-1]).to(wide)


def _alike(a: Any, b: Any) -> bool:
    """Whether one may stand for the other as long as both are new."""
    return type(a) is type(b) and getattr(a, "r", None) == getattr(b, "r", None)


@contextmanager
def _hooks(handles: Iterable[Any]) -> Iterator[None]:
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_last(items: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Every item, and whether it is the last one."""
    held: list[Any] = []
    for item in items:
        if held:
            yield held.pop(), False
        held.append(item)
    if held:
        yield held.pop(), True
