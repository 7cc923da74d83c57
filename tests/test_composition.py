"""Every layer and function in torch's own machinery: compiled, exported, checkpointed, profiled, made on meta."""

import io

import bitsandbytes
import peft
import pytest
import torch
from torch import nn
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

import lora_ops
from lora_ops import AdapterBank, FusedLoraConv1d, FusedLoraConv2d, FusedLoraEmbedding, FusedLoraLinear
from lora_ops.integrations.peft import patch

K, N, P = 64, 48, 0.25


class General(nn.Module):
    """`lora_linear` with a gate, a core and an output scale."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N, K), requires_grad=False)
        self.A, self.B = nn.Parameter(torch.randn(3, K)), nn.Parameter(torch.randn(N, 3))
        self.gate, self.core, self.scale = (nn.Parameter(torch.randn(shape)) for shape in ((3,), (3, 3), (N,)))

    def forward(self, x):
        factors = {"gate": self.gate, "core": self.core, "out_scale": self.scale}
        return lora_ops.lora_linear(x, self.weight, self.A, self.B, scaling=0.5, dropout_p=P, training=self.training, **factors)


class Mixed(nn.Module):
    """`multi_lora_linear` over three adapters."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N, K), requires_grad=False)
        self.As = nn.ParameterList(torch.randn(r, K) for r in (2, 4, 3))
        self.Bs = nn.ParameterList(torch.randn(N, r) for r in (2, 4, 3))

    def forward(self, x):
        bank = AdapterBank()
        for i, (A, B) in enumerate(zip(self.As, self.Bs, strict=True)):
            bank.add(str(i), A, B, 0.5)
        ids = torch.arange(x.shape[0], device=x.device) % 4 - 1
        return lora_ops.multi_lora_linear(x, self.weight, bank, ids, dropout_p=P, training=self.training)


def linear(**options):
    return lambda: FusedLoraLinear.from_linear(nn.Linear(K, N), 4, init_lora_weights=False, lora_dropout=P, **options)


# What makes the module, the shape of its x, and its operator.
MODULES = {
    "linear": (linear(), (K,), "lora_forward"),
    "prepack": (linear(prepack=True), (K,), "lora_forward"),
    "dora": (linear(use_dora=True), (K,), "lora_forward_wide"),
    "4 bits": (linear(quant="nf4"), (K,), "qlora_forward"),
    "4 bits, dora": (linear(quant="nf4", use_dora=True), (K,), "qlora_forward_wide"),
    "general": (General, (K,), "lora_general_forward"),
    "mixed": (Mixed, (K,), "multi_lora_forward"),
    "conv1d": (lambda: FusedLoraConv1d(4, 6, 1, 3, init_lora_weights=False, lora_dropout=P), (4, 61), "lora_forward"),
    "conv2d": (
        lambda: FusedLoraConv2d(4, 6, 2, 3, stride=2, init_lora_weights=False, lora_dropout=P), (4, 8, 8), "lora_forward",
    ),
    "embedding": (lambda: FusedLoraEmbedding(K, N, 3, init_lora_weights=False), (7,), None),
}  # fmt: skip
every_module = pytest.mark.parametrize("kind", MODULES)


def make(kind: str, rows: int = 5) -> tuple[nn.Module, torch.Tensor]:
    module, shape, _ = MODULES[kind]
    x = torch.randint(0, K, (rows, *shape)) if kind == "embedding" else torch.randn(rows, *shape)
    return module(), x


def run(module: nn.Module, x: torch.Tensor, call=None) -> list[torch.Tensor]:
    """y and every gradient, from one seed."""
    module.zero_grad()
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    torch.manual_seed(7)
    y = (module if call is None else call)(x)
    y.square().sum().backward()
    grads = [p.grad.clone() for p in module.parameters() if p.requires_grad]
    return [y.detach(), *([x.grad] if x.is_floating_point() else []), *grads]


def assert_same(actual, expected):
    assert len(actual) == len(expected) > 1
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.fixture(autouse=True)
def no_compiled_code():
    yield
    torch.compiler.reset()


# --- torch.compile ----------------------------------------------------------------------------------------------------


@every_module
def test_training_compiled_for_any_number_of_rows(kind):
    """With dropout, bit for bit, in one graph that no other number of rows compiles again."""
    module, x = make(kind)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    assert_same(run(module, x, compiled), run(module, x))
    with torch._dynamo.config.patch(error_on_recompile=True):
        more = torch.cat([x, x[:2]])
        assert_same(run(module, more, compiled), run(module, more))


