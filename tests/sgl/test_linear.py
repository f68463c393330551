"""Weights of linear layers whose gradients are made in place: which are, and that nothing else changes."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from umda_fast.parity.rule import GRADIENT_FACTOR, assert_close
from umda_fast.sgl import SelfGuided, linear
from umda_fast.sgl.graph import Reach
from umda_fast.sgl.scopes import Direction, Scope


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "LEAST", 0)


LAYER = nn.Linear(4, 3)
BARE = nn.Linear(4, 3, bias=False)
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def hooked(x: Tensor) -> Tensor:
    layer = nn.Linear(4, 3)
    layer.weight.register_hook(lambda gradient: 2 * gradient)
    hooked.weight = layer.weight  # type: ignore[attr-defined]
    return layer(x)


def autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return LAYER(x)


@pytest.mark.parametrize(
    ("function", "weight", "taken"),
    [
        (LAYER, LAYER.weight, True),
        (BARE, BARE.weight, True),
        (lambda x: LAYER(x.expand(2, 5, 4).contiguous()), LAYER.weight, True),
        (lambda x: LAYER(x).relu() @ BARE.weight, LAYER.weight, True),
        (lambda x: LAYER(x) + LAYER(2 * x), LAYER.weight, False),
        (lambda x: LAYER(x) + LAYER.weight.sum(), LAYER.weight, False),
        (lambda x: x @ LAYER.weight.T + x @ LAYER.weight.T, LAYER.weight, False),
        (lambda x: 2 * LAYER.weight.T, LAYER.weight, False),
        (lambda x: LAYER.weight @ x.T, LAYER.weight, False),
        (lambda x: LAYER.weight.T @ torch.ones(3, 2), LAYER.weight, False),
        (lambda x: torch.addmm(LAYER.bias, x, LAYER.weight.T, alpha=2), LAYER.weight, False),
        (lambda x: F.linear(x, LAYER.weight.exp(), LAYER.bias), LAYER.weight, False),
        (autocast, LAYER.weight, False),
        (LAYER, LAYER.bias, False),
        (LAYER, BARE.weight, False),
    ],
)
def test_which_weights_are_taken(function: Callable[[Tensor], Tensor], weight: nn.Parameter, taken: bool) -> None:
    out = function(X)
    (use,) = linear.linear_uses(Reach([out.sum()]), [weight])
    assert (use is not None) == taken
    if use is not None:
        (d_out,) = torch.autograd.grad(out.square().sum(), [use.edge], retain_graph=True)  # type: ignore[arg-type]
        (expected,) = torch.autograd.grad(out.square().sum(), weight)
        torch.testing.assert_close(d_out.T @ use.x, expected)


def test_hooks_and_parametrisations_are_left_alone() -> None:
    out = hooked(X)
    assert linear.linear_uses(Reach([out.sum()]), [hooked.weight]) == [None]  # type: ignore[attr-defined]
    normed = parametrizations.weight_norm(nn.Linear(4, 3))
    assert linear.linear_uses(Reach([normed(X).sum()]), list(normed.parameters())) == [None] * 3


def test_small_weights_are_not_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "LEAST", 13)
    assert linear.linear_uses(Reach([LAYER(X).sum()]), [LAYER.weight]) == [None]


class Network(nn.Module):
    """A plain trunk with a weight used twice and a part that only some tasks reach."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twice, self.last = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 7, bias=False)
        self.some = nn.Linear(7, 7)
        self.heads = nn.ModuleList(nn.Linear(7, 2) for _ in range(3))

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.twice(self.twice(self.first(x).tanh()).tanh()).tanh()
        z = self.last(hidden)
        inputs = (z, self.some(z), z.tanh())
        return {f"t{t}": head(i).square().mean() for t, (head, i) in enumerate(zip(self.heads, inputs, strict=True))}

    def shared(self) -> list[nn.Parameter]:
        return [p for part in (self.first, self.twice, self.last, self.some) for p in part.parameters()]


def steps(scope: Scope, direction: Direction, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    """What five steps of SGL make, some tasks missing now and then, with penalties and accumulation."""
    network = Network().to(dtype)
    sgl = SelfGuided(
        network.shared(),
        ["t0", "t1", "t2"],
        scope=scope,
        last_shared_layer=network.last.parameters() if scope == "last_shared_layer" else (),
        direction=direction,
        control=scope == "shared_parameters",
    )
    seen: list[tuple[str, Tensor]] = []
    for step in range(5):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
        losses = network.losses(x)
        if step % 2:
            del losses["t1"]
        if step != 3:
            network.zero_grad()
        result = sgl.backward(losses, penalty=network.twice.weight.square().sum() if step else None)
        seen += [(f"step {step}: gram", result.gram), (f"step {step}: weights", result.weights)]
        for name, p in network.named_parameters():
            grad = torch.zeros_like(p) if p.grad is None else p.grad.clone()
            seen.append((f"step {step}: {name}", grad))
    return seen


@pytest.mark.parametrize("scope", ["shared_parameters", "last_shared_layer"])
@pytest.mark.parametrize("direction", ["average", "gradient"])
def test_the_same_steps_as_without(monkeypatch: pytest.MonkeyPatch, scope: Scope, direction: Direction) -> None:
    """Held to float64 steps without, by the error of float32 steps without."""
    ours = steps(scope, direction, torch.float32)
    monkeypatch.setattr(linear, "LEAST", 1 << 40)
    composed, exact = (steps(scope, direction, dtype) for dtype in (torch.float32, torch.float64))
    for (name, one), (_, same), (_, right) in zip(ours, composed, exact, strict=True):
        assert_close(name, one, right, same, GRADIENT_FACTOR)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
def test_layers_of_other_dtypes_are_left_to_autograd(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=dtype)
    sgl = SelfGuided(layer.parameters(), ["a", "b"], balancer="equal", statistics=True, direction="gradient")
    a, b, _ = layer(X.to(dtype)).abs().square().mean(0)
    expected = torch.autograd.grad(a + b, list(layer.parameters()), retain_graph=True)
    sgl.backward({"a": a, "b": b})
    for p, gradient in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)
