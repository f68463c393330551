"""Every penalty against its formula, written out in numpy loops."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from tests.model.conftest import make_batch, make_config
from umda_fast import UMDA, TaskSpec
from umda_fast.model import (
    ATSB,
    GMIP,
    ViewConsistency,
    cohesion_penalty,
    concentration_penalty,
    dispersion_penalty,
    divergence_penalty,
    diversity_penalty,
    penalty_loss,
)

N, V, D, H = 11, 3, 8, 2


@pytest.fixture
def y() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(N, V, D, dtype=torch.float64)


@pytest.fixture
def mask() -> torch.Tensor:
    torch.manual_seed(1)
    mask = torch.rand(N, V) < 0.6
    mask[:, 0] |= ~mask.any(1)
    return mask


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def close(got: torch.Tensor, wanted: float) -> None:
    assert got.dtype == torch.float64
    assert got.shape == ()
    np.testing.assert_allclose(float(got), wanted, rtol=1e-12)


def test_concentration(mask: torch.Tensor) -> None:
    entropy = torch.rand(2, N, V, H, dtype=torch.float64)
    terms = [
        1 - float(entropy[layer, i, u, h]) / np.log(int(mask[i].sum()))
        for layer in range(2)
        for i in range(N)
        for u in range(V)
        for h in range(H)
        if mask[i, u] and mask[i].sum() > 1
    ]
    close(concentration_penalty(entropy.masked_fill(~mask[..., None], 0), mask), np.mean(terms))
    close(concentration_penalty(entropy[0]), np.mean(1 - entropy[0].numpy() / np.log(V)))
    close(concentration_penalty(entropy[:, :, :1]), 0.0)


def test_consistency(y: torch.Tensor, mask: torch.Tensor) -> None:
    module = ViewConsistency(D).double()
    e = (y @ module.projection.weight.T).detach().numpy()
    pairs = [(i, u, w) for i in range(N) for u, w in combinations(range(V), 2)]
    present = [(i, u, w) for i, u, w in pairs if mask[i, u] and mask[i, w]]
    close(module(y).detach(), np.mean([1 - cosine(e[i, u], e[i, w]) for i, u, w in pairs]))
    got = module(y.masked_fill(~mask[..., None], 0), mask).detach()
    close(got, np.mean([1 - cosine(e[i, u], e[i, w]) for i, u, w in present]))
    close(module(y[:, :1]).detach(), 0.0)


@pytest.mark.parametrize("delta", [1.0, 0.4])
def test_dispersion(y: torch.Tensor, mask: torch.Tensor, delta: float) -> None:
    mask = mask.clone()
    mask[:, 2] = False
    mask[4, 2] = True  # one instance: a mean, but no variance
    x, there = 0.5 * y.numpy(), mask.numpy()
    columns = [x[there[:, u], u] for u in range(V)]
    spread = [np.maximum(0, 1 - np.sqrt(c.var(0) + 1e-4)) for c in columns if len(c) > 1]
    apart = [max(0.0, delta - np.linalg.norm(a.mean(0) - b.mean(0)) / np.sqrt(D)) for a, b in combinations(columns, 2)]
    assert sum(value > 0 for value in apart) > 0
    got = dispersion_penalty((0.5 * y).masked_fill(~mask[..., None], 0), mask, delta)
    close(got, np.mean(spread) + np.mean(apart))


def test_dispersion_leaves_out_a_view_that_no_instance_has(y: torch.Tensor) -> None:
    mask = torch.ones(N, V, dtype=torch.bool)
    mask[:, 1] = False
    got = dispersion_penalty(y.masked_fill(~mask[..., None], 0), mask)
    close(got, float(dispersion_penalty(y[:, [0, 2]])))


def test_smoothness_of_the_model() -> None:
    torch.manual_seed(0)
    batch = make_batch().double()
    model = UMDA(make_config()).double().eval()
    out = model(**batch.inputs())
    x = model.encoders(batch.views, batch.mask)
    z, _ = model.fusion(model.hcva(x, batch.mask).y, batch.mask)
    r = model.gmip.key(z).detach().numpy()
    final = out.representation.detach().numpy()
    ptr = batch.ptr.tolist()
    weights, energies = [], []
    for start, end in pairwise(ptr):
        for i in range(start, end):
            others = [j for j in range(start, end) if j != i]
            others.sort(key=lambda j: -cosine(r[i], r[j]))
            for j in others[:3]:
                weights.append(np.exp((cosine(r[i], r[j]) - 1) / 0.5))
                energies.append(weights[-1] * ((final[i] - final[j]) ** 2).sum())
    close(out.penalties["smoothness"].detach(), np.sum(energies) / (final.shape[1] * np.sum(weights)))


def test_diversity() -> None:
    torch.manual_seed(0)
    z = 0.4 * torch.randn(13, D, dtype=torch.float64) + 3.0
    ptr = [0, 4, 4, 5, 13]
    bags = [z[a:b].numpy() for a, b in pairwise(ptr) if b - a > 1]
    wanted = np.mean([np.maximum(0, 0.5 - np.sqrt(bag.var(0) + 1e-4)).mean() for bag in bags])
    close(diversity_penalty(z, torch.tensor(ptr), 0.5), wanted)
    close(diversity_penalty(z[:2], torch.tensor([0, 1, 1, 2])), 0.0)
    assert torch.autograd.gradcheck(lambda x: diversity_penalty(x, torch.tensor(ptr)), z.requires_grad_())


def test_divergence() -> None:
    torch.manual_seed(0)
    read = torch.randn(3, D, 2, dtype=torch.float64)
    r = read.numpy() / np.linalg.norm(read.numpy(), axis=1, keepdims=True)
    wanted = np.mean([np.linalg.norm(r[s].T @ r[t]) ** 2 / 2 for s, t in combinations(range(3), 2)])
    close(divergence_penalty(read), wanted)
    close(divergence_penalty(read[:1]), 0.0)


def test_cohesion() -> None:
    torch.manual_seed(0)
    branches = torch.randn(4, 3, D, dtype=torch.float64)
    gamma = torch.rand(3, 3, dtype=torch.float64)
    pairs = [(t, s) for t in range(3) for s in range(3) if s != t]

    def of(bags: list[int]) -> float:
        total = sum(float(gamma[t, s]) for t, s in pairs)
        b = branches.numpy()
        return float(
            np.mean([sum(float(gamma[t, s]) * (1 - cosine(b[i, t], b[i, s])) for t, s in pairs) / total for i in bags])
        )

    close(cohesion_penalty(branches, gamma), of([0, 1, 2, 3]))
    close(cohesion_penalty(branches, gamma, torch.tensor([True, False, True, True])), of([0, 2, 3]))
    close(cohesion_penalty(branches, gamma, torch.zeros(4, dtype=torch.bool)), 0.0)
    close(cohesion_penalty(branches[:, :1], gamma[:1, :1]), 0.0)


def test_influence() -> None:
    torch.manual_seed(0)
    hierarchy = ((0.0, 2.0, 4.0), (2.0, 0.0, 4.0), (4.0, 4.0, 0.0))
    block = ATSB(D, 3, embedding=5, kappa=0.5, kappa_g=2.0, hierarchy=hierarchy).double()
    cosines = torch.rand(3, 3, dtype=torch.float64, requires_grad=True)
    c = block.task_embedding.detach().numpy()
    logits = c @ c.T / np.sqrt(5) - 0.5 * np.array(hierarchy) + 2.0 * cosines.detach().numpy()
    wanted = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    gamma = block.influence(cosines)
    np.testing.assert_allclose(gamma.detach().numpy(), wanted, rtol=1e-12)
    gamma[0, 1].backward()
    assert cosines.grad is None
    # What training used last is what evaluation uses.
    np.testing.assert_array_equal(block.eval().influence().detach().numpy(), gamma.detach().numpy())
    block.influence(torch.zeros(3, 3))
    np.testing.assert_array_equal(block.influence().detach().numpy(), gamma.detach().numpy())


def test_commuting_identity() -> None:
    """Branching every instance and then pooling is pooling and then branching."""
    torch.manual_seed(0)
    n, tasks = 9, 3
    block = ATSB(D, tasks, rank=2).double()
    gamma = block.influence()
    z = torch.randn(n, D, dtype=torch.float64)
    a = torch.rand(n, tasks, dtype=torch.float64).softmax(0)
    pooled = torch.einsum("nt,nd->td", a, z)[None]
    # P_s acts on what task s pooled, so instances carry the weights of every task.
    branched = block.project((a * n)[:, :, None] * z[:, None, :], gamma)
    torch.testing.assert_close(branched.mean(0, keepdim=True), block.project(pooled, gamma), rtol=1e-12, atol=1e-14)


def test_gmip_without_neighbours_and_mean_messages() -> None:
    torch.manual_seed(0)
    z = torch.randn(6, D, dtype=torch.float64)
    ptr = torch.tensor([0, 1, 6])
    block = GMIP(D, heads=2, k=2, graph_width=4, layers=1, message="mean").double().eval()
    out = block(z, ptr)
    layer = block.layers[0]
    v = layer.input(z)
    weights = torch.zeros(6, 6, dtype=torch.float64)
    for i in range(6):
        for j, w in zip(out.graph.neighbors[i].tolist(), out.weight[i].tolist(), strict=True):
            if j >= 0:
                weights[i, j] = w
    weights = weights + torch.eye(6, dtype=torch.float64)
    message = weights / weights.sum(1, keepdim=True) @ v
    torch.testing.assert_close(out.z, layer.norm(z + layer.output(message)), rtol=1e-12, atol=1e-13)
    assert out.graph.neighbors[0].tolist() == [-1, -1]


def test_zero_when_nothing_exists() -> None:
    config = make_config(tasks=(TaskSpec("one", "binary"),))
    batch = make_batch((1, 0))
    batch.mask = torch.tensor([[False, True, False]])
    out = UMDA(config).double()(**batch.double().inputs())
    values = {name: float(value.detach()) for name, value in out.penalties.items()}
    assert values == dict.fromkeys(values, 0.0)
    assert all(value.dtype == torch.float64 and value.shape == () for value in out.penalties.values())


def test_penalty_loss() -> None:
    penalties = {"entropy": torch.tensor(2.0), "cohesion": torch.tensor(3.0)}
    assert float(penalty_loss(penalties, {"entropy": 0.5, "cohesion": 0.1})) == pytest.approx(1.3)
    assert float(penalty_loss(penalties, {"cohesion": 1.0})) == 3.0
    with pytest.raises(ValueError, match="entropy, cohesion, got 'entrpy'"):
        penalty_loss(penalties, {"entrpy": 1.0})
