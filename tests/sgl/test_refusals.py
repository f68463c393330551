"""What self-guided learning cannot serve on other people's models is named before anything is changed."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from tests.processes import run_together
from tests.sgl.models import WIDTH, Lookup, Recomputed
from umda_fast.sgl import SelfGuided, linear

OPTIONS: dict[str, Any] = {"balancer": "equal", "statistics": True, "direction": "gradient"}


def pair(z: Tensor) -> dict[str, Tensor]:
    first, second, *_ = z.square().mean(0)
    return {"a": first, "b": second}


def state(sgl: SelfGuided) -> list[Tensor]:
    return [value.clone() for value in sgl.state_dict()["tensors"].values()]


def refused(sgl: SelfGuided, parameters: list[Tensor], message: str, call: Callable[[], Any]) -> None:
    """`call` raises, and leaves state and gradients as they were."""
    before = state(sgl), [None if p.grad is None else p.grad.clone() for p in parameters]
    with pytest.raises(ValueError, match=message):
        call()
    assert all(torch.equal(a, b) for a, b in zip(before[0], state(sgl), strict=True))
    for old, p in zip(before[1], parameters, strict=True):
        assert (old is None) == (p.grad is None)
        assert old is None or torch.equal(old, p.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("scope", ["shared_parameters", "last_shared_layer", "representation"])
def test_a_reentrant_checkpoint(scope: str) -> None:
    trunk, head = nn.Linear(8, 8), nn.Linear(8, 2)
    layer = trunk.parameters() if scope == "last_shared_layer" else ()
    sgl = SelfGuided(trunk.parameters(), "ab", scope=scope, last_shared_layer=layer, **OPTIONS)  # type: ignore[arg-type]
    x = torch.randn(4, 8, requires_grad=True)
    z = x * 1
    losses = pair(head(checkpoint(trunk, z, use_reentrant=True)))
    parameters = [*trunk.parameters(), *head.parameters()]
    with_z = {"representation": z} if scope == "representation" else {}
    message = "^losses: a re-entrant checkpoint lies .*use_reentrant=False"
    refused(sgl, parameters, message, lambda: sgl.backward(losses, **with_z))
    # Below what a cheap scope looks at, it is no matter.
    z = checkpoint(trunk, x, use_reentrant=True)
    if scope == "representation":
        sgl.backward(pair(head(z)), representation=z)
        assert trunk.weight.grad is not None
        assert bool(trunk.weight.grad.any())
    elif scope == "last_shared_layer":
        other = nn.Linear(8, 8)
        sgl = SelfGuided(
            [*trunk.parameters(), *other.parameters()],
            "ab",
            scope="last_shared_layer",
            last_shared_layer=other.parameters(),
        )
        assert bool(sgl.backward(pair(head(other(z)))).norms.all())
        assert trunk.weight.grad is not None


def test_a_penalty_through_a_reentrant_checkpoint() -> None:
    trunk = nn.Linear(8, 8)
    sgl = SelfGuided(trunk.parameters(), "ab", **OPTIONS)
    x = torch.randn(4, 8, requires_grad=True)
    losses, penalty = pair(trunk(x)), checkpoint(trunk, x, use_reentrant=True).sum()
    message = "^losses: a re-entrant checkpoint lies in the graph of the penalty"
    refused(sgl, list(trunk.parameters()), message, lambda: sgl.backward(losses, penalty=penalty))


@pytest.mark.parametrize("scope", ["shared_parameters", "last_shared_layer"])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("listed", [False, True])
def test_parameters_that_were_replaced(scope: str, steps: int, listed: bool) -> None:
    trunk, head = nn.Linear(8, 8), nn.Linear(8, 2)
    layer = trunk.parameters() if scope == "last_shared_layer" else ()
    own = head.parameters() if listed else ()
    sgl = SelfGuided(trunk.parameters(), "ab", task_parameters=own, scope=scope, last_shared_layer=layer)  # type: ignore[arg-type]
    for _ in range(steps):
        sgl.backward(pair(head(trunk(torch.randn(4, 8)))))
    trunk.load_state_dict({name: value.clone() for name, value in trunk.state_dict().items()}, assign=True)
    losses = pair(head(trunk(torch.randn(4, 8))))
    message = rf"^{scope}: the losses reach none of the 2 parameters given. Were they replaced .*assign=True"
    refused(sgl, [*trunk.parameters(), *head.parameters()], message, lambda: sgl.backward(losses))


def test_a_part_of_the_parameters_that_was_replaced() -> None:
    trunk, head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 2)
    sgl = SelfGuided(trunk.parameters(), "ab", task_parameters=head.parameters())
    sgl.backward(pair(head(trunk(torch.randn(4, 8)))))
    trunk[1].weight = Parameter(trunk[1].weight.detach().clone())
    losses = pair(head(trunk(torch.randn(4, 8))))
    message = r"^task_parameters: the losses reach 1 parameters \(shapes \[\(8, 8\)\]\)"
    refused(sgl, [*trunk.parameters(), *head.parameters()], message, lambda: sgl.backward(losses))


def test_a_task_that_needs_nothing_shared_may_be_alone_in_a_batch() -> None:
    shared, own = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    sgl = SelfGuided([shared], "ab", **OPTIONS)
    sgl.backward({"a": shared.sum(), "b": own.sum()})
    shared.grad = None
    sgl.backward({"b": own.sum()})
    assert shared.grad is None
    assert own.grad is not None
    assert own.grad.tolist() == [2, 2]
    refused(sgl, [shared, own], "^shared_parameters: the losses reach none", lambda: sgl.backward({"a": own.sum()}))


def test_a_representation_that_no_loss_reaches() -> None:
    trunk, head = nn.Linear(8, 8), nn.Linear(8, 2)
    sgl = SelfGuided(trunk.parameters(), "ab", scope="representation")
    x = torch.randn(4, 8)
    other, losses = trunk(x), pair(head(trunk(x)))
    message = "^representation: no loss reaches it; expected the tensor of this forward pass"
    refused(sgl, list(trunk.parameters()), message, lambda: sgl.backward(losses, representation=other))


def test_an_average_of_sparse_gradients() -> None:
    table = Lookup(True, False)
    sgl = SelfGuided(table.parameters(), "ab")
    losses = pair(table(torch.randn(5, WIDTH)))
    message = '^shared_parameters: sparse gradients .*expected direction="gradient"'
    refused(sgl, list(table.parameters()), message, lambda: sgl.backward(losses))


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", [torch.float16, torch.complex32])
def test_half_precisions(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"^shared_parameters: expected no float16 parameters"):
        SelfGuided([Parameter(torch.zeros(2, dtype=dtype))], "ab")


def test_losses_that_are_no_real_numbers() -> None:
    weight = Parameter(torch.ones(2, dtype=torch.cfloat))
    sgl = SelfGuided([weight], "ab", **OPTIONS)
    with pytest.raises(ValueError, match=r"^losses\['a'\]: expected a real number, got torch\.complex64"):
        sgl.backward({"a": weight.sum(), "b": weight.abs().sum()})


@pytest.mark.parametrize("scope", ["shared_parameters", "representation"])
def test_a_representation_wider_than_the_trunk(scope: str) -> None:
    trunk = nn.Linear(8, 4)
    sgl = SelfGuided(trunk.parameters(), "ab", scope=scope, **OPTIONS)  # type: ignore[arg-type]
    z = trunk(torch.randn(5, 8)).double()
    step = sgl.backward(pair(z), **({"representation": z} if scope == "representation" else {}))
    assert step.gram.dtype == torch.float32
    assert bool(step.norms.all())
    assert trunk.weight.grad is not None


def test_parameters_that_are_trained_later() -> None:
    trunk = nn.Sequential(nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 2))
    sgl = SelfGuided(trunk.parameters(), "ab", **OPTIONS)
    plain = [p.clone() for p in trunk.parameters()]
    x = torch.randn(4, 8)
    sgl.backward(pair(trunk(x)))
    assert trunk[0].weight.grad is None
    trunk.requires_grad_()
    trunk.zero_grad()
    sgl.backward(pair(trunk(x)))
    expected = torch.autograd.grad(sum(pair(trunk(x)).values()), list(trunk.parameters()))  # type: ignore[arg-type]
    for p, gradient, _ in zip(trunk.parameters(), expected, plain, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def in_two_processes() -> None:
    trunk = nn.Sequential(nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 2))
    options: dict[str, Any] = {**OPTIONS, "process_group": dist.group.WORLD}
    sgl = SelfGuided(trunk.parameters(), "ab", **options)
    x = torch.randn(4, 8)
    sgl.backward(pair(trunk(x)))
    trunk.requires_grad_()
    parameters = list(trunk.parameters())
    refused(sgl, parameters, "^process_group: .*make a new one after unfreezing", lambda: sgl.backward(pair(trunk(x))))
    sgl = SelfGuided(trunk.parameters(), "ab", **options)
    parameters[1].register_post_accumulate_grad_hook(lambda p: None)
    refused(sgl, parameters, "^process_group: expected no hooks", lambda: sgl.backward(pair(trunk(x))))
    for scope in ("shared_parameters", "last_shared_layer", "representation"):
        trunk, head = nn.Linear(8, 8), nn.Linear(8, 2)
        layer = trunk.parameters() if scope == "last_shared_layer" else ()
        sgl = SelfGuided(
            trunk.parameters(),
            "ab",
            task_parameters=head.parameters(),
            scope=scope,  # type: ignore[arg-type]
            last_shared_layer=layer,
            process_group=dist.group.WORLD,
        )
        z = trunk(x)
        with_z = {"representation": z} if scope == "representation" else {}
        sgl.backward(pair(head(z)), **with_z)
        trunk.load_state_dict({name: value.clone() for name, value in trunk.state_dict().items()}, assign=True)
        z = trunk(x)
        with_z = {"representation": z} if scope == "representation" else {}
        losses = pair(head(z))
        message = "^task_parameters: the losses reach 2 parameters"
        refused(sgl, list(head.parameters()), message, lambda: sgl.backward(losses, **with_z))  # noqa: B023


def test_what_several_processes_refuse() -> None:
    run_together(in_two_processes, 2)


# -- and what is served, at the price it has to have ------------------------------------------------------------


def test_a_checkpoint_runs_once_more_for_each_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "LEAST", 0)
    trunk = Recomputed(nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))))
    sgl = SelfGuided(trunk.parameters(), "ab", **OPTIONS)
    sgl.backward(pair(trunk(torch.randn(4, 8))))
    assert trunk.calls == 1 + 2


def test_channels_last_is_saved_in_the_order_of_shapes() -> None:
    """A state goes into a model of either memory format."""
    states = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        conv = nn.Conv2d(2, 3, 2).to(memory_format=memory_format)  # type: ignore[call-overload]
        sgl = SelfGuided(conv.parameters(), "ab")
        losses = pair(conv(torch.randn(2, 2, 4, 4)).mean((2, 3)))
        sgl.backward(losses)
        assert conv.weight.grad is not None
        assert conv.weight.grad.stride() == conv.weight.stride()
        states.append(sgl.state_dict())
        sgl.load_state_dict(states[0])
        torch.testing.assert_close(sgl.state_dict()["tensors"], states[0]["tensors"])
    torch.testing.assert_close(states[0]["tensors"], states[1]["tensors"])


def test_fused_optimisers_update_what_is_meant() -> None:
    weights = []
    for guided in (False, True):
        torch.manual_seed(0)
        conv = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(conv.parameters(), lr=0.1, fused=True)
        losses = pair(conv(torch.randn(2, 2, 4, 4)).mean((2, 3)))
        SelfGuided(conv.parameters(), "ab", **OPTIONS).backward(losses) if guided else sum(losses.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
        weights.append(conv.weight.detach().clone())
    torch.testing.assert_close(*weights)


def test_gradients_that_are_kept_are_not_written_to() -> None:
    trunk = nn.Linear(8, 2)
    sgl = SelfGuided(trunk.parameters(), "ab", **OPTIONS)
    sgl.backward(pair(trunk(torch.randn(4, 8))))
    kept = trunk.weight.grad
    assert kept is not None
    copy = kept.clone()
    trunk.zero_grad()
    sgl.backward(pair(trunk(torch.randn(4, 8))))
    assert torch.equal(kept, copy)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_representation_has_the_gradient_of_the_whole(frozen: bool) -> None:
    """Also a leaf, of a trunk that is not trained; its hooks run once."""
    trunk, middle, head = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(4, 2)
    z = trunk(torch.randn(5, 8))
    calls: list[Tensor] = []
    if frozen:
        z = z.detach().requires_grad_()
        z.register_hook(calls.append)
    else:
        z.retain_grad()
    losses = pair(head(middle(z)))
    (expected,) = torch.autograd.grad(sum(losses.values()), z, retain_graph=True)  # type: ignore[arg-type]
    z.grad = torch.ones_like(z)
    calls.clear()
    shared = middle if frozen else trunk
    SelfGuided(shared.parameters(), "ab", scope="representation", **OPTIONS).backward(losses, representation=z)
    torch.testing.assert_close(z.grad, expected + 1)
    assert len(calls) == int(frozen)


@pytest.mark.parametrize("scope", ["shared_parameters", "last_shared_layer", "representation"])
@pytest.mark.parametrize("balancer", ["sgl", "pbi"])
@pytest.mark.parametrize("where", [torch.no_grad(), torch.autocast("cpu", torch.bfloat16)], ids=["no_grad", "autocast"])
def test_wherever_it_is_called(scope: str, balancer: str, where: Any) -> None:
    """With grad off, as `Tensor.backward`, and under autocast, without a product in half precision."""
    found = []
    for inside in (False, True):
        torch.manual_seed(0)
        trunk, head = nn.Linear(8, 8), nn.Linear(8, 3)
        layer = trunk.parameters() if scope == "last_shared_layer" else ()
        sgl = SelfGuided(trunk.parameters(), "abc", balancer=balancer, scope=scope, last_shared_layer=layer)  # type: ignore[arg-type]
        z = trunk(torch.randn(4, 8))
        losses = dict(zip("abc", head(z).square().mean(0) * torch.tensor([1.0, 7.0, 50.0]), strict=True))
        penalty = z.square().mean()
        with where if inside else contextlib.nullcontext():
            step = sgl.backward(losses, penalty=penalty, representation=z if scope == "representation" else None)
        found.append([step.weights, step.gram, *(p.grad for p in (*trunk.parameters(), *head.parameters()))])
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="a torch without it")
def test_gradients_of_another_dtype_than_the_parameter() -> None:
    weight = Parameter(torch.ones(64, dtype=torch.bfloat16))
    weight.grad_dtype = torch.float32
    z = weight.float() * torch.arange(64.0)
    SelfGuided([weight], "ab", **OPTIONS).backward({"a": 1.01 * z.sum(), "b": z.square().mean()})
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())


def test_gradients_are_not_copied() -> None:
    """A missing `.grad` takes the memory of the result, which the next step uses again where nobody has it."""
    trunk = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    sgl = SelfGuided(trunk.parameters(), "ab", **OPTIONS)
    places = []
    for _ in range(3):
        trunk.zero_grad()
        sgl.backward(pair(trunk(torch.randn(4, 8))))
        (place,) = {p.grad.untyped_storage().data_ptr() for p in trunk.parameters() if p.grad is not None}
        places.append(place)
    assert len(set(places)) == 1
    sgl.backward(pair(trunk(torch.randn(4, 8))))  # added to what stands
    assert {p.grad.untyped_storage().data_ptr() for p in trunk.parameters() if p.grad is not None} == {place}


def test_parameters_that_are_no_parameters() -> None:
    scales = torch.zeros(2, requires_grad=True)
    trunk = nn.Linear(8, 1)
    z = trunk(torch.randn(4, 8)).square().mean()
    sgl = SelfGuided(trunk.parameters(), "ab", task_parameters=[scales], **OPTIONS)  # type: ignore[list-item]
    sgl.backward({"a": z * scales[0].exp(), "b": z * scales[1].exp()})
    torch.testing.assert_close(scales.grad, z.detach().expand(2))


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_served_or_names_what_to_set() -> None:
    torch.manual_seed(0)
    trunk, head = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 2)
    compiled: Callable[[Tensor], Tensor] = torch.compile(trunk, backend="aot_eager")  # type: ignore[assignment]
    sgl = SelfGuided(trunk.parameters(), "ab", **OPTIONS)
    x = torch.randn(4, 8)
    sgl.backward(pair(head(compiled(x))))
    found = [p.grad for p in trunk.parameters()]
    expected = torch.autograd.grad(sum(pair(head(trunk(x))).values()), list(trunk.parameters()))  # type: ignore[arg-type]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
