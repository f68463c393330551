"""The Gram matrix of task gradients on the instances, in one pass, against T backward passes down to them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.model.conftest import TASKS, Batch, make_batch, make_config
from umda_fast import UMDA
from umda_fast.model import task_losses
from umda_fast.model.config import BEFORE_2
from umda_fast.sgl import SelfGuided


def rows(losses: list[Tensor], z: Tensor) -> Tensor:
    """Gradients of the losses on z [S, N * D]."""
    return torch.stack([torch.autograd.grad(loss, z, retain_graph=True)[0].flatten() for loss in losses])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"branching": "mmoe"},
        {"private": False},
        {"graph": False, "pool_hidden": 3},
        {"bag_statistics": False},
        {"tasks": TASKS[3:], "graph": False},
        BEFORE_2,
    ],
)
def test_equals_backward_passes_down_to_the_instances(options: dict[str, object], batch: Batch) -> None:
    torch.manual_seed(0)
    model = UMDA(make_config(**options)).double()
    batch = batch.double()
    out = model(**batch.inputs())
    losses = list(task_losses(model.config.tasks, out.logits, batch.labels).values())
    expected = rows(losses, out.representation)
    found = out.instances.gradient_gram(losses)
    torch.testing.assert_close(found, expected @ expected.T, rtol=1e-10, atol=1e-12 * float(expected.square().sum()))
    assert not found.requires_grad


def test_a_loss_that_reaches_no_instance_has_a_zero_row(model: UMDA, batch: Batch) -> None:
    out = model(**batch.inputs())
    losses = [out.logits["is it"].sum(), model.heads[0].bias.sum()]
    gram = out.instances.gradient_gram(losses)
    assert gram[0, 0] > 0
    assert (gram[1] == 0).all()
    assert (gram[:, 1] == 0).all()


def test_losses_that_cannot_reach_the_instances_are_an_error(model: UMDA, batch: Batch) -> None:
    out, other = model(**batch.inputs()), model(**batch.inputs())
    with pytest.raises(ValueError, match="losses: expected losses computed from `pooled` of this call"):
        out.instances.gradient_gram([x.sum() for x in other.logits.values()])


def test_autocast(model: UMDA, batch: Batch) -> None:
    """bfloat16: as far from float64 as the backward passes are, times three."""
    exact_model = UMDA(model.config).double().eval()
    exact_model.load_state_dict(model.state_dict())

    def gram(model: UMDA, batch: Batch, fused: bool) -> Tensor:
        out = model(**batch.inputs())
        losses = [x.float().square().mean() if fused or x.dtype != torch.float64 else x.square().mean()
                  for x in out.logits.values()]  # fmt: skip
        if fused:
            return out.instances.gradient_gram(losses).double()
        gradients = rows(losses, out.representation).double()
        return gradients @ gradients.T

    exact = gram(exact_model, batch.double(), False)
    with torch.autocast("cpu", torch.bfloat16):
        fused, passes = gram(model, batch, True), gram(model, batch, False)
    allowed = 3 * float((passes - exact).abs().max()) + 4 * torch.finfo(torch.bfloat16).eps * float(exact.abs().max())
    assert float((fused - exact).abs().max()) <= allowed


def test_self_guided_learning_takes_either() -> None:
    """Four steps, some without a task: the same weights, Gram matrices and gradients."""
    steps = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = UMDA(make_config(dropout=0.0)).double()
        names = [task.name for task in model.config.tasks]
        sgl = SelfGuided(
            model.shared_parameters(), names, task_parameters=model.task_parameters(), scope="representation"
        )
        seen = []
        for step in range(4):
            batch = make_batch((5, 0, 1, 7, 4), seed=step).double()
            out = model(**batch.inputs())
            losses = task_losses(model.config.tasks, out.logits, batch.labels)
            if step % 2:
                del losses[names[step]]
            model.zero_grad()
            result = sgl.backward(losses, representation=out.instances if fused else out.representation)
            seen += [result.gram, result.weights, *(p.grad for p in model.parameters() if p.grad is not None)]
        steps.append(seen)
    for one, other in zip(*steps, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def test_nothing_of_the_size_of_all_gradients_is_kept(model: UMDA) -> None:
    """No tensor larger than z itself is made by PyTorch operations around the kernel."""
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(result):
                if isinstance(x, Tensor):
                    largest = max(largest, x.numel())
            return result

    batch = make_batch((300, 500))
    out = model(**batch.inputs())
    losses = [x.sum() for x in out.logits.values()]
    with Sizes():
        out.instances.gradient_gram(losses)
    assert 0 < largest <= 800 * 16


def test_a_constant_is_refused(model: UMDA, batch: Batch) -> None:
    with torch.no_grad():
        out = model(**batch.inputs())
    assert not out.instances.requires_grad
    sgl = SelfGuided(model.shared_parameters(), ["type"], scope="representation")
    with pytest.raises(ValueError, match="representation: expected a Tensor that requires grad, got a constant"):
        sgl.backward({"type": model.heads[1].bias.sum()}, representation=out.instances)
