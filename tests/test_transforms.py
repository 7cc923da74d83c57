"""torch.func over the public functions: grad, vjp, jvp, vmap and what they compose to; forward mode; per-sample gradients.

Under a transform a function is composed of PyTorch's own operations. In fp64, so that nothing here is a matter of rounding.
"""

import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import lora_ops
from lora_ops import AdapterBank, FusedLoraConv1d, FusedLoraEmbedding, FusedLoraLinear, quantize_nf4

M, K, N, r = 5, 70, 12, 3
WEIGHT = torch.randn(N, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
QWEIGHT = quantize_nf4(WEIGHT.float())
IDS = torch.tensor([0, 1, -1, 0, 1])


def dense(x, A, B, **options):
    return lora_ops.lora_linear(x, WEIGHT, A, B, scaling=0.5, bias=torch.ones(N, dtype=x.dtype), **options)


def general(x, A, B, **options):
    gate, core, out_scale = (torch.linspace(0.5, 2, n, dtype=x.dtype) for n in (r, r * r, N))
    return dense(x, A, B, gate=gate, core=core.view(r, r), out_scale=out_scale, **options)


def four_bits(x, A, B, **options):
    return lora_ops.qlora_linear(x, QWEIGHT, A, B, scaling=0.5, **options)


def mixed(x, A, B, **options):
    bank = AdapterBank()
    bank.add("first", A, B, 0.5)
    bank.add("second", A[:2], B[:, 1:], 2.0)
    return lora_ops.multi_lora_linear(x, WEIGHT, bank, IDS, **options)


def dora(x, A, B, **options):
    magnitude = torch.linspace(1, 3, N, dtype=x.dtype)
    return lora_ops.dora_linear(x, WEIGHT, A, B, magnitude, scaling=0.5, bias=torch.ones(N, dtype=x.dtype), **options)


def dora_four_bits(x, A, B, **options):
    magnitude = torch.linspace(1, 3, N, dtype=x.dtype)
    return lora_ops.dora_linear(x, QWEIGHT, A, B, magnitude, scaling=0.5, **options)


FUNCTIONS = [dense, general, four_bits, mixed, dora, dora_four_bits]
every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)


def inputs(*batch: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(*batch, *shape, dtype=torch.float64) for shape in ((M, K), (r, K), (N, r)))


def assert_close(actual, expected, function=None):
    """dora_four_bits has its norm in fp32."""
    rtol, atol = (1e-3, 1e-4) if function is dora_four_bits else (1e-6, 1e-9)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@every_function
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradients_are_those_of_backward(function, dropout_p):
    x, A, B = inputs()
    dy = torch.randn(M, N, dtype=torch.float64)

    def loss(x, A, B):
        return (function(x, A, B, dropout_p=dropout_p, training=True) * dy).sum()

    leaves = [t.clone().requires_grad_() for t in (x, A, B)]
    torch.manual_seed(3)
    loss(*leaves).backward()
    torch.manual_seed(3)
    for actual, leaf in zip(grad(loss, argnums=(0, 1, 2))(x, A, B), leaves, strict=True):
        assert_close(actual, leaf.grad, function)


@every_function
def test_forward_mode_is_the_transpose_of_reverse_mode(function):
    """⟨u, J v⟩ = ⟨Jᵀ u, v⟩, by torch.func.jvp and by dual numbers."""
    primals, tangents, u = inputs(), inputs(), torch.randn(M, N, dtype=torch.float64)
    y, pull = vjp(function, *primals)
    expected = sum((a * b).sum() for a, b in zip(pull(u), tangents, strict=True))
    with forward_ad.dual_level():
        dual = function(*(forward_ad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)))
        by_dual = forward_ad.unpack_dual(dual).tangent
    for tangent in (jvp(function, primals, tangents)[1], by_dual):
        assert_close((u * tangent).sum(), expected)
    assert_close(y, function(*primals))


@every_function
def test_vmap_is_a_loop(function):
    """Over x, over adapters, over both, and over gradients of both: no rule is missing, and nothing falls back to a loop."""
    one, many = inputs(), inputs(4)

    def loss(x, A, B):
        return function(x, A, B).square().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dims in ((0, None, None), (None, 0, 0), (0, 0, 0)):
            args = [b if d == 0 else a for a, b, d in zip(one, many, dims, strict=True)]
            loop = [[t[i] if d == 0 else t for t, d in zip(args, dims, strict=True)] for i in range(4)]
            assert_close(vmap(function, dims)(*args), torch.stack([function(*row) for row in loop]), function)
            expected = torch.stack([grad(loss, argnums=1)(*row) for row in loop])
            assert_close(vmap(grad(loss, argnums=1), dims)(*args), expected, function)


@every_function
def test_jacobians_and_the_second_derivative(function):
    x, A, B = inputs()
    assert_close(jacrev(function, argnums=2)(x, A, B), jacfwd(function, argnums=2)(x, A, B))
    # DoRA's norm is a constant of derivatives.
    norm = {"norm": torch.linspace(2, 3, N, dtype=torch.float64)} if function in (dora, dora_four_bits) else {}

    def loss(B):
        return function(x, A, B, **norm).square().sum()

    step, before = 1e-5 * torch.randn(N, r, dtype=torch.float64), grad(loss)
    change = (before(B + step) - before(B - step)) / 2
    torch.testing.assert_close((hessian(loss)(B) * step).sum((2, 3)), change, rtol=1e-4, atol=1e-9)


