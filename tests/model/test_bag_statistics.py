"""Mean and maximum of a bag beside the attention pooling."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.model.conftest import make_batch, make_config, total_loss
from umda_fast import UMDA
from umda_fast.model import task_losses
from umda_fast.model.chunked import forward_chunked
from umda_fast.model.gmip import bag_maximum


def test_the_maximum_of_every_bag() -> None:
    """Empty bags, bags of one, infinities, and the gradient to the first of equals."""
    z = torch.tensor([[1.0, 5.0], [3.0, 5.0], [3.0, -torch.inf], [-2.0, -7.0]], dtype=torch.float64, requires_grad=True)
    top = bag_maximum(z, torch.tensor([0, 0, 3, 4, 4]))
    assert top.value.tolist() == [[0.0, 0.0], [3.0, 5.0], [-2.0, -7.0], [0.0, 0.0]]
    assert top.found.tolist() == [[False] * 2, [True] * 2, [True] * 2, [False] * 2]
    assert top.instance[1:3].tolist() == [[1, 0], [3, 3]]
    (gradient,) = torch.autograd.grad((top.value * torch.tensor([1.0, 10.0])).sum(), z)
    assert gradient.tolist() == [[0.0, 10.0], [1.0, 0.0], [0.0, 0.0], [1.0, 10.0]]


def test_what_is_no_number_is_not_hidden() -> None:
    z = torch.tensor([[1.0, torch.nan], [torch.nan, 2.0], [0.0, 3.0]])
    value = bag_maximum(z, torch.tensor([0, 2, 3])).value
    assert value[0].isnan().all()
    assert value[1].tolist() == [0.0, 3.0]


def test_branches_read_them() -> None:
    torch.manual_seed(0)
    model, batch = UMDA(make_config(bag_statistics=True)).double().eval(), make_batch().double()
    out = model(**batch.inputs())
    z = out.representation
    own = [z[int(a) : int(b)] for a, b in zip(batch.ptr[:-1], batch.ptr[1:], strict=True)]
    rows = [torch.cat([x.mean(0), x.max(0).values]) if len(x) else z.new_zeros(32) for x in own]
    pooled = torch.stack([out.attention[int(a) : int(b)].T @ z[int(a) : int(b)] for a, b in zip(
        batch.ptr[:-1], batch.ptr[1:], strict=True
    )])  # fmt: skip
    atsb = model.atsb
    read = atsb.project(pooled, out.influence) + atsb.shared_statistics(torch.stack(rows))[:, None]
    torch.testing.assert_close(out.branches, F.gelu(atsb.norm(read)), rtol=1e-10, atol=1e-12)


def test_they_are_shared_by_the_tasks() -> None:
    torch.manual_seed(0)
    model, batch = UMDA(make_config(bag_statistics=True)).double(), make_batch().double()
    weight = model.atsb.shared_statistics.weight
    assert any(p is weight for p in model.shared_parameters())
    assert any(p is weight for p in model.last_shared_layer())
    total_loss(model, batch).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_bags_cut_into_pieces_and_no_instances() -> None:
    torch.manual_seed(0)
    model, batch = UMDA(make_config(bag_statistics=True)).double().eval(), make_batch((9, 0, 1, 5)).double()
    with torch.no_grad():
        whole = model(**batch.inputs())
        served = forward_chunked(model, **batch.inputs(), chunk=4)
        nothing = model(**make_batch((0, 0)).double().inputs())
    for name, logits in whole.logits.items():
        torch.testing.assert_close(served.logits[name], logits, rtol=1e-9, atol=1e-11)
        assert nothing.logits[name].isfinite().all()


def test_a_batch_of_empty_bags_alone_has_gradients() -> None:
    """Of zeros on the instances, of which there are none: the biases of the heads still learn."""
    torch.manual_seed(0)
    model, batch = UMDA(make_config(bag_statistics=True)).double(), make_batch((0, 0)).double()
    out = model(**batch.inputs())
    losses = list(task_losses(model.config.tasks, out.logits, batch.labels).values())
    gram = out.instances.gradient_gram(losses)
    assert gram.shape == (len(losses), len(losses))
    assert (gram == 0).all()
    sum(losses).backward()
    assert all(head.bias.grad.any() for head in model.heads)
