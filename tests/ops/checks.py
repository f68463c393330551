"""What the tests of the public operations share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import settings
from torch import Tensor
from torch.autograd import gradcheck

from tests.csrc.cpu_checks import poisoned_memory, threads
from umda_fast.ops._library import op
from umda_fast.parity import judge
from umda_fast.parity.case import Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: The same few examples on every machine.
few = settings(max_examples=8, derandomize=True, deadline=None, database=None)


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values that want a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def some_views(n: int, views: int) -> Tensor:
    """A mask [n, views] with a view at least for every instance."""
    mask = torch.rand(n, views, generator=torch.Generator().manual_seed(n)) < 0.5
    mask[torch.arange(n), torch.arange(n) % views] = True
    return mask


def keeps_rule(case: Case, dtype: torch.dtype = torch.float32, backend: str = "cpp") -> None:
    """Outputs and gradients keep the rule, and no element that nobody wrote is seen."""
    with poisoned_memory():
        rows = judge(case, backend, dtype)
    assert rows
    for row in rows:
        assert row["verdict"] == "pass", row


def repeats(case: Case, dtype: torch.dtype = torch.float32) -> None:
    """The same bits on a second run and with another number of threads, outputs and gradients."""
    inputs = case.rounded(dtype, "cpu")
    runs = []
    for count in (1, 1, 2):
        with threads(count):
            outputs, gradients = case.evaluate(inputs, "cpp")
        runs.append([*outputs.values(), *gradients.values()])
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a.nan_to_num(1234.5), b.nan_to_num(1234.5))


def check_op(name: str, *args: Any) -> None:
    """`torch.library.opcheck`: schema, fake implementation, autograd registration, dynamic shapes."""
    results = torch.library.opcheck(op(name), args)
    assert set(results.values()) == {"SUCCESS"}, results


def check_gradients(function: Callable[..., Any], *inputs: Tensor) -> None:
    """First derivatives of every output in every float64 input, against finite differences."""
    assert gradcheck(function, inputs, fast_mode=True)  # of every entry: tests/reference


def differentiate(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of their sum (squares, so that no gradient is constant)."""
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else [x for x in outputs if x is not None]
    used = [x for x in outputs if x.requires_grad]
    wanted = [x for x in leaves if x.requires_grad]
    if not used:
        return list(outputs)
    loss = torch.stack([x.float().square().sum() for x in used]).sum()
    return [
        *(x.detach() for x in outputs),
        *torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True),
    ]


def check_compiled(
    function: Callable[..., Any], *inputs: Tensor, backends: Sequence[str] = ("cpp", "reference")
) -> None:
    """``function(*inputs, backend=...)`` traced as one graph, forward and backward, is what it is when called."""
    for backend in backends:

        def called(*args: Tensor, backend: str = backend) -> Any:
            return function(*args, backend=backend)

        torch._dynamo.reset()
        compiled = torch.compile(called, fullgraph=True, backend="aot_eager")
        for a, b in zip(differentiate(called, inputs), differentiate(compiled, inputs), strict=True):
            torch.testing.assert_close(a, b, msg=lambda m, backend=backend: f"{backend}: {m}")
