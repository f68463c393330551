"""Sharpness-aware minimisation by hand, and inside a self-guided step."""

import pytest
import torch
from torch.nn import Parameter

from tests.sgl.oracle import TwoHeads
from umda_fast.sgl import SelfGuided, ascended


def test_the_gradient_is_that_of_the_shifted_point() -> None:
    x, y = Parameter(torch.tensor([3.0])), Parameter(torch.tensor([2.0]))
    unused = Parameter(torch.ones(1))
    (x.square() / 2 + y.square()).sum().backward()  # gradient (3, 4), norm 5
    with ascended([x, y, unused], rho=0.5):
        assert x.grad is None
        torch.testing.assert_close(torch.cat([x, y, unused]).detach(), torch.tensor([3.3, 2.4, 1.0]))
        (x.square() / 2 + y.square()).sum().backward()
    assert (x.item(), y.item()) == (3.0, 2.0)
    torch.testing.assert_close(torch.cat([x.grad, y.grad]), torch.tensor([3.3, 4.8]))


def test_complex_and_sparse_gradients() -> None:
    turned, table = Parameter(torch.tensor([3 + 0j, 0j])), Parameter(torch.zeros(3, 1))
    turned.grad = torch.tensor([3j, 0j])
    table.grad = torch.sparse_coo_tensor([[1, 1]], [[1.0], [3.0]], (3, 1), check_invariants=True)
    with ascended([turned, table], rho=0.5):
        torch.testing.assert_close(turned.detach(), torch.tensor([3 + 0.3j, 0j]))
        torch.testing.assert_close(table.detach(), torch.tensor([[0.0], [0.4], [0.0]]))
    assert turned.tolist() == [3, 0]


def test_parameters_come_back_after_an_error_and_a_zero_gradient_moves_nothing() -> None:
    x = Parameter(torch.tensor([0.1, 0.7]))
    before = x.detach().clone()
    x.grad = torch.tensor([1.0, 1.0])
    with pytest.raises(RuntimeError, match="stop"), ascended([x]):
        raise RuntimeError("stop")
    assert torch.equal(x, before)
    x.grad = torch.zeros(2)
    with ascended([x]):
        assert torch.equal(x, before)


def test_wrong_arguments_are_named() -> None:
    x = Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"^parameters: "), ascended([x]):
        pass
    with pytest.raises(ValueError, match=r"^rho: "), ascended([x], rho=0.0):
        pass


def test_around_a_self_guided_step() -> None:
    model = TwoHeads()
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sgl = SelfGuided(model.shared(), ["t0", "t1", "t2"])
    losses, penalty, _ = model.losses(x)
    (torch.stack(list(losses.values())).sum() + penalty).backward()
    gradient = model.trunk[0].weight.grad.clone()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
    start = model.trunk[0].weight.detach().clone()
    with ascended(model.parameters(), rho=0.1):
        torch.testing.assert_close(model.trunk[0].weight.detach(), start + 0.1 * gradient / norm)
        losses, penalty, _ = model.losses(x)
        sgl.backward(losses, penalty=penalty)
    assert torch.equal(model.trunk[0].weight, start)
    assert not torch.equal(model.trunk[0].weight.grad, gradient)
