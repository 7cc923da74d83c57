"""The dropout of lora_linear: the generator, its mask, and that forward and backward agree on it."""

import itertools

import pytest
import torch
from compare import F32, Dtypes, assert_median, assert_within_bound, every_dtype, fused_lora, make_case, shape_errors
from torch.utils.checkpoint import checkpoint

import lora_ops
from lora_ops import _C, reference

SEEDS = [0, 1, 0x0123456789ABCDEF, 2**62 - 1]


def kernel_keep(seed: int, threshold: int, rows: int, cols: int) -> torch.Tensor:
    """The kernel's mask as bool (rows, cols): bit c % 32 of word c // 32."""
    words = torch.zeros((rows, -(-cols // 128) * 4), dtype=torch.int32)
    _C.dropout_mask(rows, cols, seed, threshold, words.data_ptr())
    bits = words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32) & 1
    return bits.view(rows, -1)[:, :cols].bool()


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_numbers(counter, key, expected):
    """The known answers of philox4x32-10 that the Random123 library ships."""
    k0, k1 = (int(w, 16) for w in key.split())
    words = reference.philox(tuple(torch.tensor(int(w, 16)) for w in counter.split()), k0 | k1 << 32)
    assert [f"{int(w):08x}" for w in words] == expected.split()


@pytest.mark.parametrize("p", [2**-16, 0.05, 0.3, 0.5, 0.9, 1 - 2**-16, 1 - 2**-20], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (2, 32), (5, 127), (4, 128), (3, 129), (17, 300)], ids=str)
def test_mask_is_the_reference_mask(shape, p):
    for seed in SEEDS:
        expected = reference.dropout_keep(torch.tensor(seed), p, *shape)
        assert torch.equal(kernel_keep(seed, reference.dropout_threshold(p), *shape), expected)


def test_mask_is_random():
    """Rate, and no correlation between neighbours, rows or seeds, within five standard deviations of fair coins."""
    rows, cols, p = 512, 1024, 0.25
    keep = kernel_keep(SEEDS[2], reference.dropout_threshold(p), rows, cols)
    other = kernel_keep(SEEDS[2] + 1, reference.dropout_threshold(p), rows, cols)

    def check(events: torch.Tensor, probability: float) -> None:
        deviation = (probability * (1 - probability) / events.numel()) ** 0.5
        assert abs(events.double().mean().item() - probability) < 5 * deviation

    check(keep, 1 - p)
    for distance in (1, 2, 16, 32, 128):
        check(keep[:, :-distance] ^ keep[:, distance:], 2 * p * (1 - p))
    check(keep[:-1] ^ keep[1:], 2 * p * (1 - p))
    check(keep ^ other, 2 * p * (1 - p))
    assert (keep.double().mean(0) - (1 - p)).abs().max() < 6 * (p * (1 - p) / rows) ** 0.5
    assert (keep.double().mean(1) - (1 - p)).abs().max() < 6 * (p * (1 - p) / cols) ** 0.5


SHAPES = [
    (1, 33, 17, 1), (3, 129, 32, 16), (13, 128, 31, 8), (14, 32, 129, 4), (15, 300, 33, 64), (40, 127, 16, 8),
    (41, 31, 48, 100), (41, 576, 300, 16), (100, 129, 33, 4), (257, 257, 65, 8), (640, 33, 5000, 4),
]  # fmt: skip


@every_dtype
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_error(dtypes, backward):
    """The oracle and eager drop what the seed's mask says: forward and backward use that mask, in every tiling."""
    measured = []
    for shape, p in zip(SHAPES, itertools.cycle([0.05, 0.5, 0.9]), strict=False):
        measured.append(shape_errors(shape, dtypes, backward=backward, dropout_p=p))
        assert_within_bound(measured[-1])
    assert_median(measured, ["dx", "dA", "dB"] if backward else ["y"])


@pytest.mark.parametrize("shape", [(640, 5000), (33, 700), (41, 129)], ids=str)
def test_mask_where_rows_and_columns_come_in_blocks(shape):
    """Rows of A that pick one column of x each: S is that column of drop(x)."""
    M, K = shape
    columns = torch.arange(0, K, max(1, K // 16))
    A = torch.zeros(len(columns), K)
    A[torch.arange(len(columns)), columns] = 1
    x, weight, B, seed = torch.ones(M, K), torch.zeros(2, K), torch.zeros(2, len(columns)), torch.tensor(SEEDS[2])
    _, S = torch.ops.lora_ops.lora_forward(x, weight, A, B, None, None, seed, 1.0, 0.5)
    assert torch.equal(S, 2.0 * kernel_keep(SEEDS[2], 32768, M, K)[:, columns])


def identity(n: int, p: float, training: bool = True):
    """x -> drop(x), written as lora_linear with W0 = 0 and A = B = 1: the mask can be seen."""
    eye, zero = torch.eye(n), torch.zeros(n, n)
    return lambda x: lora_ops.lora_linear(x, zero, eye, eye, scaling=1.0, dropout_p=p, training=training)


@pytest.mark.parametrize("rows", [1, 15, 60])
def test_forward_and_backward_drop_the_same_elements(rows):
    x = torch.full((rows, 160), 3.0, requires_grad=True)
    y = identity(160, 0.25)(x)
    y.backward(torch.ones_like(y))
    assert set(y.unique().tolist()) == {0.0, 4.0}
    assert torch.equal(y > 0, x.grad > 0)
    torch.testing.assert_close(x.grad, (y > 0) / 0.75)


def test_torch_manual_seed_governs_the_mask():
    x, drop = torch.ones(4, 160), identity(160, 0.5)
    torch.manual_seed(3)
    first, second = drop(x), drop(x)
    torch.manual_seed(3)
    again = drop(x)
    seed = (torch.manual_seed(3), torch.randint(0, 2**62, (), dtype=torch.int64))[1]
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(first > 0, reference.dropout_keep(seed, 0.5, 4, 160))


def test_the_mean_over_masks_is_the_output_without_dropout():
    """Element by element, within five standard deviations of a mean, which are estimated from the same draws."""
    layer = lora_ops.FusedLoraLinear(24, 16, 4, lora_alpha=8, lora_dropout=0.3, init_lora_weights=False)
    x, draws = torch.randn(5, 24), 2000
    with torch.no_grad():
        found = torch.stack([layer(x) for _ in range(draws)]).double()
        exact = layer.eval()(x)
    assert found.std(0).min() > 0.01
    assert ((found.mean(0) - exact).abs() < 5 * found.std(0) / draws**0.5).all()


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False)])
def test_no_dropout_is_exactly_no_dropout(p, training):
    """And takes nothing from torch's generator."""
    case = make_case((41, 129, 33, 8), Dtypes(F32, F32))
    arguments = (case.x, case.weight, case.lora_A, case.lora_B)
    before = torch.get_rng_state()
    y = lora_ops.lora_linear(*arguments, scaling=0.5, dropout_p=p, training=training)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(y, lora_ops.lora_linear(*arguments, scaling=0.5))