@pytest.mark.slow
@every_module
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor(kind, dynamic):
    """Without dropout, whose seed inductor draws for itself: to rounding, which it fuses differently."""
    module, x = make(kind)
    for layer in module.modules():
        if hasattr(layer, "lora_dropout"):
            layer.lora_dropout = dict.fromkeys(layer.lora_dropout, 0.0)
    for train in (False, True) if kind not in ("general", "mixed") else (False,):
        module.train(train)
        compiled = torch.compile(module, fullgraph=True, dynamic=dynamic)
        for rows in (x, torch.cat([x, x[:2]])):
            for actual, expected in zip(run(module, rows, compiled), run(module, rows), strict=True):
                torch.testing.assert_close(actual, expected)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), module(x))


# --- torch.export -----------------------------------------------------------------------------------------------------


def exported(module: nn.Module, x: torch.Tensor):
    return torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=1000)},))


@every_module
@pytest.mark.parametrize("train", [False, True])
def test_export(kind, train):
    """The program, read again from its file, and in core operators alone: each as the module, for other rows, too."""
    module, x = make(kind)
    program = exported(module.train(train), x)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    more = torch.cat([x, x[:2]])
    results = []
    for form in (module, program.module(), torch.export.load(file).module(), program.run_decompositions().module()):
        torch.manual_seed(7)
        results.append(form(more))
    assert all(torch.equal(y, results[0]) for y in results[1:])


@pytest.mark.slow
@every_module
def test_aot_inductor(kind):
    """A package of machine code calls the operators; lora_ops must be imported where it runs."""
    module, x = make(kind)
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(exported(module.eval(), x))
        more = torch.cat([x, x[:2]])
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(more), module(more))


# --- memory and modes -------------------------------------------------------------------------------------------------


@every_module
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_repeats_masks(kind, use_reentrant):
    """Bit for bit. The reentrant kind wants an input that requires grad, which ids of an embedding cannot."""
    module, x = make(kind)
    if kind == "embedding" and use_reentrant:
        model = nn.Sequential(module, nn.Linear(N, 3))
        assert_same(run(model, x, lambda x: checkpoint(model[1], model[0](x), use_reentrant=True)), run(model, x))
    else:
        assert_same(run(module, x, lambda x: checkpoint(module, x, use_reentrant=use_reentrant)), run(module, x))


@every_module
def test_inference_mode_and_then_training(kind):
    """What a layer keeps from its first call on is not made of inference tensors."""
    module, x = make(kind)
    expected, again = run(module, x), module.eval()
    with torch.inference_mode():
        y = again(x)
    assert y.is_inference()
    assert torch.equal(y, module(x))
    assert_same(run(module.train(), x), expected)


@pytest.mark.parametrize("use_dora", [False, True])
def test_inference_mode_of_a_patched_4_bit_layer(use_dora):
    """Its second copy of the codes is made by whatever calls it first."""
    linear = bitsandbytes.nn.Linear4bit(K, N, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    linear(torch.randn(1, K))  # quantises
    model = patch(peft.get_peft_model(nn.Sequential(linear), peft.LoraConfig(r=4, target_modules=["0"], use_dora=use_dora)))
    x = torch.randn(5, K)
    with torch.inference_mode():
        y = model(x)
    assert torch.equal(run(model, x)[0], y)


@pytest.mark.parametrize("kind", [kind for kind in MODULES if not kind.startswith("4 bits")])
def test_from_meta_by_to_empty(kind):
    """As large models are loaded: made without memory, then given it, then their state."""
    module, x = make(kind)
    with torch.device("meta"):
        other = MODULES[kind][0]()
    assert all(t.is_meta for t in other.state_dict().values())
    if kind != "mixed":  # ids are numbers, and meta has none
        assert other.eval()(x.to("meta")).shape == module(x).shape
    other.to_empty(device="cpu").load_state_dict(module.state_dict())
    assert_same(run(other.train(), x), run(module, x))


# --- torch.profiler ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in MODULES if MODULES[kind][2]])
def test_the_profiler_shows_the_operator(kind):
    """By its name, forward and backward, though calls usually go around the dispatcher; and the result is the same."""
    module, x = make(kind)
    expected = run(module, x)
    with profile() as seen:
        actual = run(module, x)
    assert_same(actual, expected)
    names = {event.key for event in seen.key_averages()}
    forward = f"lora_ops::{MODULES[kind][2]}"
    assert {forward, forward.replace("forward", "backward").removesuffix("_wide")} <= names
