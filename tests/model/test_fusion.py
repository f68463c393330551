"""Fusion and the penalties on views from one sweep, held to the modules that take a pass each."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.model.conftest import make_batch, make_config
from umda_fast import UMDA
from umda_fast.model import ViewConsistency, ViewFusion, dispersion_penalty
from umda_fast.model.fusion import fuse_and_penalize
from umda_fast.ops import backends_used, use_backend
from umda_fast.parity import GRADIENT_FACTOR, OUTPUT_FACTOR, assert_close

N, V, D = 120, 3, 24

Results = tuple[list[Tensor], list[Tensor]]


@pytest.fixture
def modules() -> tuple[ViewFusion, ViewConsistency]:
    torch.manual_seed(0)
    return ViewFusion(D), ViewConsistency(D)


def make(missing: bool) -> tuple[Tensor, Tensor | None]:
    """Views off 0, not too far apart for the dispersion; rows of missing views are 0, as the model makes them."""
    torch.manual_seed(1)
    y = 0.6 * torch.randn(N, V, D) + torch.randn(N, 1, D) / 2 + 0.3
    if not missing:
        return y, None
    mask = torch.rand(N, V) < 0.6
    mask[:, 0] |= ~mask.any(1)
    return y.masked_fill(~mask[..., None], 0.0), mask


def results(together: bool, pair: tuple[ViewFusion, ViewConsistency], y: Tensor, mask: Tensor | None) -> Results:
    """z, beta, both penalties, and the gradients of a combination of them in y and in every parameter."""
    fusion, consistency = (copy.deepcopy(module).to(y.dtype) for module in pair)
    y = y.clone().requires_grad_()
    if together:
        outputs = list(fuse_and_penalize(fusion, consistency, y, mask, 0.9))
    else:
        outputs = [*fusion(y, mask), consistency(y, mask), dispersion_penalty(y, mask, 0.9)]
    torch.manual_seed(2)
    loss = sum((x * torch.randn(x.shape).to(x)).sum() for x in outputs[:2]) + N * (outputs[2] + 3 * outputs[3])
    assert isinstance(loss, Tensor)
    wanted = [y, *fusion.parameters(), *consistency.parameters()]
    return [x.detach() for x in outputs], list(torch.autograd.grad(loss, wanted))


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_same_as_separate_passes(modules: tuple[ViewFusion, ViewConsistency], missing: bool, backend: str) -> None:
    y, mask = make(missing)
    exact = results(False, modules, y.double(), mask)
    separate = results(False, modules, y, mask)
    assert all(x > 0.05 for x in exact[0][2:])
    with use_backend(backend):
        fused = results(True, modules, y, mask)
    assert backends_used()["view_fusion"] == backend
    for part, factor in ((0, OUTPUT_FACTOR), (1, GRADIENT_FACTOR)):
        for i, (mine, right, theirs) in enumerate(zip(fused[part], exact[part], separate[part], strict=True)):
            assert mine.dtype == theirs.dtype
            assert_close(f"{part}, {i}", mine, right, theirs, factor)


@pytest.mark.parametrize("missing", [False, True])
def test_the_same_in_float64(modules: tuple[ViewFusion, ViewConsistency], missing: bool) -> None:
    y, mask = make(missing)
    for mine, right in zip(
        results(True, modules, y.double(), mask), results(False, modules, y.double(), mask), strict=True
    ):
        for a, b in zip(mine, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_the_model_takes_one_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its results are those of the modules one by one."""
    batch = make_batch().double()
    torch.manual_seed(0)
    model = UMDA(make_config()).double().eval()
    out = model(**batch.inputs())
    y = model.cross_views(batch.views, batch.ptr, batch.mask).y
    z, beta = model.fusion(y, batch.mask)
    torch.testing.assert_close(out.view_weights, beta)
    torch.testing.assert_close(out.penalties["consistency"], model.consistency(y, batch.mask))
    torch.testing.assert_close(out.penalties["dispersion"], dispersion_penalty(y, batch.mask, model.config.delta))

    def called(*_: object) -> None:
        raise AssertionError("a pass of its own")

    for module in (model.fusion, model.consistency):
        monkeypatch.setattr(module, "forward", called)
    torch.testing.assert_close(model(**batch.inputs()).view_weights, beta)
    assert z.shape == out.representation.shape


def test_autocast(modules: tuple[ViewFusion, ViewConsistency]) -> None:
    y, mask = make(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = y.bfloat16()
        fused = fuse_and_penalize(*modules, y, mask, 0.9)
        separate = [*modules[0](y, mask), modules[1](y, mask), dispersion_penalty(y, mask, 0.9)]
    exact = results(False, modules, y.double(), mask)[0]
    assert [x.dtype for x in fused] == [torch.bfloat16] + 3 * [torch.float32]
    for name, a, b, c in zip(("z", "beta", "consistency", "dispersion"), fused, exact, separate, strict=True):
        assert_close(name, a, b, c)
