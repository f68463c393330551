"""task_gradients on the CPU against the reference: matrix and list form, any partition, any threads."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.csrc.cpu_checks import FORCED_SETS, assert_close, poisoned_memory, run_on, threads
from umda_fast.reference import task_gradients as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def statistics(grads: list[Tensor], ema: Tensor, correction: Tensor, active: Tensor | None, beta: float) -> Tensor:
    gram: Tensor = torch.ops.umda_fast.task_gradient_statistics(grads, ema, correction, active, beta)
    return gram


def check(tasks: int, columns: int, dtype: torch.dtype, seed: int, cuts: list[int], strided: bool = False) -> None:
    generator = torch.Generator().manual_seed(seed)
    grads = (torch.randn(tasks, columns, generator=generator) + 0.3).to(dtype)
    ema = torch.randn(tasks, 2 * columns + 3, generator=generator)[:, 1 : columns + 1]
    ema = ema if strided else ema.contiguous()
    before = ema.clone()
    correction = torch.rand(tasks, generator=generator) + 0.5
    active = torch.rand(tasks, generator=generator) > 0.3
    grads[~active] = math.nan  # never read
    with poisoned_memory():
        gram = statistics([grads], ema, correction, active, 0.9)

    exact, composed = before.double(), before.clone()
    exact_gram = reference.task_gradient_statistics([grads.double()], exact, correction.double(), active, 0.9)
    reference.task_gradient_statistics([grads.float()], composed, correction, active, 0.9)
    assert_close("ema", ema, exact, composed, 2)
    assert torch.equal(ema[~active], before[~active])
    assert gram.dtype == torch.float32
    assert torch.equal(gram, gram.T)
    corrected = composed * correction[:, None]
    # 1e-6 of the norms: the contract's figure, for the products of the averages as they are stored (in few columns an
    # average may cancel, and what is left of it is rounding); and the error rule, for both together.
    stored = ema.double() * correction.double()[:, None]
    stored_gram = stored @ stored.T
    norms = stored_gram.diagonal().sqrt()
    assert ((gram.double() - stored_gram).abs() <= 1e-6 * norms[:, None] * norms).all()
    assert_close("gram", gram, exact_gram, corrected @ corrected.T, 2)

    bounds = sorted({min(cut, columns) for cut in cuts}) if cuts else []
    bounds = [0, *bounds, columns]
    pieces = [grads[t, begin:end] for t in range(tasks) for begin, end in pairwise(bounds)]
    again = before.clone()
    assert torch.equal(statistics(pieces, again, correction, active, 0.9), gram)
    assert torch.equal(again, ema)

    weights = torch.randn(tasks, generator=generator)
    for out_type in DTYPES:
        out = torch.empty(columns, dtype=out_type)
        torch.ops.umda_fast.combine_task_gradients(ema, weights, out)
        combined = torch.empty(columns, dtype=torch.float64)
        reference.combine_task_gradients(ema.double(), weights.double(), combined)
        own = torch.empty(columns, dtype=out_type)
        reference.combine_task_gradients(ema, weights, own)
        # In one column another order of the same sum may be exact by luck: what every order keeps (Higham 2002, 3.1),
        # T roundings of its terms and one of the result, is allowed as well.
        terms = weights.double().abs() @ ema.double().abs()
        rounding = tasks * 2.0**-24 * terms + torch.finfo(out_type).eps / 2 * combined.abs()
        theirs = (own.double() - combined).abs().max() if columns else 0.0
        assert ((out.double() - combined).abs() <= rounding.clamp_min(2 * theirs)).all()


@settings(max_examples=40, deadline=None)
@given(
    tasks=st.integers(1, 19),
    columns=st.sampled_from([0, 1, 3, 59, 97, 256, 1023, 1025, 4100]) | st.integers(0, 3000),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    cuts=st.lists(st.integers(0, 4000), max_size=5),
    strided=st.booleans(),
)
def test_against_reference(
    tasks: int, columns: int, dtype: torch.dtype, seed: int, cuts: list[int], strided: bool
) -> None:
    check(tasks, columns, dtype, seed, cuts, strided)


def test_several_groups_of_columns() -> None:
    check(8, 150_001, torch.float32, 1, [7, 7, 40_000, 131_072])
    check(3, 70_000, torch.bfloat16, 2, [16_384])


def test_gram_of_many_columns() -> None:
    """All products positive: the case in which a long float32 sum loses the most."""
    generator = torch.Generator().manual_seed(3)
    ema = torch.rand(2, 20_000_000, generator=generator)
    exact = ema[0].double() @ ema[1].double(), ema[0].double().square().sum()
    inactive = torch.zeros(2, dtype=torch.bool)
    gram = statistics([torch.empty_like(ema)], ema, torch.ones(2), inactive, 0.9)
    assert abs(gram[0, 1].item() / exact[0].item() - 1) < 1e-6
    assert abs(gram[0, 0].item() / exact[1].item() - 1) < 1e-6


def test_list_of_parameters() -> None:
    """Tensors of any shape, strides and mixed storage types, empty ones among them."""
    generator = torch.Generator().manual_seed(4)
    shapes = [(7, 5), (), (0, 3), (2, 3, 4), (1000,), (11,)]
    types = [torch.float32, torch.bfloat16, torch.float32, torch.float16, torch.float32, torch.bfloat16]
    tasks = 3
    grads = [
        torch.randn(shape, generator=generator).to(dtype)
        for _ in range(tasks)
        for shape, dtype in zip(shapes, types, strict=True)
    ]
    grads[0] = torch.randn(5, 7, generator=generator).T
    columns = sum(math.prod(shape) for shape in shapes)
    ema, correction = torch.randn(tasks, columns, generator=generator), torch.ones(tasks)
    exact = ema.double()
    kinds = len(shapes)
    flat = torch.stack(
        [torch.cat([g.flatten().float() for g in grads[t * kinds : (t + 1) * kinds]]) for t in range(tasks)]
    )
    expected = reference.task_gradient_statistics([flat.double()], exact, correction.double(), None, 0.5)
    gram = statistics(grads, ema, correction, None, 0.5)
    torch.testing.assert_close(ema, exact.float())
    torch.testing.assert_close(gram, expected.float())


def test_same_bits_for_any_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(5)
    grads, start = torch.randn(5, 200_000, generator=generator), torch.randn(5, 200_000, generator=generator)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            ema, out = start.clone(), torch.empty(200_000)
            gram = statistics([grads], ema, torch.ones(5), None, 0.9)
            torch.ops.umda_fast.combine_task_gradients(ema, gram[0], out)
            results.append((gram, ema, out))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_a_nan_stays_in_its_task() -> None:
    ema, grads = torch.zeros(3, 100), torch.ones(3, 100)
    grads[1, 50] = math.nan
    gram = statistics([grads], ema, torch.ones(3), None, 0.0)
    assert torch.equal(gram.isnan(), torch.tensor([[0, 1, 0], [1, 1, 1], [0, 1, 0]]).bool())


def test_direct_callers_are_checked() -> None:
    ema, ones = torch.zeros(2, 10), torch.ones(2)
    for arguments, message in [
        (([torch.zeros(3, 10)], ema, ones, None, 0.9), "multiple of 2 tensors"),
        (([torch.zeros(n) for n in (4, 6, 5, 5)], ema, ones, None, 0.9), "must have 4 elements"),
        (([torch.zeros(4), torch.zeros(4)], ema, ones, None, 0.9), "10 elements together"),
        (([torch.zeros(2, 10).double()], ema, ones, None, 0.9), "grads must be float32"),
        (([torch.zeros(2, 10)], ema.double(), ones, None, 0.9), "ema must be"),
        (([torch.zeros(2, 10)], torch.zeros(10, 2).T, ones, None, 0.9), "ema must be contiguous in its last"),
        (([torch.zeros(2, 10)], ema, torch.ones(3), None, 0.9), "correction must have size 2"),
        (([torch.zeros(2, 10)], ema, ones, ones, 0.9), "active must be"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            statistics(*arguments)
    with pytest.raises(RuntimeError, match="out must be contiguous"):
        torch.ops.umda_fast.combine_task_gradients(ema, ones, torch.zeros(20)[::2])


def check_weight_gradient(batch: int, outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(batch + outputs + inputs)
    d_out, x = torch.randn(batch, outputs, generator=generator), torch.randn(batch, inputs, generator=generator)
    around = torch.full((outputs, inputs + 40), math.nan)
    with poisoned_memory():
        torch.ops.umda_fast.linear_weight_gradient(d_out, x, around[:, 20 : inputs + 20])
    exact = d_out.double().T @ x.double()
    assert_close(f"{batch} x {outputs} x {inputs}", around[:, 20 : inputs + 20], exact, d_out.T @ x, 2)
    assert around[:, :20].isnan().all()
    assert around[:, inputs + 20 :].isnan().all()


#: Every remainder of strips, panels, blocks and runs of terms; no term at all.
LAYERS = [(1, 1, 1), (130, 103, 337), (128, 96, 256), (5, 13, 16), (300, 7, 70), (0, 9, 20), (3, 0, 4), (513, 200, 600)]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_weight_gradient(layer: tuple[int, int, int]) -> None:
    check_weight_gradient(*layer)


def test_weight_gradient_of_a_large_batch_is_as_exact_as_a_library() -> None:
    check_weight_gradient(30_000, 12, 20)


def test_weight_gradient_same_bits_for_any_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(6)
    d_out, x = torch.randn(300, 400, generator=generator), torch.randn(300, 700, generator=generator)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(torch.empty(400, 700))
            torch.ops.umda_fast.linear_weight_gradient(d_out, x, results[-1])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def check_instruction_set() -> None:
    for layer in LAYERS:
        check_weight_gradient(*layer)
    for dtype in DTYPES:
        check(5, 4_321, dtype, 6, [1, 100])
    check(2, 40_000, torch.float32, 7, [])


@pytest.mark.parametrize("instruction_set", FORCED_SETS)
def test_instruction_sets(instruction_set: str) -> None:
    run_on(instruction_set, __name__, "check_instruction_set")
