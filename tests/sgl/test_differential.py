"""`SelfGuided` with equal weights and this step's gradients against `sum(losses).backward()`, on drawn models.

The same `.grad`, its layout, strides and hook calls; float64, so that what is left of an error is rounding.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.processes import run_together
from tests.sgl.models import AMONG_ROWS, BLOCKS, WIDTH, Drawn
from umda_fast.sgl import SelfGuided, linear

SCOPES = ("shared_parameters", "last_shared_layer", "representation")
SEEDS, BLOCK = 360, 30


def guided(model: Drawn, scope: str, seed: int, **options: Any) -> SelfGuided:
    layer = [p for block in model.blocks[-2:] for p in block.parameters()]
    listed = seed % 2 == 0 or "process_group" in options
    return SelfGuided(
        model.shared(),  # type: ignore[arg-type]
        model.tasks,
        task_parameters=model.heads.parameters() if listed else (),
        balancer="equal",
        statistics=True,
        direction="gradient",
        scope=scope,  # type: ignore[arg-type]
        last_shared_layer=layer if scope == "last_shared_layer" else (),
        variance_window=2,
        **options,
    )


def inputs(model: Drawn, step: int, rows: slice) -> Tensor:
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float64)[rows].clone()
    return x.requires_grad_(model.watched)


def dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.layout != torch.strided else tensor


def assert_close(mine: Tensor, theirs: Tensor, model: Drawn, name: str) -> None:
    """Within rounding of the coarsest dtype on the way."""
    atol = max(8 * model.precision * float(dense(theirs).detach().abs().sum()), 1e-11)
    torch.testing.assert_close(dense(mine), dense(theirs), rtol=1e-9, atol=atol, msg=lambda text: f"{name}: {text}")


def summed(calls: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """By name, over the tasks."""
    total: dict[str, Tensor] = {}
    for name, gradient in calls:
        total[name] = total[name] + gradient if name in total else gradient
    return total


def compare(seed: int, scope: str) -> None:
    mine, theirs = Drawn(seed), Drawn(seed)
    sgl = guided(mine, scope, seed)
    for step in range(4):
        if step == 2:  # frozen midway
            for model in (mine, theirs):
                if model.later is not None:
                    model.later.requires_grad_(False)
        if step != 1:  # accumulated once
            for model in (mine, theirs):
                model.zero_grad(set_to_none=step != 3)
                model.prompt.grad = None
        x, y = (inputs(model, step, slice(None)) for model in (mine, theirs))
        for model in (mine, theirs):
            model.calls.leaves.clear()
            model.calls.between.clear()
        losses, penalty = theirs(y)
        total = sum(losses.values()) + (0 if penalty is None else penalty)
        total.backward()  # type: ignore[union-attr]
        losses, penalty, z = through(mine, x)
        sgl.backward(losses, penalty=penalty, representation=z if scope == "representation" else None)
        for (name, p), q in zip(mine.leaves(x).items(), theirs.leaves(y).values(), strict=True):
            assert (p.grad is None) == (q.grad is None), (name, step)
            if p.grad is not None and q.grad is not None:
                assert_close(p.grad, q.grad, mine, f"{name}, step {step}")
                assert p.grad.layout == q.grad.layout, name
                assert p.grad.dtype == q.grad.dtype
                if p.grad.layout == torch.strided:
                    assert p.grad.stride() == q.grad.stride(), (name, step)
        found, expected = (sorted(model.calls.leaves, key=lambda call: call[0]) for model in (mine, theirs))
        assert [name for name, _ in found] == [name for name, _ in expected]
        for (name, a), (_, b) in zip(found, expected, strict=True):
            assert_close(a, b, mine, name)
        if scope == "shared_parameters":
            # Between leaves and losses hooks see the gradient of each task, and the penalty's, by itself.
            for name, b in summed(theirs.calls.between).items():
                assert_close(summed(mine.calls.between)[name], b, mine, name)
            if theirs.retained is not None:
                assert_close(mine.retained.grad, theirs.retained.grad, mine, "retained")  # type: ignore[union-attr, arg-type]


def through(model: Drawn, x: Tensor) -> tuple[dict[str, Tensor], Tensor | None, Tensor]:
    """A forward pass, and a tensor on the way."""
    found: list[Tensor] = []
    handle = model.blocks[-1].register_forward_hook(lambda m, i, out: found.append(out))
    losses, penalty = model(x)
    handle.remove()
    return losses, penalty, found[0]


@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_gradients_are_those_of_plain_pytorch(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    for seed in range(first, first + BLOCK):
        monkeypatch.setattr(linear, "LEAST", 0 if seed % 4 < 2 else 1 << 14)
        compare(seed, SCOPES[0] if seed % 3 else SCOPES[1 + seed % 2])


def shared_out(seeds: list[int]) -> dict[Any, Any]:
    """Gradients of two processes' halves of a batch, by seed, scope and name."""
    torch.set_num_threads(1)
    found: dict[Any, Any] = {}
    for seed in seeds:
        for scope in SCOPES:
            model = Drawn(seed)
            sgl = guided(model, scope, seed, process_group=dist.group.WORLD)
            for step in range(2):
                model.zero_grad()
                x = inputs(model, step, slice(0, 2) if dist.get_rank() == 0 else slice(2, 5))
                losses, penalty, z = through(model, x)
                weight = len(x) / 5
                sgl.backward(
                    losses,
                    counts=dict.fromkeys(losses, float(len(x))),
                    penalty=None if penalty is None else penalty * weight,
                    representation=z if scope == "representation" else None,
                )
            for name, p in model.named_parameters():
                strides = None if p.grad is None else p.grad.stride()
                found[seed, scope, name] = None if p.grad is None else p.grad.clone(), strides, p.stride()
    return found


def test_two_processes_make_the_gradients_of_one() -> None:
    seeds = [
        seed
        for seed in range(120)
        if not AMONG_ROWS & set(Drawn(seed).names)
        and not any(p._post_accumulate_grad_hooks or p._backward_hooks for p in Drawn(seed).parameters())
    ][:14]
    first, second = run_together(shared_out, 2, seeds)
    drawn = {name for seed in seeds for name in Drawn(seed).names}
    assert drawn >= BLOCKS.keys() - AMONG_ROWS - {"embedding", "float32"}
    for seed in seeds:
        model = Drawn(seed)
        for step in range(2):
            model.zero_grad()
            losses, penalty = model(inputs(model, step, slice(None)))
            (sum(losses.values()) + (0 if penalty is None else penalty)).backward()  # type: ignore[union-attr]
        for scope in SCOPES:
            for name, p in model.named_parameters():
                (mine, strides, own), (other, *_) = first[seed, scope, name], second[seed, scope, name]
                assert (mine is None) == (other is None) == (p.grad is None), (seed, scope, name)
                if mine is not None and p.grad is not None:
                    assert torch.equal(mine, other)
                    assert_close(mine, p.grad, model, f"{seed} {scope} {name}")
                    assert strides == (own if p.grad.layout != torch.strided else p.grad.stride()), (scope, name)
