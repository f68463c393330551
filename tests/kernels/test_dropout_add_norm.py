"""The Triton kernels of dropout_add_norm against the float64 reference, in the interpreter."""

import copy

import pytest
import torch
from torch import Tensor

from tests.kernels._parity import assert_close, normal
from tests.ops.checks import keeps_rule
from umda_fast import ops
from umda_fast.errors import BackendUnavailableError
from umda_fast.kernels import _rows
from umda_fast.kernels import dropout_add_norm as kernels
from umda_fast.model import HCVABlock
from umda_fast.parity.layer_cases import dropout_add_norm_case
from umda_fast.reference.philox import random_numbers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("width", [1, 7, 8, 9, 40, 256, 300])
@pytest.mark.parametrize("seed", [-1, 0x123456789ABCDEF])
def test_masks_are_those_of_the_reference(width: int, seed: int) -> None:
    """Bit for bit, forward and backward."""
    x, residual, key = torch.ones(21, width), torch.zeros(21, width), torch.tensor(seed)
    kept = random_numbers(x.shape, key) >= 30_000
    total, _, *moments = kernels.dropout_add_norm(x, None, None, residual, None, None, key, 30_000, 1e-5)
    assert torch.equal(total != 0, kept)
    dx, *_ = kernels.dropout_add_norm_backward(x, None, x, None, None, total, None, *moments, key, 30_000)
    assert torch.equal(dx != 0, kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [((70,), 97), ((3, 4), 16), ((150,), 8), ((), 513)])
@pytest.mark.parametrize(("gain", "norm", "wide"), [(True, True, False), (True, False, True), (False, True, True)])
def test_rule(dtype: torch.dtype, rows: tuple[int, ...], width: int, gain: bool, norm: bool, wide: bool) -> None:
    for p in (0.0, 0.3):
        case = dropout_add_norm_case("here", rows, width, p=p, gain=gain, norm=norm, wide=wide)
        keeps_rule(case, dtype, "triton")


def test_many_runs_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that are kept apart, in more parts than one pass of the last kernel adds."""
    monkeypatch.setattr(_rows, "MIN_RUN", 1)
    keeps_rule(dropout_add_norm_case("here", (9000,), 8, p=0.3), backend="triton")


def test_no_rows_and_what_does_not_fit() -> None:
    x, v, seed = torch.zeros(0, 8), torch.zeros(8), torch.tensor(0)
    total, normed, *moments = kernels.dropout_add_norm(x, v, v, x, v, v, seed, 9, 1e-5)
    assert total.shape == normed.shape == (0, 8)
    dx, d_residual, *sums = kernels.dropout_add_norm_backward(x, x, x, v, v, total, v, *moments, seed, 9)
    assert dx.shape == d_residual.shape == (0, 8)
    assert all(torch.equal(s, torch.zeros(8)) for s in sums)
    wide = torch.zeros(1, 4097)
    for arguments, error, name in (
        ((x.double(), v, v, x, v, v, seed), TypeError, "x"),
        ((x, v, v, x.double(), v, v, seed), TypeError, "residual"),
        ((x, v, v, torch.zeros(1, 8), v, v, seed), ValueError, "residual"),
        ((x, v[:7], v, x, v, v, seed), ValueError, "bias"),
        ((x, v, v[:7], x, v, v, seed), ValueError, "gain"),
        ((x, v, v, x, v, None, seed), ValueError, "norm_weight, norm_bias"),
        ((x, v, v, x, v, v, seed.int()), TypeError, "seed"),
        ((wide, None, None, wide, None, None, seed), ValueError, "4096"),
    ):
        with pytest.raises(error, match=name):
            kernels.dropout_add_norm(*arguments, 9, 1e-5)
    with pytest.raises(ValueError, match="d_sum"):
        kernels.dropout_add_norm_backward(torch.zeros(1, 8), x, x, v, v, total, v, *moments, seed, 9)


def test_the_same_bits_twice() -> None:
    x, v, seed = torch.randn(150, 24), torch.randn(24), torch.tensor(3)
    total, _, *moments = kernels.dropout_add_norm(x, v, v, x, v, v, seed, 9000, 1e-5)
    first, second = (kernels.dropout_add_norm_backward(x, x, x, v, v, total, v, *moments, seed, 9000) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_of_several_tasks_and_forward_mode() -> None:
    x, residual = (torch.randn(4, 16, requires_grad=True) for _ in range(2))
    vectors, seed = [torch.randn(16, requires_grad=True) for _ in range(4)], torch.tensor(3)

    def run(x: Tensor) -> Tensor:
        total, normed = ops.dropout_add_norm(x, residual, *vectors, p=0.3, seed=seed, backend="triton")
        assert normed is not None
        return torch.stack([total, normed])

    leaves = [x, residual, *vectors]
    y, d_y = run(x), torch.randn(3, 2, 4, 16)
    together = torch.autograd.grad(y, leaves, d_y, is_grads_batched=True, retain_graph=True)
    for b in range(3):
        alone = torch.autograd.grad(y, leaves, d_y[b], retain_graph=True)
        assert all(torch.equal(batched[b], one) for batched, one in zip(together, alone, strict=True))
    with pytest.raises(BackendUnavailableError, match="reference"):
        torch.func.jvp(run, (x.detach(),), (x.detach(),))


def test_opcheck() -> None:
    x, residual = (torch.randn(4, 2, 16, requires_grad=True) for _ in range(2))
    vectors = [torch.randn(16, requires_grad=True) for _ in range(4)]
    op = torch.ops.umda_fast.dropout_add_norm_triton.default
    torch.library.opcheck(op, (x, *vectors[:2], residual, *vectors[2:], torch.tensor(3), 6554, 1e-5))
    torch.library.opcheck(op, (x, None, None, residual, None, None, None, 0, 1e-5))


def test_a_block_of_the_model_runs_on_them() -> None:
    """Forward and backward of a block, all of it on Triton kernels, by the rule."""
    torch.manual_seed(0)
    block = HCVABlock(16, 2, 3, dropout=0.0)
    torch.nn.init.normal_(block.influence_bias)
    mask = torch.rand(6, 3) > 0.3
    mask[:, 0] = True
    x = normal(6, 3, 16, seed=1).masked_fill(~mask[..., None], 0)

    def run(block: HCVABlock, backend: str, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        leaf = x.clone().requires_grad_()
        with ops.use_backend(backend):
            outputs = block(leaf, mask)
        weights = [normal(*y.shape, seed=i).to(y.dtype) for i, y in enumerate(outputs)]
        return list(outputs), list(torch.autograd.grad(outputs, [leaf, *block.parameters()], weights))

    ours, own = run(block, "triton", x), run(block, "reference", x)
    assert {ops.backends_used()[name] for name in ("cross_view", "gelu_dropout", "dropout_add_norm")} == {"reference"}
    run(block, "triton", x)
    assert {ops.backends_used()[name] for name in ("cross_view", "gelu_dropout", "dropout_add_norm")} == {"triton"}
    exact = run(copy.deepcopy(block).double(), "reference", x.double())
    for i, name in enumerate(["y", "mass", "entropy"]):
        assert_close(name, ours[0][i].detach(), exact[0][i].detach(), own[0][i].detach(), 2)
    names = ["x", *(name for name, _ in block.named_parameters())]
    for name, a, e, o in zip(names, ours[1], exact[1], own[1], strict=True):
        assert_close(f"d_{name}", a, e, o, 3)
