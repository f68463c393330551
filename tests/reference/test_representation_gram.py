"""The Gram matrix on the representation against its definition: the gradients of the losses on z, in float64."""

import pytest
import torch
from torch import Tensor

from umda_fast.reference import representation_gram as module
from umda_fast.reference.bag_pool import bag_pool
from umda_fast.reference.representation_gram import representation_gram


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pooling(z: Tensor, ptr: Tensor, weights: list[Tensor]) -> dict[str, Tensor]:
    """Gated attention pooling as docs/model.md has it; every tensor that the operation asks for."""
    score, value_weight, gate_weight = weights
    value, gate = (z @ value_weight.T + 0.3).tanh(), (z @ gate_weight.T - 0.2).sigmoid()
    scores = (value * gate) @ score.T
    pooled, _, lse = bag_pool(z, scores, ptr)
    bag = torch.repeat_interleave(torch.arange(len(ptr) - 1), ptr.diff())
    return {"attention": (scores - lse[bag]).exp(), "pooled": pooled, "value": value, "gate": gate}


@pytest.mark.parametrize("chunk", [1, 4, 1024])
@pytest.mark.parametrize(
    ("sizes", "tasks", "hidden", "losses"), [([4, 0, 1, 7], 3, 5, 4), ([9], 1, 2, 1), ([0], 2, 3, 2), ([2, 2], 4, 1, 2)]
)
def test_equals_its_definition(
    monkeypatch: pytest.MonkeyPatch, chunk: int, sizes: list[int], tasks: int, hidden: int, losses: int
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    width, ptr = 6, torch.tensor([0, *sizes]).cumsum(0)
    z = normal(sum(sizes), width, seed=0).requires_grad_()
    weights = [normal(tasks, hidden, seed=1), normal(hidden, width, seed=2), normal(hidden, width, seed=3)]
    parts = pooling(z, ptr, weights)
    # Losses that mix the tasks and are not linear, as those behind branches and heads are.
    mixing = normal(losses, tasks, width, seed=4)
    values = [(parts["pooled"] * m).sum((1, 2)).sin().sum() for m in mixing]
    rows = torch.stack([torch.autograd.grad(v, z, retain_graph=True)[0].flatten() for v in values])
    d_pooled = [torch.autograd.grad(v, parts["pooled"], retain_graph=True)[0] for v in values]
    order = ("attention", "pooled", "value", "gate")
    attention, pooled, value, gate = (parts[name].detach() for name in order)
    gram = representation_gram(d_pooled, z.detach(), attention, ptr, pooled, value, gate, *weights)
    torch.testing.assert_close(gram, rows @ rows.T, rtol=1e-12, atol=1e-12 * float(rows.square().sum() + 1))


def test_both_paths_matter() -> None:
    """Neither the sum nor the scores alone give the definition: what is tested above sees both."""
    ptr = torch.tensor([0, 5])
    z = normal(5, 6, seed=0)
    weights = [3 * normal(2, 4, seed=1), normal(4, 6, seed=2), normal(4, 6, seed=3)]
    parts = pooling(z, ptr, weights)
    arguments = (z, parts["attention"], ptr, parts["pooled"], parts["value"], parts["gate"])
    d_pooled = [normal(1, 2, 6, seed=5)]
    whole = representation_gram(d_pooled, *arguments, *weights)
    without_scores = representation_gram(d_pooled, *arguments, torch.zeros_like(weights[0]), *weights[1:])
    assert abs(float(whole - without_scores)) > 0.05 * float(whole)
