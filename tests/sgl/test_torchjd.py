"""Agreement with torchjd, where it has the method, and its objects used as they are."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from tests.sgl.test_balancers import fresh, jacobian, losses_for
from umda_fast import sgl
from umda_fast.sgl import SelfGuided, TorchJDBalancer

aggregation = pytest.importorskip("torchjd.aggregation")
scalarization = pytest.importorskip("torchjd.scalarization")


def assert_same_update(rows: Tensor, mine: Tensor, theirs: Tensor) -> None:
    mine, theirs = mine @ rows, theirs @ rows
    assert float((mine - theirs).norm()) <= 1e-5 * float(theirs.norm())


@pytest.mark.parametrize("seed", range(6))
def test_closed_forms_agree(seed: int) -> None:
    rows = jacobian(2 + seed, seed)
    gram, count = rows @ rows.T, len(rows)
    assert_same_update(rows, fresh("imtl_g", rows), count * aggregation.IMTLGWeighting()(gram))
    assert_same_update(rows, fresh("aligned_mtl", rows), count * aggregation.AlignedMTLWeighting()(gram))
    theirs = aggregation.ConFIG()(rows)
    assert float((fresh("config", rows) @ rows - theirs).norm()) <= 1e-5 * float(theirs.norm())
    for alpha in (0.5, 1.0, 2.0):
        mine = sgl.FairGrad(alpha, normalize=False).weights(gram, losses_for(count))
        assert_same_update(rows, mine, aggregation.FairGradWeighting(alpha)(gram))


@pytest.mark.parametrize("seed", range(4))
def test_minimum_norm_agrees(seed: int) -> None:
    rows = jacobian(2, seed)
    theirs = 2 * aggregation.MGDAWeighting(epsilon=1e-12, max_iters=1000)(rows @ rows.T)
    assert_same_update(rows, fresh("mgda", rows), theirs)
    # For more tasks its Frank-Wolfe iterations converge slowly; the exact minimum is never longer.
    rows = jacobian(5, seed)
    theirs = 5 * aggregation.MGDAWeighting(epsilon=1e-6, max_iters=2000)(rows @ rows.T)
    assert float((fresh("mgda", rows) @ rows).norm()) <= float((theirs @ rows).norm()) * (1 + 1e-9)


class InOurOrder:
    """Stands in for torch.randperm: the order in which ours visits the other tasks, most opposed first."""

    def __init__(self, rows: Tensor, others_only: bool) -> None:
        unit = (rows / rows.norm(dim=1, keepdim=True)).numpy()
        cosines = unit @ unit.T
        self.orders = []
        for t in range(len(rows)):
            order = [int(s) for s in np.argsort(cosines[t], kind="stable")]
            if others_only:  # positions in the list of the other tasks
                order = [s - (s > t) for s in order if s != t]
            self.orders.append(torch.tensor(order))
        self.next = 0

    def __call__(self, count: int) -> Tensor:
        order = self.orders[self.next % len(self.orders)]
        assert len(order) == count
        self.next += 1
        return order


@pytest.mark.parametrize("seed", range(4))
def test_projections_in_the_same_order_agree(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = jacobian(5, seed, spread=1.5)
    monkeypatch.setattr(torch, "randperm", InOurOrder(rows, others_only=False))
    assert_same_update(rows, fresh("pcgrad", rows), aggregation.PCGradWeighting()(rows @ rows.T))
    monkeypatch.setattr(torch, "randperm", InOurOrder(rows, others_only=True))
    mine, theirs = sgl.GradVac(), aggregation.GradVacWeighting()
    for _ in range(3):
        weights = mine.weights(rows @ rows.T, losses_for(5))
        assert_same_update(rows, weights, theirs(rows @ rows.T))


@pytest.mark.parametrize("seed", range(6))
def test_dual_cone_projections_agree(seed: int) -> None:
    pytest.importorskip("quadprog")
    linalg = pytest.importorskip("torchjd.linalg")
    projector = linalg.QuadprogProjector(norm_eps=1e-30, reg_eps=1e-12)
    rows = jacobian(2 + seed, seed)
    gram, count = rows @ rows.T, len(rows)
    upgrad = aggregation.UPGradWeighting(projector=projector)
    dualproj = aggregation.DualProjWeighting(projector=projector)
    assert_same_update(rows, fresh("upgrad", rows), count * upgrad(gram))
    assert_same_update(rows, fresh("dualproj", rows), count * dualproj(gram))


def test_scalarizers_agree() -> None:
    losses = losses_for(3)
    gram = NO_GRAM
    uncertainty = TorchJDBalancer(scalarization.UW(3).double(), scale=2.0)
    torch.testing.assert_close(sgl.Uncertainty().weights(gram, losses), uncertainty.weights(gram, losses))
    smooth = TorchJDBalancer(scalarization.STCH(0.3)).weights(gram, losses)
    mine = sgl.STCH(0.9, relative=False).weights(gram, losses)  # torchjd puts weights 1 / T inside: mu T
    torch.testing.assert_close(mine, 3 * smooth / smooth.sum())
    ours, theirs = sgl.FAMO(), scalarization.FAMO(3).double()
    adapted = TorchJDBalancer(theirs, scale=3.0)
    for seed in range(3):
        before, after = losses_for(3, seed), losses_for(3, 5 + seed)
        torch.testing.assert_close(ours.weights(gram, before), adapted.weights(gram, before))
        ours.update(after)
        theirs.update(after)


def test_objects_of_torchjd_are_balancers_as_they_are() -> None:
    rows = jacobian(3, 1)
    gram, losses = rows @ rows.T, losses_for(3)
    weighting = aggregation.AlignedMTLWeighting()
    torch.testing.assert_close(TorchJDBalancer(weighting).weights(gram, losses), weighting(gram))
    aggregator = aggregation.AlignedMTL()
    torch.testing.assert_close(TorchJDBalancer(aggregator).weights(gram, losses) @ rows, aggregator(rows))
    assert TorchJDBalancer(aggregation.Mean()).weights(gram, losses).tolist() == pytest.approx([1 / 3] * 3)
    with pytest.raises(TypeError, match=r"^source: .*TrimmedMean"):
        TorchJDBalancer(aggregation.TrimmedMean(1))

    shared = Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    balanced = SelfGuided([shared], ["a", "b"], balancer=aggregation.MeanWeighting(), beta=0.0)
    balanced.backward({"a": shared.sum(), "b": 3 * shared.sum()})
    assert shared.grad.tolist() == [2, 2]
    plain = SelfGuided([shared], ["a", "b"], balancer=scalarization.STCH(1.0))
    assert not plain.statistics
    plain.backward({"a": shared.sum(), "b": 3 * shared.sum()})


NO_GRAM = torch.zeros(3, 3, dtype=torch.float64)


def tensor64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- scalarizers


def scalarizers() -> dict[str, object]:
    preference = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    return {
        "geometric_mean": scalarization.GeometricMean(),
        "imtl_l": scalarization.IMTLL(3).double(),
        "pbi": scalarization.PBI(2.0, preference),
        "cosmos": scalarization.COSMOS(1.0, preference),
        "mean": scalarization.Mean(),
        "sum": scalarization.Sum(),
        "constant": scalarization.Constant(preference),
        "stch": scalarization.STCH(0.5),
        "uw": scalarization.UW(3).double(),
        "dwa": scalarization.DWA(),
        "famo": scalarization.FAMO(3).double(),
        "random": scalarization.Random(),
    }


@pytest.mark.parametrize("name", scalarizers())
def test_every_scalarizer_of_torchjd_through_the_adapter(name: str) -> None:
    """Its update is that of `backward` on its scalar."""
    shared = Parameter(torch.tensor([1.0, -0.5], dtype=torch.float64))

    def losses() -> list[Tensor]:
        return [shared.square().sum(), (shared - 2).square().sum(), shared.exp().sum()]

    for_us, for_torch = scalarizers()[name], scalarizers()[name]
    torch.manual_seed(0)
    balanced = SelfGuided([shared], ["a", "b", "c"], balancer=for_us, variance_window=0)  # type: ignore[arg-type]
    balanced.backward(dict(zip("abc", losses(), strict=True)))
    ours, shared.grad = shared.grad, None
    torch.manual_seed(0)
    for_torch(torch.stack(losses())).backward()  # type: ignore[operator]
    torch.testing.assert_close(ours, shared.grad)
    for mine, theirs in zip(for_us.parameters(), for_torch.parameters(), strict=True):  # type: ignore[attr-defined]
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_ours_agree_with_torchjd() -> None:
    found = scalarizers()
    losses = tensor64(0.2, 3.0, 1.5)
    mean = TorchJDBalancer(found["geometric_mean"]).weights(NO_GRAM, losses)
    torch.testing.assert_close(sgl.GeometricMean().weights(NO_GRAM, losses), 3 * mean / mean.sum())
    theirs = TorchJDBalancer(found["pbi"]).weights(NO_GRAM, losses)
    p = tensor64(1, 2, 0.5)
    mine = sgl.PBI(2.0, preference=(1, 2, 0.5), relative=False).weights(NO_GRAM, losses)
    torch.testing.assert_close(mine, 3 / (p / p.norm()).sum() * theirs)
    learned = TorchJDBalancer(found["imtl_l"]).weights(NO_GRAM, losses)
    torch.testing.assert_close(sgl.IMTLL().weights(NO_GRAM, losses), learned)


def test_a_learned_scalarizer_learns_in_the_callers_optimiser() -> None:
    scalarizer = scalarizers()["imtl_l"]
    optimizer = torch.optim.SGD(scalarizer.parameters(), lr=0.1)  # type: ignore[attr-defined]
    adapter = TorchJDBalancer(scalarizer)
    mine = sgl.IMTLL(lr=0.1)
    for losses in (tensor64(0.2, 3.0, 1.5), tensor64(0.3, 2.0, 1.0), tensor64(0.3, 2.0, 1.0)):
        optimizer.zero_grad()
        torch.testing.assert_close(adapter.weights(NO_GRAM, losses), mine.weights(NO_GRAM, losses))
        optimizer.step()


def test_what_reads_more_than_inner_products_is_refused() -> None:
    for source in (aggregation.ExcessMTL(), aggregation.ExcessMTLWeighting(), aggregation.MoDoWeighting(0.1)):
        with pytest.raises(TypeError, match=r"^source: expected weights that depend on inner products"):
            TorchJDBalancer(source)
    # A weighting of the matrix that depends on them alone gets a root of the Gram matrix.
    rows = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert TorchJDBalancer(aggregation.SumWeighting()).weights(rows @ rows.T, tensor64(1, 1, 1)).tolist() == [1, 1, 1]
