"""Derivatives of the whole model beyond the gradient, and the model on meta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.conftest import TASKS, VIEWS, make_batch, make_config
from umda_fast import UMDA, use_backend
from umda_fast.model import MetadataSpec, UMDAConfig
from umda_fast.model.config import BEFORE_2
from umda_fast.model.film import FiLM
from umda_fast.model.gmip import diversity_penalty
from umda_fast.ops import _library

VIEW = VIEWS[0].name
TREE = ((0.0, 1.0, 2.0, 2.0), (1.0, 0.0, 2.0, 2.0), (2.0, 2.0, 0.0, 1.0), (2.0, 2.0, 1.0, 0.0))


def parts() -> tuple[Callable[[Tensor], dict[str, Tensor]], Tensor]:
    """All logits and penalties as functions of one view, in float64, away from every kink."""
    torch.manual_seed(0)
    model = UMDA(make_config()).double().eval()
    batch = make_batch().double()
    inputs = batch.inputs()
    where = inputs["mask"][:, 0]
    x = inputs["views"][VIEW].masked_fill(~where[:, None], 0.0)

    def function(x: Tensor) -> dict[str, Tensor]:
        out = model(**{**inputs, "views": {**inputs["views"], VIEW: x}})
        found = {name: logits.square().sum() for name, logits in out.logits.items()}
        return found | {f"penalty {name}": value for name, value in out.penalties.items()}

    return function, x


def test_second_and_forward_derivatives_of_everything() -> None:
    """Against differences of gradients; on the reference, which float64 takes."""
    function, x = parts()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = 1e-6

    def gradient(name: str, x: Tensor, graph: bool = False) -> tuple[Tensor, Tensor | None]:
        leaf = x.detach().requires_grad_()
        value = function(leaf)[name]
        if not value.requires_grad:
            return leaf, None
        return leaf, torch.autograd.grad(value, leaf, create_graph=graph, allow_unused=True)[0]

    seen = 0
    for name in function(x):
        leaf, first = gradient(name, x, graph=True)
        if first is None:
            continue
        seen += 1
        tangent = torch.func.jvp(lambda x, name=name: function(x)[name], (x,), (direction,))[1]
        torch.testing.assert_close(tangent, (first * direction).sum().detach())
        (second,) = torch.autograd.grad((first * direction).sum(), leaf)
        ahead, behind = (gradient(name, x + sign * step * direction)[1] for sign in (1, -1))
        assert ahead is not None
        assert behind is not None
        torch.testing.assert_close(second, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-8)
    assert seen >= len(TASKS) + 5


@pytest.mark.skipif(_library.cpp_status is not None, reason=str(_library.cpp_status))
def test_the_whole_model_refuses_a_second_derivative() -> None:
    torch.manual_seed(0)
    model, batch = UMDA(make_config()).eval(), make_batch()
    inputs = batch.inputs()
    x = inputs["views"][VIEW].nan_to_num().requires_grad_()
    inputs["views"][VIEW] = x
    for backend in ("auto", "reference"):
        with use_backend(backend):
            out = model(**inputs)
            total = sum((y.square().sum() for y in out.logits.values()), start=x.new_zeros(()))
            (gradient,) = torch.autograd.grad(total, x, create_graph=True)
            if backend == "reference":
                assert float(torch.autograd.grad(gradient.square().sum(), x)[0].norm()) > 0
            else:
                with pytest.raises(NotImplementedError, match=r"backend=.reference. has higher ones"):
                    torch.autograd.grad(gradient.square().sum(), x)


def test_second_derivative_of_the_diversity() -> None:
    """The mean that the variance is about moves with the instances."""
    z = 0.1 * torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ptr = torch.tensor([0, 4, 4, 9])
    assert torch.autograd.gradgradcheck(lambda z: diversity_penalty(z, ptr), z.requires_grad_())


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "hierarchy": {"hierarchy": TREE},
    "metadata": {"metadata": (MetadataSpec("age", 60.0, 10.0),)},
    "bins and linear path": {"bins": 4, "linear_path": True},
    "chunks": {"chunk": 5},
    "experts": {"branching": "ple"},
    "mean messages": {"message": "mean"},
    "bare": {"hcva": False, "graph": False, "private": False},
    "before version 2": BEFORE_2,
}


def on_meta(config: UMDAConfig) -> dict[str, Any]:
    inputs = make_batch(views=config.views).inputs()
    inputs["metadata"] = torch.randn(len(inputs["ptr"]) - 1, 1) if config.metadata else None
    views = {name: x.to("meta") for name, x in inputs.pop("views").items()}
    return {"views": views, **{name: None if x is None else x.to("meta") for name, x in inputs.items()}}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_and_backward_on_meta(option: str, dtype: torch.dtype) -> None:
    config = make_config(**OPTIONS[option])
    with torch.device("meta"):
        model = UMDA(config).to(dtype)
    inputs = on_meta(config)
    inputs["views"] = {name: x.to(dtype) for name, x in inputs["views"].items()}
    out = model(**inputs)
    real = UMDA(config).to(dtype)(
        **{
            name: {view: torch.zeros_like(y, device="cpu") for view, y in x.items()} if name == "views" else
            x if x is None else torch.ones_like(x, device="cpu") if x.dtype == torch.bool else
            make_batch(views=config.views).ptr if name == "ptr" else torch.zeros_like(x, device="cpu")
            for name, x in inputs.items()
        }
    )  # fmt: skip
    for name, logits in out.logits.items():
        assert logits.is_meta
        assert (logits.shape, logits.dtype) == (real.logits[name].shape, real.logits[name].dtype)
    for name, penalty in out.penalties.items():
        assert (penalty.shape, penalty.dtype) == (real.penalties[name].shape, real.penalties[name].dtype), name
    total = torch.stack([y.sum() for y in (*out.logits.values(), *out.penalties.values())]).sum()
    total.backward()
    assert all(p.grad is None or p.grad.is_meta for p in model.parameters())


def test_a_graph_whose_size_depends_on_the_data_is_named_on_meta() -> None:
    config = make_config(symmetrize=True)
    with torch.device("meta"):
        model = UMDA(config)
    with pytest.raises(ValueError, match=r"neighbors must have values, .* meta"):
        model(**on_meta(config))


def test_constants_follow_the_parameters() -> None:
    """What the configuration gives and no state dictionary holds: assigned from meta, made empty, cast there and
    back."""
    config = make_config(hierarchy=TREE, metadata=(MetadataSpec("age", 60.1, 10.3),))
    there = UMDA(config)
    assert there.film is not None
    with torch.device("meta"):
        assigned, emptied = UMDA(config), UMDA(config)
    assigned.load_state_dict({name: x.clone() for name, x in there.state_dict().items()}, assign=True)
    emptied.to_empty(device="cpu")
    emptied.load_state_dict(there.state_dict())
    cast = UMDA(config).half().float()
    for model in (assigned, emptied, cast):
        assert model.film is not None
        assert torch.equal(model.atsb.hierarchy, -torch.tensor(TREE))
        assert torch.equal(model.film.mean, there.film.mean)
        assert torch.equal(model.film.std, there.film.std)
    batch = make_batch()
    inputs = batch.inputs() | {"metadata": torch.tensor([[50.0]] * (len(batch.ptr) - 1))}
    expected = there.eval()(**inputs).logits
    for model in (assigned, emptied):
        for name, logits in model.eval()(**inputs).logits.items():
            assert torch.equal(logits, expected[name])


def test_constants_of_a_half_precision_model_assigned_from_meta() -> None:
    film = FiLM((MetadataSpec("age", 60.0, 10.0),), 6)
    with torch.device("meta"):
        empty = FiLM((MetadataSpec("age", 60.0, 10.0),), 6)
    state = {name: x.double() for name, x in film.state_dict().items()}
    empty.load_state_dict(state, assign=True)
    assert not empty.mean.is_meta
    assert empty(torch.randn(2, 6).double(), torch.tensor([[50.0], [60.0]])).shape == (2, 6)
