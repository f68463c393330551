"""A batch that is not finite does to `.grad` what it does in plain PyTorch, and to nothing that is kept."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from tests.processes import run_together
from umda_fast.sgl import BALANCERS, SelfGuided

SCOPES = ("shared_parameters", "last_shared_layer", "representation")
TARGETS = {"a": 0.5, "b": -1.0, "c": 2.0}
#: What a bad batch has, by turns: the loss of one task, and whether its gradient is finite.
BAD = ("nothing", "inf", "nan", "gradient", "length")


def spoilt(loss: Tensor, how: str) -> Tensor:
    """The loss of a bad batch."""
    if how == "nothing":  # a mean over no label: NaN, and its gradient 0
        return loss * 0 + F.cross_entropy(loss.new_zeros(2, 3), torch.tensor([-100, -100]))
    if how == "gradient":  # a loss that is finite, a gradient that is not
        return loss + (loss - loss.detach()).clamp_min(0).sqrt()
    return loss * {"inf": math.inf, "nan": math.nan, "length": 1e25}[how]


class Tiny(nn.Module):
    """Few numbers and three tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 4)
        self.heads = nn.ModuleDict({task: nn.Linear(4, 1, bias=False) for task in TARGETS})
        with torch.no_grad():
            for row, parameter in enumerate(self.parameters()):
                numbers = torch.arange(parameter.numel(), dtype=torch.float32)
                parameter.copy_(torch.sin(numbers * (row + 1) + 1).view_as(parameter))

    def losses(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        z = self.trunk(x).tanh()
        return {task: (self.heads[task](z) - target).square().mean() for task, target in TARGETS.items()}, z


def make(model: Tiny, scope: str = "shared_parameters", **options: Any) -> SelfGuided:
    layer = model.trunk.parameters() if scope == "last_shared_layer" else ()
    own = model.heads.parameters()
    return SelfGuided(
        model.trunk.parameters(),
        list(TARGETS),
        task_parameters=own,
        scope=scope,  # type: ignore[arg-type]
        last_shared_layer=layer,
        **{"variance_window": 8, **options},
    )


def backward(sgl: SelfGuided, losses: dict[str, Tensor], z: Tensor, **options: Any) -> Any:
    return sgl.backward(losses, representation=z if sgl.scope == "representation" else None, **options)


def numbers(state: Any) -> list[Tensor]:
    """Every tensor in a state."""
    if isinstance(state, Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
    return [tensor for value in values for tensor in numbers(value)]


#: Balancers that solve a problem at each call.
SOLVERS = {"mgda", "cagrad", "conicgrad", "upgrad", "dualproj", "nash_mtl", "fairgrad"}


@pytest.mark.parametrize("name", BALANCERS)
def test_every_balancer_outlives_a_bad_batch_in_fifty(name: str) -> None:
    shared = Parameter(torch.tensor([1.0, -2.0]))
    every = 5 if name in SOLVERS else 1  # the bad batches are among those that it sees
    sgl = SelfGuided([shared], list(TARGETS), balancer=name, variance_window=0, every=every)
    noise = torch.sin(torch.arange(2000.0)).view(1000, 2)
    tasks, hows = list(TARGETS), []
    for step in range(1000):
        z = shared + noise[step]
        losses = {task: ((z - target) ** 2).sum() for task, target in TARGETS.items()}
        if step % 50 == 25:
            task, how = tasks[len(hows) % 3], BAD[len(hows) % len(BAD)]
            losses[task] = spoilt(losses[task], how)
            hows.append(how)
        found = sgl.backward(losses)
        assert bool(found.weights.isfinite().all()), step
        assert shared.grad is not None
        if step % 50 != 25:
            assert bool(shared.grad.isfinite().all()), step
            shared.data.sub_(shared.grad.clamp(-1, 1), alpha=0.01)
        shared.grad = None
    placeholders = 2 if name == "dwa" else 0  # means of periods that are not there yet
    state = numbers(sgl.state_dict())
    assert sum(not bool(value.isfinite().all()) for value in state if value.is_floating_point()) <= placeholders
    figures = sgl.metrics()
    # Without gradients only losses are looked at.
    bad = [how for how in hows if sgl.statistics or how not in ("gradient", "length")]
    assert sum(figures[f"skipped/{task}"] for task in TARGETS) == len(bad) >= 12
    assert bool(shared.isfinite().all())


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("how", BAD)
@pytest.mark.parametrize("direction", ["gradient", "average"])
def test_a_bad_step_is_as_if_its_task_had_been_absent(scope: str, how: str, direction: str) -> None:
    """Everything kept is what a step without the task leaves; `.grad` is that of the weighted sum."""
    x = torch.sin(torch.arange(12.0)).view(2, 2, 3)
    states, sgls, models = [], [], []
    for absent in (False, True):
        model = Tiny()
        sgl = make(model, scope, direction=direction, balancer="sgl")
        backward(sgl, *model.losses(x[0]))
        model.zero_grad()
        losses, z = model.losses(x[1])
        if absent:
            del losses["b"]
        else:
            losses["b"] = spoilt(losses["b"], how)
        step = backward(sgl, losses, z)
        states.append(sgl.state_dict()["tensors"])
        sgls.append(sgl)
        models.append((model, step))
    for name, value in states[0].items():
        if name == "skipped":
            assert value.tolist() == [0, 1, 0]
        elif name == "weights":  # the balancer sees two tasks or three
            assert value[1] == states[1][name][1]
        else:
            assert torch.equal(value, states[1][name]), name
    assert sgls[0].metrics()["skipped/b"] == 1
    model, step = models[0]
    if scope == "shared_parameters" and direction == "average":
        broken = how != "nothing"
        assert all(bool(p.grad.isnan().all()) == broken for p in model.trunk.parameters() if p.grad is not None)
        return
    plain = copy.deepcopy(model)
    plain.zero_grad()
    losses, _ = plain.losses(x[1])
    losses["b"] = spoilt(losses["b"], how)
    sum(weight * loss for weight, loss in zip(step.weights, losses.values(), strict=True)).backward()  # type: ignore[union-attr]
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_bad_first_batch_is_not_the_beginning(scope: str) -> None:
    x = torch.sin(torch.arange(12.0)).view(2, 2, 3)
    model = Tiny()
    sgl = make(model, scope)
    losses, z = model.losses(x[0])
    step = backward(sgl, {**losses, "a": spoilt(losses["a"], "nan")}, z)
    assert step.weights.tolist() == [1, 1, 1]
    other = make(model, scope)
    model.zero_grad()
    for guided in (sgl, other):
        losses, z = model.losses(x[1])
        weights = backward(guided, {"a": losses["a"]}, z).weights
        assert weights.tolist() == [1, 0, 0]


def test_a_row_that_was_infinite_says_nothing_on_the_next_step_without_its_task() -> None:
    x = torch.sin(torch.arange(12.0)).view(2, 2, 3)
    model = Tiny()
    sgl = make(model, direction="gradient")
    losses, z = model.losses(x[0])
    backward(sgl, {**losses, "a": spoilt(losses["a"], "inf")}, z)
    model.zero_grad()
    losses, z = model.losses(x[1])
    backward(sgl, {name: losses[name] for name in ("b", "c")}, z)
    assert all(bool(p.grad.isfinite().all()) for p in model.trunk.parameters() if p.grad is not None)


def test_the_variance_leaves_out_what_is_not_finite() -> None:
    model = Tiny()
    sgl = make(model, direction="gradient", variance_window=4)
    x = torch.sin(torch.arange(24.0)).view(4, 2, 3)
    for step in range(4):
        losses, z = model.losses(x[step])
        if step == 1:
            losses["a"] = spoilt(losses["a"], "inf")
        backward(sgl, losses, z)
        model.zero_grad()
    assert math.isfinite(sgl.metrics()["gradient_variance"])
    other = make(model, direction="gradient", variance_window=4)
    state = sgl.state_dict()
    for name in ("skipped", "last_loss", "known", "held"):
        del state["tensors"][name]
    del state["variance"]["gradient_variance"]["taken"]
    other.load_state_dict(state)  # one of an earlier version
    assert other.metrics()["gradient_variance"] == sgl.metrics()["gradient_variance"]


def test_weights_that_are_not_finite_are_not_taken() -> None:
    weight = Parameter(torch.ones(2))
    sgl = SelfGuided([weight], ["a", "b"], balancer=lambda gram: gram.diagonal() / 0)
    step = sgl.backward({"a": weight.sum(), "b": weight.square().sum()})
    assert step.weights.tolist() == [1, 1]
    assert sgl.metrics()["weights_held"] == 1


def one_bad_share() -> dict[str, Any]:
    """Two steps, the first with a loss in process 1 that is not finite."""
    import torch.distributed as dist

    rank = dist.get_rank()
    found = {}
    for scope in SCOPES:
        model = Tiny()
        sgl = make(model, scope, process_group=dist.group.WORLD, direction="gradient")
        for step in range(3):
            losses, z = model.losses(torch.full((2, 3), float(rank + step)))
            if rank == step == 1:
                losses["b"] = spoilt(losses["b"], "inf")
            model.zero_grad()
            backward(sgl, losses, z)
        finite = all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
        found[scope] = finite, sgl.metrics()["skipped/b"], sgl.state_dict()["tensors"]["weights"].tolist()
    return found


def test_one_process_s_bad_loss_is_everybody_s() -> None:
    first, second = run_together(one_bad_share, 2)
    assert first == second
    for finite, skipped, weights in first.values():
        assert finite
        assert skipped == 1
        assert all(map(math.isfinite, weights))