@pytest.mark.parametrize("p", [2**-20, 1 - 2**-16, 1 - 2**-20], ids=str)
def test_p_at_the_ends_of_the_resolution(p):
    """p that rounds to 0 or 1 in units of 2^-16: the reference's mask, and its factor 1 / (1 - p)."""
    case = make_case((41, 160, 160, 160), Dtypes(F32, F32), dropout_p=p)
    x = torch.ones(41, 160, requires_grad=True)
    expected = reference.dropout_keep(case.seed, p, 41, 160) / (1 - p)
    torch.manual_seed(case.generator)
    y = identity(160, p)(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_repeats_the_mask(use_reentrant):
    case = make_case((41, 129, 33, 8), Dtypes(F32, F32), bias=True, dropout_p=0.4)

    def gradients(run) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in (case.x, case.lora_A, case.lora_B, case.bias)]
        torch.manual_seed(5)
        run(leaves).backward(case.dy)
        return [t.grad for t in leaves]

    def layer(x, lora_A, lora_B, bias):
        return lora_ops.lora_linear(
            x, case.weight, lora_A, lora_B, scaling=0.5, bias=bias, dropout_p=case.dropout_p, training=True
        )

    plain = gradients(lambda leaves: layer(*leaves))
    repeated = gradients(lambda leaves: checkpoint(layer, *leaves, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, repeated, strict=True))


def test_independent_layers_draw_independent_masks():
    case = make_case((41, 129, 33, 8), Dtypes(F32, F32), dropout_p=0.4)
    first = fused_lora(case.x, case, case.lora_A, case.lora_B, case.bias)
    second = lora_ops.lora_linear(
        case.x,
        case.weight,
        case.lora_A,
        case.lora_B,
        scaling=case.scaling,
        bias=case.bias,
        dropout_p=0.4,
        training=True,
    )
    assert not torch.equal(first, second)
