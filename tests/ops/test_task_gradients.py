"""task_gradient_statistics and combine_task_gradients through their public functions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.checks import DTYPES, check_op, few, keeps_rule, leaf, repeats
from umda_fast.ops import combine_task_gradients, linear_weight_gradient, task_gradient_statistics
from umda_fast.parity.cases import linear_weight_gradient_case, task_gradient_cases


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    ema, correction = leaf(3, 17).detach(), torch.tensor([1.0, 2.0, 3.0])
    grads = leaf(3, 17, seed=1, dtype=dtype).detach()
    pieces = [x.contiguous() for row in grads for x in row.split([10, 7])]
    active = torch.tensor([True, False, True])
    check_op("task_gradient_statistics", [grads], ema.clone(), correction, None, 0.5)
    check_op("task_gradient_statistics", pieces, ema.clone(), correction, active, 0.5)
    check_op("combine_task_gradients", ema, correction, torch.empty(17, dtype=dtype))


def test_opcheck_of_the_weight_gradient() -> None:
    check_op("linear_weight_gradient", leaf(9, 5).detach(), leaf(9, 7).detach(), torch.empty(5, 7))


@few
@given(
    batch=st.sampled_from([0, 1, 59, 128, 129, 700]),
    outputs=st.sampled_from([1, 5, 6, 97, 193]),
    inputs=st.sampled_from([1, 17, 64, 257, 300]),
)
def test_weight_gradient(batch: int, outputs: int, inputs: int) -> None:
    keeps_rule(linear_weight_gradient_case("drawn", batch, outputs, inputs))


def test_weight_gradient_repeats() -> None:
    repeats(linear_weight_gradient_case("several blocks", 300, 200, 300))


def test_weight_gradient_takes_any_strides() -> None:
    d_out, x = leaf(40, 6).detach(), leaf(40, 9, seed=1).detach()
    expected = linear_weight_gradient(d_out, x, torch.empty(6, 9), backend="cpp")
    turned = linear_weight_gradient(d_out.T.contiguous().T, x.T.contiguous().T, torch.empty(6, 9), backend="cpp")
    assert torch.equal(turned, expected)
    same = linear_weight_gradient(torch.ones(1, 1).expand(40, 6), x, torch.empty(6, 9), backend="cpp")
    torch.testing.assert_close(same, x.sum(0).expand(6, 9))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_compiles_as_one_graph(backend: str) -> None:
    grads, start = leaf(3, 17, seed=1).detach(), leaf(3, 17).detach()

    def function(grads: torch.Tensor, ema: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gram = task_gradient_statistics(grads, ema, beta=0.9, step=step, backend=backend)
        return gram, combine_task_gradients(ema, gram[0], backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    mine, theirs = start.clone(), start.clone()
    for a, b in zip(
        function(grads, mine, torch.tensor([1, 2, 3])), compiled(grads, theirs, torch.tensor([1, 2, 3])), strict=True
    ):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(mine, theirs)
    assert not torch.equal(mine, start)


@few
@given(
    tasks=st.integers(1, 9),
    pieces=st.lists(st.sampled_from([1, 3, 59, 97, 256, 1025]), min_size=1, max_size=4),
    inactive=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_accuracy(tasks: int, pieces: list[int], inactive: bool, dtype: torch.dtype) -> None:
    statistics, combined = task_gradient_cases("drawn", tasks, pieces, inactive=inactive)
    keeps_rule(statistics, dtype)
    keeps_rule(combined)


def test_repeats() -> None:
    for case in task_gradient_cases("several blocks", 4, [70_000, 333]):
        repeats(case)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_steps_inactive_rows_and_buffers(backend: str) -> None:
    """By hand: the average, its bias correction per task, a row that is kept, an output that is given."""
    ema = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    grads = torch.tensor([[3.0, 2.0], [float("nan"), 0.0]])
    steps, active = torch.tensor([1, 2]), torch.tensor([True, False])
    gram = task_gradient_statistics(grads, ema, beta=0.5, step=steps, active=active, backend=backend)
    assert ema.tolist() == [[2.0, 1.0], [0.0, 4.0]]
    hat = torch.tensor([[4.0, 2.0], [0.0, 4 / 0.75]])
    torch.testing.assert_close(gram, hat @ hat.T)
    out = torch.empty(2)
    found = combine_task_gradients(ema, torch.tensor([0.5, 0.25]), out, backend=backend)
    assert found is out
    assert out.tolist() == [1.0, 1.5]


def test_a_list_of_parameters_is_the_matrix() -> None:
    shapes = [(3, 5), (7,), ()]
    pieces = [[leaf(*s, seed=t * 3 + i).detach() for i, s in enumerate(shapes)] for t in range(2)]
    matrix = torch.stack([torch.cat([x.flatten() for x in task]) for task in pieces])
    one, other = torch.zeros(2, 23), torch.zeros(2, 23)
    torch.testing.assert_close(
        task_gradient_statistics(matrix, one, beta=0.9, step=1),
        task_gradient_statistics(pieces, other, beta=0.9, step=1),
    )
    assert torch.equal(one, other)
