"""Message passing among instances in another order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from umda_fast.model import GMIP
from umda_fast.ops import graph as graphs


def clusters(n: int = 600, width: int = 16) -> Tensor:
    """Points of 20 clusters, shuffled: neighbours are of one cluster and lie far apart."""
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(20, width, generator=generator)
    return centres[torch.arange(n) % 20] + torch.randn(n, width, generator=generator)


@pytest.mark.parametrize("message", ["attention", "mean"])
@pytest.mark.parametrize("symmetrize", [False, True])
def test_the_order_in_which_instances_are_visited_changes_nothing(
    message: str, symmetrize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = GMIP(16, heads=2, k=6, message=message, symmetrize=symmetrize, dropout=0.0).double()  # type: ignore[arg-type]
    ptr = torch.tensor([0, 350, 350, 600])
    z = clusters().double()

    def run() -> tuple[Tensor, Tensor, list[Tensor]]:
        leaf = z.clone().requires_grad_()
        out = model(leaf, ptr)
        loss = (out.z * torch.linspace(0, 1, 16, dtype=z.dtype)).sum() + (out.weight * out.graph.rows()).sum() / 600
        return out.z.detach(), out.weight.detach(), list(torch.autograd.grad(loss, [leaf, *model.parameters()]))

    moved: list[bool] = []
    plain = graphs.NeighborGraph.reorder_where_it_pays

    def counted(graph: graphs.NeighborGraph, row_bytes: int) -> graphs.Reordering | None:
        found = plain(graph, row_bytes)
        moved.append(found is not None)
        return found

    monkeypatch.setattr(graphs.NeighborGraph, "reorder_where_it_pays", counted)
    as_they_came = run()
    monkeypatch.setattr(graphs, "_CACHE", 4096)  # bytes: now the instances do not fit
    reordered = run()
    assert moved == [False, True]
    torch.testing.assert_close(reordered[0], as_they_came[0])
    torch.testing.assert_close(reordered[1], as_they_came[1])
    for ours, expected in zip(reordered[2], as_they_came[2], strict=True):
        torch.testing.assert_close(ours, expected)
