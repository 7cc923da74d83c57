"""The protocol: in a loop, in transformers' Trainer, and what of a model methods see."""

import importlib

import pytest
import torch
from low_rank_models import F64, Pair, batch, gated, layers, loss_of, mlp, plain, train, trainable
from tiny_models import llama, tokens
from transformers import Trainer, TrainingArguments

import lora_ops
from lora_ops.methods import (
    AFLoRA,
    MergeAndRestart,
    Regularizer,
    TrainingMethod,
    low_rank_paths,
    roselora,
    trainer_callback,
)
from lora_ops.optim import LoraFA, loraplus_groups
from lora_ops.registry import methods

R = 4


class Recorder(TrainingMethod):
    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def on_backward(self, step: int) -> None:
        self.calls.append(("backward", step))

    def on_step(self, step: int) -> None:
        self.calls.append(("step", step))


def test_parts_run_in_order_with_the_optimiser():
    parts = [Recorder(), Recorder()]
    optimizer, method = torch.optim.SGD(mlp().parameters(), lr=0.1), TrainingMethod(*parts)
    assert method.attach(optimizer) is method
    method.on_backward(1)
    method.on_step(1)
    assert all(part.calls == [("backward", 1), ("step", 1)] and part.optimizer is optimizer for part in parts)


def test_a_regulariser_is_a_term_of_the_loss():
    model, data = plain(R), batch()
    p = layers(model)[0].lora_A["default"]
    method = Regularizer(0.3, lambda: p.square().sum(), until=1)
    loss_of(model, data).backward()
    before = p.grad.clone()
    method.on_backward(1)
    torch.testing.assert_close(p.grad, before + 0.6 * p.detach())
    method.on_backward(2)
    torch.testing.assert_close(p.grad, before + 0.6 * p.detach())


def test_paths_are_read_where_they_live():
    model = gated(R)
    model[2].factors = model[4].factors  # one provider for two layers
    assert [path.name for path in low_rank_paths(model)] == ["0", "2"]
    path = low_rank_paths(model)[0]
    model[0].factors.pair = Pair(torch.zeros(2, 12, dtype=F64), torch.zeros(16, 2, dtype=F64))
    assert path.lora_A is model[0].factors.pair.lora_A
    model = plain(R, lora_alpha=16)
    lora_ops.add_adapter(model, lora_ops.LoraConfig(r=2, target_modules=["0"]), "other")
    layers(model)[0].set_adapter(["default", "other"])
    assert [(path.name, path.adapter, path.scaling) for path in low_rank_paths(model)[:2]] == [
        ("0", "default", 4.0),
        ("0", "other", 4.0),
    ]
    with pytest.raises(ValueError, match="LoRA"):
        low_rank_paths(mlp())


@pytest.mark.parametrize("score", ["gradient", "sensitivity"])
def test_aflora_freezes_for_good(score):
    """The number of frozen matrices never falls, ends at all of them, and a frozen one stays bit-equal."""
    model, data = gated(R), batch()
    method = AFLoRA(model, 2, 14, every=2, score=score)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
    method.attach(optimizer)
    frozen, counts, gates = {}, [], [layer.factors.gate.detach().clone() for layer in layers(model)]
    for step in range(1, 18):
        train(model, optimizer, data, 1, method, first=step)
        for i, p in enumerate(method.factors):
            assert i not in frozen or torch.equal(frozen[i], p)
            if not p.requires_grad:
                assert p.grad is None
                assert p not in optimizer.state
                frozen.setdefault(i, p.detach().clone())
        counts.append(len(frozen))
    assert counts == sorted(counts)
    assert (counts[2], counts[13]) == (0, 6)
    assert len(set(counts)) > 2  # not all at once
    after = [layer.factors.gate for layer in layers(model)]
    assert all(not torch.equal(a, b) for a, b in zip(gates, after, strict=True))
    with pytest.raises(ValueError, match="score"):
        AFLoRA(model, 1, 2, score="norm")


