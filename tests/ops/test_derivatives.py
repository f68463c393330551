"""Every derivative is right or refused: second order, forward mode, the transforms of `torch.func`."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from umda_fast import ops
from umda_fast.errors import BackendUnavailableError
from umda_fast.ops import _library
from umda_fast.ops._dispatch import reasons_against
from umda_fast.parity import cases, layer_cases
from umda_fast.parity.case import Case, Inputs, normal

pytestmark = pytest.mark.skipif(_library.cpp_status is not None, reason=str(_library.cpp_status))

PTR = torch.tensor([0, 9])
CASES = {
    case.op: case
    for case in (
        cases.cross_view_case("", 3, 2, 1, 8),
        cases.cross_view_tokens_case("", [2, 1, 2], [2, 1], 1, 8, views=2),
        cases.view_fusion_case("", 4, 2, 3, 2),
        layer_cases.norm_linear_case("", 2, 1, 3, 2, 1),
        layer_cases.linear_residual_case("", 2, 1, 3, 2),
        layer_cases.gelu_dropout_case("", (2,), 3, p=0.4),
        layer_cases.dropout_add_norm_case("", (2,), 3, p=0.4),
        cases.bag_pool_case("", [3, 1], 2, 2),
        *cases.neighbor_cases("", 5, 2, 1, 3, csr=False),
    )
    if case.gradients
}


def tangent(x: Tensor) -> Tensor:
    return normal(*x.shape, seed=99).to(x.dtype)


OPERATIONS = sorted(CASES)
NATIVE = [op for op in OPERATIONS if not reasons_against(op, "cpp", "cpu", torch.float32)]
#: torch.func differentiates these by their first argument.
TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones(()))[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (tangent(x),))[1],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
}


def scalar(case: Case, inputs: Inputs, backend: str | None) -> Callable[[Tensor], Tensor]:
    """A sum over all that the operation returns, as a function of the first input that has a derivative."""

    def function(x: Tensor) -> Tensor:
        outputs = case.run({**inputs, case.gradients[0]: x}, backend)  # type: ignore[arg-type]
        return torch.stack([y.square().sum() for y in outputs.values() if y.is_floating_point()]).sum()

    return function


def arguments(op: str, dtype: torch.dtype = torch.float32) -> tuple[Case, Inputs, Tensor]:
    case = CASES[op]
    inputs = case.rounded(dtype, "cpu")
    return case, inputs, inputs[case.gradients[0]]


def test_every_operation_with_a_gradient_is_here() -> None:
    assert set(OPERATIONS) == {case.op for case in cases.all_cases() if case.gradients}


@pytest.fixture
def expected() -> Iterator[Callable[[str, Tensor, Callable[[Tensor], Tensor]], Tensor]]:
    """What plain autograd on the reference makes of it."""

    def of(name: str, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
        if name == "jvp":
            return (gradient.detach() * tangent(x)).sum()
        if name != "hessian":
            return gradient.detach()
        rows = [torch.autograd.grad(entry, leaf, retain_graph=True)[0] for entry in gradient.flatten()]
        return torch.stack(rows).reshape(*x.shape, *x.shape)

    return of


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", OPERATIONS)
def test_transforms_are_served_by_the_reference(
    op: str, transform: str, expected: Callable[[str, Tensor, Callable[[Tensor], Tensor]], Tensor]
) -> None:
    case, inputs, x = arguments(op)
    found = TRANSFORMS[transform](scalar(case, inputs, None), x)
    assert ops.backends_used()[op] == "reference"
    assert torch.equal(found, TRANSFORMS[transform](scalar(case, inputs, "reference"), x))
    case, inputs, x = arguments(op, torch.float64)
    function = scalar(case, inputs, None)
    torch.testing.assert_close(TRANSFORMS[transform](function, x), expected(transform, x, function))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", NATIVE)
def test_transforms_are_refused_by_a_native_backend(op: str, transform: str) -> None:
    case, inputs, x = arguments(op)
    with pytest.raises(BackendUnavailableError, match=f"cannot serve {op}: .*backend=.reference. has both"):
        TRANSFORMS[transform](scalar(case, inputs, "cpp"), x)


@pytest.mark.parametrize("op", NATIVE)
@pytest.mark.parametrize("wanting", [False, True], ids=["", "requires_grad"])
def test_dual_numbers(op: str, wanting: bool) -> None:
    """Forward mode without `torch.func`; an input without a tangent is not differentiated, and stays native."""
    case, inputs, x = arguments(op)
    function = scalar(case, inputs, None)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf), leaf)
    with forward_ad.dual_level():
        result = function(forward_ad.make_dual(x.clone().requires_grad_(wanting), tangent(x)))
        found = forward_ad.unpack_dual(result).tangent
        assert ops.backends_used()[op] == "reference"
        torch.testing.assert_close(found.float().detach(), (gradient * tangent(x)).sum())
        with pytest.raises(BackendUnavailableError, match="reference"):
            scalar(case, inputs, "cpp")(forward_ad.make_dual(x, tangent(x)))
        scalar(case, inputs, "cpp")(x)
        function(x)
        assert ops.backends_used()[op] == "cpp"


@pytest.mark.parametrize("op", NATIVE)
def test_what_a_transform_does_not_differentiate_stays_native(op: str) -> None:
    case, inputs, x = arguments(op)
    function = scalar(case, inputs, "cpp")
    scale = torch.tensor(2.0)  # of a power of 2 no product is rounded
    assert torch.func.grad(lambda s: s * function(x))(scale) == function(x).float()
    assert torch.func.jvp(lambda s: s * function(x), (scale,), (scale,))[1] == scale * function(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent(x))
        with pytest.raises(BackendUnavailableError, match="reference"):
            torch.func.grad(lambda s: s * function(dual))(scale)
    # An outer graph of plain autograd would have to pass through the transform.
    leaf = x.clone().requires_grad_()
    assert torch.func.grad(lambda s: s * scalar(case, inputs, None)(leaf))(scale).requires_grad
    with pytest.raises(BackendUnavailableError, match="reference"):
        torch.func.grad(lambda s: s * function(leaf))(scale)


@pytest.mark.parametrize("op", NATIVE)
def test_second_derivatives_are_refused(op: str) -> None:
    case, inputs, x = arguments(op)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(scalar(case, inputs, "cpp")(leaf), leaf, create_graph=True)
    first = torch.autograd.grad(scalar(case, inputs, "cpp")(leaf), leaf)[0]
    assert torch.equal(gradient, first)
    gradient.mul_(2.0)  # as any gradient, it may be changed in place
    with pytest.raises(NotImplementedError, match=f"{op}: .*backend=.reference. has higher ones"):
        torch.autograd.grad(gradient.square().sum() + 0 * leaf.sum(), leaf)


def test_a_gradient_penalty() -> None:
    """The second derivative that was 0 where the reference gave 10.9."""
    z = torch.randn(9, 4, requires_grad=True)

    def penalty(backend: str | None) -> Tensor:
        pooled = ops.bag_attention_pool(z, z, PTR, backend=backend).pooled
        (gradient,) = torch.autograd.grad(pooled.square().sum(), z, create_graph=True)
        return torch.autograd.grad(gradient.square().sum() + 0 * z.sum(), z)[0]

    assert float(penalty("reference").norm()) > 0
    with pytest.raises(NotImplementedError, match="reference"):
        penalty(None)


def test_a_tangent_through_pooling() -> None:
    """The forward-mode derivative that was 0 (or None) is 1: a mean moves by what all instances move."""
    z = torch.randn(9, 4)
    found = torch.func.jvp(lambda z: ops.bag_attention_pool(z, z.detach(), PTR).pooled, (z,), (torch.ones(9, 4),))[1]
    torch.testing.assert_close(found, torch.ones_like(found))


@pytest.mark.parametrize("op", NATIVE)
def test_derivatives_of_a_backward_pass(op: str) -> None:
    """Forward mode over the gradient, and a graph of batched gradients: refused when they are asked for."""
    case, inputs, x = arguments(op)
    leaf = x.clone().requires_grad_()

    def pull_of(**options: Any) -> Callable[[Tensor], Tensor]:
        total = scalar(case, inputs, "cpp")(leaf)
        return lambda weight: torch.autograd.grad(total, leaf, weight.to(total.dtype), **options)[0]

    one, two = torch.ones(()), torch.ones(2)
    with pytest.raises(NotImplementedError, match=op):
        torch.func.jvp(pull_of(), (one,), (one,))
    with pytest.raises(NotImplementedError, match=op):
        pull_of(is_grads_batched=True, create_graph=True)(two)
    both = torch.func.vmap(pull_of(create_graph=True))(two)
    with pytest.raises(NotImplementedError, match=op):
        both.sum().backward()
    rows = pull_of(is_grads_batched=True)(two)
    assert torch.equal(rows, torch.stack([pull_of()(one)] * 2))


@pytest.mark.parametrize("op", NATIVE)
def test_under_a_checkpoint(op: str) -> None:
    """Saved tensors may be unpacked only once there."""
    case, inputs, x = arguments(op)
    leaf = x.clone().requires_grad_()
    function = scalar(case, inputs, "cpp")
    total = checkpoint(function, leaf, use_reentrant=False)
    (gradient,) = torch.autograd.grad(total, leaf, create_graph=True)
    assert torch.equal(gradient, torch.autograd.grad(function(leaf), leaf)[0])
    with pytest.raises(NotImplementedError, match=op):
        gradient.sum().backward()


def test_transforms_in_a_compiled_function() -> None:
    z = torch.randn(9, 4)

    def compiled(backend: str | None) -> Callable[[Tensor], Any]:
        def function(z: Tensor) -> Tensor:
            return ops.bag_attention_pool(z, z, PTR, backend=backend).pooled

        def run(z: Tensor) -> Any:
            return torch.func.jvp(function, (z,), (torch.ones_like(z),))[1]

        torch._dynamo.reset()
        return torch.compile(run, backend="aot_eager")

    exact = torch.func.jvp(
        lambda z: ops.bag_attention_pool(z, z, PTR, backend="reference").pooled, (z,), (torch.ones_like(z),)
    )[1]
    torch.testing.assert_close(compiled(None)(z), exact)
    with pytest.raises(BackendUnavailableError, match="reference"):
        compiled("cpp")(z)
    # One compiled without a transform is compiled again inside one, and the other way round.
    torch._dynamo.reset()
    plain = torch.compile(lambda z: ops.bag_attention_pool(z, z, PTR).pooled, backend="aot_eager")
    value = plain(z)
    torch.testing.assert_close(torch.func.jvp(plain, (z,), (torch.ones_like(z),))[1], exact)
    assert torch.equal(plain(z), value)
    assert ops.backends_used()["bag_pool"] == "cpp"


@pytest.mark.parametrize("op", NATIVE)
def test_vmap_alone_stays_native(op: str) -> None:
    case, inputs, x = arguments(op)
    function = scalar(case, inputs, None)
    found = torch.func.vmap(function)(torch.stack([x, 2 * x]))
    assert ops.backends_used()[op] == "cpp"
    torch.testing.assert_close(found, torch.stack([function(x), function(2 * x)]))