@every_function
def test_batches_of_output_gradients(function):
    """What torch.autograd.functional.jacobian(vectorize=True) asks of a backward."""
    x, A, B = (t.requires_grad_() for t in inputs())
    y, many = function(x, A, B), torch.randn(4, M, N, dtype=torch.float64)
    batched = torch.autograd.grad(y, (x, A, B), many, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, (x, A, B), dy, retain_graph=True) for dy in many]
    for actual, expected in zip(batched, zip(*one_by_one, strict=True), strict=True):
        assert_close(actual, torch.stack(expected))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_draws_masks_as_it_is_told(randomness):
    x, A, B = inputs()
    many = vmap(lambda x: dense(x, A, B, dropout_p=0.5, training=True), randomness=randomness)(x.expand(2, M, K))
    assert torch.allclose(many[0], many[1]) == (randomness == "same")
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: dense(x, A, B, dropout_p=0.5, training=True))(x[None])


LAYERS = {
    "linear": lambda: FusedLoraLinear(K, N, r=r, init_lora_weights=False),
    "prepack": lambda: FusedLoraLinear(K, N, r=r, init_lora_weights=False, prepack=True),
    "dora": lambda: FusedLoraLinear(K, N, r=r, init_lora_weights=False, use_dora=True),
    "4 bits": lambda: FusedLoraLinear.from_linear(nn.Linear(K, N), r, init_lora_weights=False, quant="nf4"),
    "conv": lambda: FusedLoraConv1d(K, N, 1, r, init_lora_weights=False),
    "embedding": lambda: FusedLoraEmbedding(K, N, r, init_lora_weights=False),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_per_sample_gradients_of_a_layer(kind):
    """By functional_call, as torch's tutorial has them; together they are the batch's gradient."""
    layer = LAYERS[kind]()
    if kind != "4 bits":
        layer = layer.double()
    dtype = torch.float32 if kind == "4 bits" else torch.float64
    x = {"conv": torch.randn(4, K, 61), "embedding": torch.randint(0, K, (4, 6))}.get(kind, torch.randn(4, 6, K))
    x = x.to(dtype) if x.is_floating_point() else x
    trained = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}

    def loss(parameters, x):
        return functional_call(layer, parameters, (x[None],)).square().sum()

    each = vmap(grad(loss), (None, 0))(trained, x)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            rtol, atol = (1e-6, 1e-9) if dtype == torch.float64 else (1e-3, 1e-4)
            torch.testing.assert_close(each[name].sum(0), parameter.grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize("function", [dense, general, four_bits, dora], ids=lambda f: f.__name__)
def test_compiled(function):
    """A transform inside torch.compile(fullgraph=True)."""

    def per_sample(x, A, B):
        return vmap(grad(lambda A, x: function(x, A, B).square().sum()), (None, 0))(A, x)

    x, A, B = inputs()
    try:
        compiled = torch.compile(per_sample, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x[:, None], A, B), per_sample(x[:, None], A, B))
    finally:
        torch.compiler.reset()


def test_the_frozen_weight_stays_frozen():
    x, A, B = inputs()
    with pytest.raises(ValueError, match="weight requires grad, but W0 is frozen"):
        grad(lambda W: lora_ops.lora_linear(x, W, A, B, scaling=1.0).sum())(WEIGHT)


@pytest.mark.parametrize("op", ["lora_forward", "lora_general_forward", "multi_lora_forward"])
def test_an_operator_by_itself_is_refused(op):
    """It would lose tangents without a word."""
    x, A, B = inputs()
    calls = {
        "lora_forward": lambda x: torch.ops.lora_ops.lora_forward(x, WEIGHT, A, B, None, None, None, 1.0, 0.0)[0],
        "lora_general_forward": lambda x: torch.ops.lora_ops.lora_general_forward(
            x, [WEIGHT], 0, "", A, B, None, None, None, None, None, None, 1.0, 0.0, False
        )[0],
        "multi_lora_forward": lambda x: torch.ops.lora_ops.multi_lora_forward(
            x, [WEIGHT], K, 0, "", [A, A], [B, B], torch.ones(2, dtype=torch.float64), IDS, None, None, 0.0
        )[0],
    }
    for transform in (lambda f: grad(lambda x: f(x).sum())(x), lambda f: jvp(f, (x,), (x,))):
        with pytest.raises(RuntimeError, match=rf"torch.ops.lora_ops.{op} has no rule for torch.func's transforms"):
            transform(calls[op])


@every_function
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_create_graph_is_an_error_that_names_a_way(function, dropout_p):
    x, A, B = (t.requires_grad_() for t in inputs())
    y = function(x, A, B, dropout_p=dropout_p, training=True)
    with pytest.raises(RuntimeError, match=r"_linear is differentiable once.*torch.func.grad of torch.func.grad"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