def examples(n: int = 8) -> list[dict]:
    row = tokens()[0]
    return [{"input_ids": row, "labels": row} for _ in range(n)]


def arguments(tmp_path, **options) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True, lr_scheduler_type="constant", **options,
    )  # fmt: skip


def test_the_trainer_calls_methods_around_its_steps(tmp_path):
    """Once per step of the optimiser, also where gradients accumulate; what a restart and LoRA-FA do is there afterwards."""
    model = lora_ops.add_lora(llama(), lora_ops.LoraConfig(r=R, target_modules=["q_proj", "v_proj"]))
    recorder, fa, restart = Recorder(), LoraFA(model), MergeAndRestart(model, 2)
    before = {path.name: (path.layer.weight.clone(), path.lora_A.detach().clone()) for path in low_rank_paths(model)}
    optimizer = torch.optim.AdamW(loraplus_groups(model, lr=1e-2, ratio=4))
    trainer = Trainer(
        model, arguments(tmp_path, gradient_accumulation_steps=2), train_dataset=examples(16), optimizers=(optimizer, None),
        callbacks=[trainer_callback(recorder, fa, restart)],
    )  # fmt: skip
    trainer.train()
    assert recorder.calls == [(what, step) for step in range(1, 5) for what in ("backward", "step")]
    assert recorder.optimizer.param_groups is optimizer.param_groups
    assert restart.restarts == 2
    for path in low_rank_paths(model):
        W0, A0 = before[path.name]
        assert torch.linalg.matrix_rank(path.layer.weight - W0, rtol=1e-4) == 2 * R
        assert not torch.equal(path.lora_A, A0)
        assert not path.lora_B.any()  # the last step was a restart


def test_the_trainer_is_the_loop(tmp_path):
    """A method in the Trainer and in a loop of one's own: the same weights."""
    torch.manual_seed(0)
    ours, theirs = (lora_ops.add_lora(llama(), lora_ops.LoraConfig(r=R, target_modules=["q_proj", "v_proj"])) for _ in range(2))
    for path in low_rank_paths(ours):
        torch.nn.init.normal_(path.lora_B, std=0.1)
    theirs.load_state_dict(ours.state_dict())
    optimizers = [torch.optim.AdamW(trainable(m), lr=1e-2, weight_decay=0.0) for m in (ours, theirs)]
    method = roselora(ours, 0.5, 4)
    trainer = Trainer(
        theirs, arguments(tmp_path, max_grad_norm=0.0), train_dataset=examples(), optimizers=(optimizers[1], None),
        callbacks=[trainer_callback(roselora(theirs, 0.5, 4))],
    )  # fmt: skip
    trainer.train()
    row = tokens()[:1].repeat(2, 1)
    ours.train()
    for step in range(1, 5):
        optimizers[0].zero_grad()
        ours(input_ids=row, labels=row).loss.backward()
        method.on_backward(step)
        optimizers[0].step()
        method.on_step(step)
    zeros = 0
    for p, q in zip(trainable(ours), trainable(theirs), strict=True):
        torch.testing.assert_close(p, q)
        zeros += int((p == 0).sum())
    assert zeros > 0


def test_only_methods_go_into_the_trainer():
    with pytest.raises(TypeError, match="TrainingMethod"):
        trainer_callback(Recorder)


def test_what_the_registry_says_exists():
    """Every method's test is there, and its line runs."""
    for name, m in methods().items():
        if m.code.__module__.startswith(("lora_ops.methods", "lora_ops.optim")):
            file, _, test = m.test.partition("::")
            assert hasattr(importlib.import_module(file.removesuffix(".py")), test), name
            needs_gates = "P" in m.changes
            model, x = gated(R) if needs_gates else plain(R), batch()[0]
            optimizer, linear = torch.optim.SGD(trainable(model), lr=0.1), torch.nn.Linear(4, 4)
            names = {"torch": torch, "model": model, "x": x, "optimizer": optimizer, "linear": linear}
            exec(m.use, {**vars(lora_ops), **names})
