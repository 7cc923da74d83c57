"""Training methods in transformers' Trainer."""

from typing import TYPE_CHECKING, Any

from ..training import TrainingMethod

if TYPE_CHECKING:
    from transformers import TrainerCallback


def trainer_callback(*methods: TrainingMethod) -> "TrainerCallback":
    """A `transformers.TrainerCallback` that calls the methods around every step of the Trainer's optimiser, after it has
    accumulated, unscaled and clipped the gradients, and attaches that optimiser to them when training begins.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[trainer_callback(adalora(model, ...))])

    Raises:
        TypeError: something that is no TrainingMethod.
        ImportError: transformers is not installed, or is older than 4.46, whose callbacks do not see gradients before a step.
    """
    for m in methods:
        if not isinstance(m, TrainingMethod):
            raise TypeError(f"methods must be of TrainingMethod, got {type(m).__name__}")
    from transformers import TrainerCallback

    if not hasattr(TrainerCallback, "on_pre_optimizer_step"):
        raise ImportError("transformers must be at least 4.46: TrainerCallback has no on_pre_optimizer_step")

    class MethodsCallback(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for m in methods:
                m.attach(kwargs["optimizer"])

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for m in methods:
                m.on_backward(state.global_step + 1)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for m in methods:
                m.on_step(state.global_step + 1)

    return MethodsCallback()
