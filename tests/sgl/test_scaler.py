"""`torch.amp.GradScaler` with self-guided learning: `.grad` is scaled, what is kept is not."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from tests.processes import run_together
from tests.sgl.oracle import TwoHeads
from umda_fast.sgl import SelfGuided

SCOPES = ("shared_parameters", "last_shared_layer", "representation")
TASKS = ["t0", "t1", "t2"]


def make(model: TwoHeads, scope: str, **options: Any) -> SelfGuided:
    layer = model.trunk[2].parameters() if scope == "last_shared_layer" else ()
    return SelfGuided(
        model.shared(),
        TASKS,
        task_parameters=model.own(),
        scope=scope,  # type: ignore[arg-type]
        last_shared_layer=layer,
        **{"variance_window": 3, **options},
    )


def inputs(count: int) -> Tensor:
    return torch.sin(torch.arange(count * 30.0)).view(count, 6, 5)


def train(scope: str, scales: list[float] | None, options: dict[str, Any]) -> tuple[list[Any], dict[str, float], Any]:
    """Steps with these scales, or without any; gradients (unscaled), weights and Gram matrices, figures, state."""
    model = TwoHeads(dtype=torch.float32)
    sgl = make(model, scope, **options)
    rows = slice(None)
    if "process_group" in options:
        rows = slice(dist.get_rank() * 3, dist.get_rank() * 3 + 3)
    found = []
    for step, x in enumerate(inputs(4)):
        scaler = None if scales is None else GradScaler("cpu", init_scale=scales[step])
        losses, penalty, hidden = model.losses(x[rows])
        if step == 2:
            del losses["t1"]
        result = sgl.backward(
            losses, penalty=penalty, representation=hidden if scope == "representation" else None, scaler=scaler
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if scaler is not None:
            scaler.unscale_(optimizer)
        gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        found.append([*gradients, result.weights, result.gram])
        optimizer.step() if scaler is None else scaler.step(optimizer)
        model.zero_grad()
    return found, sgl.metrics(), sgl.state_dict()["tensors"]


def assert_same(one: Any, other: Any) -> None:
    for mine, theirs in zip(one[0], other[0], strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)
    assert one[1] == pytest.approx(other[1], rel=1e-3, nan_ok=True)
    for name, value in one[2].items():
        torch.testing.assert_close(value, other[2][name], rtol=2e-5, atol=1e-6)


OPTIONS: list[dict[str, Any]] = [{}, {"direction": "gradient"}, {"balancer": "uncertainty"}, {"every": 2}]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_scale_that_changes_from_step_to_step_changes_nothing(scope: str, options: dict[str, Any]) -> None:
    if scope == "shared_parameters" and not options.keys() & {"balancer", "every"}:
        options = {**options, "control": True}
    assert_same(train(scope, [2.0**4, 2.0**16, 2.0**10, 3.0], options), train(scope, None, options))


def shares() -> list[Any]:
    options = {"process_group": dist.group.WORLD}
    return [(train(scope, [2.0**4, 2.0**16, 2.0**10, 3.0], options), train(scope, None, options)) for scope in SCOPES]


def test_with_two_processes_too() -> None:
    for found in run_together(shares, 2):
        for scaled, plain in found:
            assert_same(scaled, plain)


@pytest.mark.parametrize("balancer", ["sgl", "pcgrad", "gradnorm", "uncertainty"])
@pytest.mark.parametrize("direction", ["gradient", "average"])
def test_float16_autocast_learns(balancer: str, direction: str) -> None:
    """The scale grows until gradients overflow, again and again; only those steps are left out."""
    torch.manual_seed(0)
    trunk, heads = nn.Linear(4, 16), nn.ModuleDict({task: nn.Linear(16, 1) for task in TASKS[:2]})
    sgl = SelfGuided(trunk.parameters(), TASKS[:2], balancer=balancer, direction=direction)  # type: ignore[arg-type]
    parameters = [*trunk.parameters(), *heads.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    scaler = GradScaler("cpu", init_scale=2.0**15, growth_interval=3)
    x = torch.randn(64, 4)
    targets = {"t0": x[:, :1], "t1": 3 * x[:, 1:2] - x[:, 2:3]}
    history, skipped = [], 0
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            z = trunk(x).tanh()
            assert z.dtype == torch.float16
            losses = {task: (heads[task](z).float() - targets[task]).square().mean() for task in targets}
        history.append([float(loss.detach()) for loss in losses.values()])
        before = scaler.get_scale()
        sgl.backward(losses, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before
    assert 1 <= skipped <= 20
    assert history[-1][0] < 0.5 * history[0][0]
    assert history[-1][1] < 0.5 * history[0][1]
    figures = sgl.metrics()
    assert all(math.isfinite(figures[f"weight/{task}"]) for task in targets)
    if balancer != "uncertainty":
        assert max(figures["skipped/t0"], figures["skipped/t1"]) >= 1
    assert abs(figures["weight/t0"] - figures["weight/t1"]) > 0 or balancer == "pcgrad"


def test_a_scaler_that_is_off_is_none() -> None:
    model = TwoHeads()
    sgl = make(model, "shared_parameters", direction="gradient")
    losses, _, _ = model.losses(inputs(1)[0].double())
    sgl.backward(losses, scaler=GradScaler("cpu", enabled=False))
    found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    other = make(model, "shared_parameters", direction="gradient")
    losses, _, _ = model.losses(inputs(1)[0].double())
    other.backward(losses)
    for mine, parameter in zip(found, model.parameters(), strict=True):
        assert (mine is None) == (parameter.grad is None)
        assert mine is None or torch.equal(mine, parameter.grad)


def test_what_cannot_be_scaled_is_named() -> None:
    model = TwoHeads(dtype=torch.float32)
    losses, _, _ = model.losses(inputs(1)[0])
    sgl = make(model, "shared_parameters")
    with pytest.raises(TypeError, match=r"^scaler: expected a torch\.amp\.GradScaler, got float$"):
        sgl.backward(losses, scaler=2.0)  # type: ignore[arg-type]
    narrow = {**losses, "t0": losses["t0"].half()}
    with pytest.raises(ValueError, match=r"^losses\['t0'\]: .*float16.*backward\(\.\.\., scaler=\)"):
        sgl.backward(narrow, scaler=GradScaler("cpu"))
    with pytest.raises(ValueError, match="expected no float16 parameters"):
        SelfGuided([nn.Parameter(torch.ones(2, dtype=torch.float16))], ["a"])
    assert all(p.grad is None for p in model.parameters())
