"""The Triton kernels of gelu_dropout against the float64 reference, in the interpreter."""

import pytest
import torch
from torch import Tensor

from tests.ops.checks import keeps_rule
from umda_fast import ops
from umda_fast.errors import BackendUnavailableError
from umda_fast.kernels import _rows
from umda_fast.kernels import gelu_dropout as kernels
from umda_fast.parity.layer_cases import gelu_dropout_case
from umda_fast.reference.philox import random_numbers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("width", [1, 7, 8, 9, 40, 255, 256, 300])
@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, 0x123456789ABCDEF])
def test_masks_are_those_of_the_reference(width: int, seed: int) -> None:
    """Bit for bit, forward and backward."""
    x, key = torch.full((21, width), 20.0), torch.tensor(seed)
    kept = random_numbers(x.shape, key) >= 30_000
    assert torch.equal(kernels.gelu_dropout(x, None, key, 30_000) != 0, kept)
    assert torch.equal(kernels.gelu_dropout_backward(x, x, None, key, 30_000)[0] != 0, kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [((70,), 97), ((3, 4), 16), ((150,), 8), ((), 513)])
@pytest.mark.parametrize("wide_bias", [False, True])
def test_rule(dtype: torch.dtype, rows: tuple[int, ...], width: int, wide_bias: bool) -> None:
    for p in (0.0, 0.3):
        keeps_rule(gelu_dropout_case("here", rows, width, p=p, wide_bias=wide_bias), dtype, "triton")


def test_many_runs_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that are kept apart, in more parts than one pass of the last kernel adds."""
    monkeypatch.setattr(_rows, "MIN_RUN", 1)
    keeps_rule(gelu_dropout_case("here", (9000,), 8, p=0.3), backend="triton")


def test_no_rows_and_what_does_not_fit() -> None:
    x, bias, seed = torch.zeros(0, 8), torch.zeros(8), torch.tensor(0)
    assert kernels.gelu_dropout(x, bias, seed, 9).shape == (0, 8)
    dx, d_bias = kernels.gelu_dropout_backward(x, x, bias, seed, 9)
    assert dx.shape == (0, 8)
    assert torch.equal(d_bias, torch.zeros(8))
    for arguments, error, name in (
        ((x.double(), bias, seed, 9), TypeError, "x"),
        ((x, bias[:7], seed, 9), ValueError, "bias"),
        ((x, bias, seed.int(), 9), TypeError, "seed"),
        ((x, bias, seed[None], 9), ValueError, "seed"),
    ):
        with pytest.raises(error, match=name):
            kernels.gelu_dropout(*arguments)
    with pytest.raises(ValueError, match="d_y"):
        kernels.gelu_dropout_backward(torch.zeros(1, 8), x, bias, seed, 9)


def test_the_same_bits_twice() -> None:
    x, bias, seed = torch.randn(150, 24), torch.randn(24), torch.tensor(3)
    first, second = (kernels.gelu_dropout_backward(x, x, bias, seed, 9000) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_of_several_tasks_and_forward_mode() -> None:
    x, bias, seed = torch.randn(4, 16, requires_grad=True), torch.randn(16, requires_grad=True), torch.tensor(3)

    def run(x: Tensor) -> Tensor:
        return ops.gelu_dropout(x, bias, p=0.3, seed=seed, backend="triton")

    y, d_y = run(x), torch.randn(3, 4, 16)
    together = torch.autograd.grad(y, [x, bias], d_y, is_grads_batched=True, retain_graph=True)
    for b in range(3):
        alone = torch.autograd.grad(y, [x, bias], d_y[b], retain_graph=True)
        assert all(torch.equal(batched[b], one) for batched, one in zip(together, alone, strict=True))
    with pytest.raises(BackendUnavailableError, match="reference"):
        torch.func.jvp(run, (x.detach(),), (x.detach(),))


def test_opcheck() -> None:
    x, bias = torch.randn(4, 2, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    op = torch.ops.umda_fast.gelu_dropout_triton.default
    torch.library.opcheck(op, (x, bias, torch.tensor(3), 6554))
    torch.library.opcheck(op, (x, None, None, 0))
