"""Figures from the Gram matrix by hand, and the running variance against the definition."""

import math

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from tests.sgl.oracle import TwoHeads
from umda_fast.sgl import SelfGuided
from umda_fast.sgl.buffers import FlatLayout
from umda_fast.sgl.telemetry import cosine_matrix, gram_metrics
from umda_fast.sgl.variance import DirectionVariance


def test_figures_of_two_gradients_by_hand() -> None:
    g = torch.tensor([[3.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    gram = g @ g.T
    found = gram_metrics(gram, torch.tensor([1.0, 2.0]))
    cosine = -3 / (3 * math.sqrt(2))
    assert found["conflict_share"] == 1
    assert found["norm_ratio"] == pytest.approx(3 / math.sqrt(2))
    assert found["mean_cosine"] == pytest.approx(cosine)
    assert found["magnitude_similarity"] == pytest.approx(2 * 3 * math.sqrt(2) / 11)
    assert found["curvature_bound"] == pytest.approx((1 - cosine**2) * 17 / 5)
    eigenvalues = np.linalg.eigvalsh(gram.numpy())
    assert found["condition_number"] == pytest.approx(eigenvalues[1] / eigenvalues[0])
    update, mean = np.array([1.0, 2.0]), np.array([2.0, 1.0])
    assert found["cosine_to_mean"] == pytest.approx(
        update @ mean / np.linalg.norm(update) / np.linalg.norm(mean)
    )


def test_figures_without_a_pair_or_without_a_gradient() -> None:
    one = gram_metrics(torch.tensor([[4.0]]), torch.ones(1))
    assert (one["conflict_share"], one["norm_ratio"], one["condition_number"]) == (0, 1, 1)
    assert math.isnan(one["magnitude_similarity"])
    none = gram_metrics(torch.zeros(2, 2), torch.ones(2))
    assert none["conflict_share"] == 0
    assert all(math.isnan(none[name]) for name in ("norm_ratio", "condition_number", "cosine_to_mean"))


def test_cosines_of_norms_beyond_the_range_of_a_product() -> None:
    gram = torch.tensor([[1e30, 0.5e15, 0.0], [0.5e15, 1.0, 0.0], [0.0, 0.0, 0.0]])
    norms, cosines = cosine_matrix(gram)
    torch.testing.assert_close(norms, torch.tensor([1e15, 1.0, 0.0]))
    torch.testing.assert_close(cosines, torch.tensor([[1.0, 0.5, 0], [0.5, 1, 0], [0, 0, 1]]))


def layout(count: int) -> FlatLayout:
    return FlatLayout([Parameter(torch.zeros(count))])


def expected(rows: np.ndarray) -> tuple[float, float]:
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return tuple(float(x.var(0, ddof=1).sum() / (x.mean(0) ** 2).sum()) for x in (rows, unit))  # type: ignore[return-value]


def test_variance_follows_its_definition_over_windows() -> None:
    rows = np.random.default_rng(0).normal(0.3, 1, (11, 40)) * np.linspace(1, 9, 11)[:, None]
    running = DirectionVariance(layout(40), window=4)
    assert all(math.isnan(x) for x in running.figures())
    for number, row in enumerate(rows, 1):
        running.update(torch.tensor(row, dtype=torch.float32))
        last = 4 * (number // 4)
        window = rows[last - 4 : last] if last else rows[:number]
        if number >= 2:
            np.testing.assert_allclose(running.figures(), expected(window), rtol=1e-5)


def test_variance_of_a_constant_direction_is_zero_and_scale_is_matched() -> None:
    running = DirectionVariance(layout(1000), window=8)
    direction = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for step in range(8):
        running.update(direction * (1 + step))
    variance, matched = running.figures()
    assert variance == pytest.approx(np.arange(1, 9).var(ddof=1) / 4.5**2, rel=1e-5)
    assert matched < 1e-5


@pytest.mark.parametrize("scope", ["shared_parameters", "representation", "last_shared_layer"])
@pytest.mark.parametrize("accumulating", [False, True])
def test_the_variance_is_that_of_what_was_added_to_the_gradients(scope: str, accumulating: bool) -> None:
    model = TwoHeads()
    layer = list(model.trunk[2].parameters()) if scope == "last_shared_layer" else []
    sgl = SelfGuided(
        model.shared(),
        ["t0", "t1", "t2"],
        scope=scope,  # type: ignore[arg-type]
        last_shared_layer=layer,
        variance_window=5,
    )
    generator = torch.Generator().manual_seed(2)
    rows, before = [], np.zeros(sum(p.numel() for p in model.shared()))
    for _ in range(5):
        losses, penalty, hidden = model.losses(torch.randn(6, 5, generator=generator, dtype=torch.float64))
        sgl.backward(losses, penalty=penalty, representation=hidden if scope == "representation" else None)
        now = np.concatenate(
            [np.zeros(p.numel()) if p.grad is None else p.grad.numpy().ravel() for p in model.shared()]
        )
        rows.append(now - before)
        if accumulating:
            before = now.copy()
        else:
            model.zero_grad()
    metrics = sgl.metrics()
    found = (metrics["gradient_variance"], metrics["gradient_variance_matched"])
    # The penalty alone reaches `penalized`, and in the exact scope its gradient is not in the flat buffer.
    np.testing.assert_allclose(found, expected(np.array(rows)), rtol=1e-6)


def test_the_control_is_what_equal_weights_would_have_given() -> None:
    def directions(balancer: str) -> SelfGuided:
        model = TwoHeads()
        sgl = SelfGuided(
            model.shared(),
            ["t0", "t1", "t2"],
            balancer=balancer,
            statistics=True,
            variance_window=6,
            control=balancer == "sgl",
        )
        generator = torch.Generator().manual_seed(3)
        for _ in range(6):
            losses, penalty, _ = model.losses(torch.randn(6, 5, generator=generator, dtype=torch.float64))
            sgl.backward(losses, penalty=penalty)
            model.zero_grad()
        return sgl

    controlled, plain = directions("sgl").metrics(), directions("equal").metrics()
    for name in ("gradient_variance", "gradient_variance_matched"):
        assert controlled[f"control_{name}"] == pytest.approx(plain[name], rel=1e-9)
        assert controlled[name] != pytest.approx(plain[name], rel=1e-3)


def test_metrics_name_tasks_and_leave_out_those_not_seen() -> None:
    model = TwoHeads()
    sgl = SelfGuided(model.shared(), ["t0", "t1", "t2"], variance_window=0)
    start, held = {"weight": 1.0, "skipped": 0.0}, {"weights_held": 0.0}
    assert sgl.metrics() == {f"{name}/t{row}": value for name, value in start.items() for row in range(3)} | held
    losses, _, _ = model.losses(torch.ones(3, 5, dtype=torch.float64))
    del losses["t1"]
    step = sgl.backward(losses)
    metrics = sgl.metrics()
    assert metrics["cosine/t0/t2"] == float(step.cosine[0, 2])
    assert metrics["gradient_norm/t2"] == float(step.norms[2])
    assert not any("t1" in name for name in metrics if name not in ("weight/t1", "skipped/t1"))
    assert {"conflict_share", "norm_ratio", "cosine_to_mean"} <= metrics.keys()
    assert all(isinstance(value, float) for value in metrics.values())
