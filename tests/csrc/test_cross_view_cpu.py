"""cross_view on the CPU against the reference, forward and backward."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.csrc.cpu_checks import FORCED_SETS, assert_close, poisoned_memory, run_on, threads
from umda_fast.reference.cross_view import cross_view as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OUTPUTS = ("out", "mass", "entropy")
GRADIENTS = ("dq", "dk", "dv", "d_gate", "d_bias")


class Case(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    bias: Tensor | None
    mask: Tensor | None
    d_out: Tensor
    d_mass: Tensor
    d_entropy: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.q, self.k, self.v, self.gate, self.bias, self.mask


def make_case(
    count: int, views: int, heads: int, width: int, *, masked: bool = False, biased: bool = False,
    dtype: torch.dtype = torch.float32, gate_dtype: torch.dtype | None = None, seed: int = 0,
) -> Case:  # fmt: skip
    """Slices of one packed tensor; NaN wherever a view is missing."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, v = normal(count, views, 3, heads, width).to(dtype).unbind(2)
    gate = (2 * normal(count, heads, views)).to(gate_dtype or dtype).mT
    d_out = normal(count, views, heads, width).to(dtype)
    d_mass, d_entropy = normal(count, views, views), normal(count, views, heads)
    mask = None
    if masked:
        mask = torch.rand(count, views, generator=generator) > 0.4
        mask[:, 0] |= ~mask.any(1)
        for tensor in (q, k, v, gate, d_out, d_mass, d_entropy):
            tensor[~mask] = math.nan
    bias = normal(heads, views, views) if biased else None
    return Case(q, k, v, gate, bias, mask, d_out, d_mass, d_entropy)


def run_reference(
    case: Case, dtype: torch.dtype | None, used: tuple[bool, bool, bool]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs and gradients in ``dtype``, or in the case's own."""
    leaves = [x.to(dtype or x.dtype).clone().requires_grad_() for x in (case.q, case.k, case.v, case.gate)]
    bias = None
    if case.bias is not None:
        bias = case.bias.to(dtype or case.bias.dtype).clone().requires_grad_()
    outputs = reference(*leaves, bias, case.mask)
    grads = (case.d_out, case.d_mass, case.d_entropy)
    pairs = [(o, g.nan_to_num().to(o.dtype)) for o, g, use in zip(outputs, grads, used, strict=True) if use]
    wanted = leaves if bias is None else [*leaves, bias]
    found = torch.autograd.grad(
        [o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True, materialize_grads=True
    )
    return [o.detach() for o in outputs], [*found, *([None] if bias is None else [])]


def check(case: Case, used: tuple[bool, bool, bool] = (True, True, True)) -> None:
    with poisoned_memory():
        outputs = torch.ops.umda_fast.cross_view(*case.inputs)
        grads = [g if use else None for g, use in zip(case[-3:], used, strict=True)]
        gradients = torch.ops.umda_fast.cross_view_backward(*grads, *case.inputs)
    exact, exact_gradients = run_reference(case, torch.float64, used)
    own, own_gradients = run_reference(case, None, used)
    assert outputs[0].dtype == case.q.dtype
    assert outputs[1].dtype == outputs[2].dtype == gradients[4].dtype == torch.float32
    for name, mine, right, theirs in zip(OUTPUTS, outputs, exact, own, strict=True):
        assert_close(name, mine, right, theirs, 2)
    for name, mine, right, other in zip(GRADIENTS, gradients, exact_gradients, own_gradients, strict=True):
        if right is not None and other is not None:
            assert_close(name, mine, right, other, 3)
    assert (gradients[4].diagonal(dim1=1, dim2=2) == 0).all()
    if case.mask is not None:
        for tensor in (*outputs, *gradients[:4]):
            assert (tensor[~case.mask] == 0).all()
        assert (outputs[1].mT[~case.mask] == 0).all()


@settings(max_examples=60, deadline=None)
@given(
    count=st.sampled_from([0, 1, 7, 8, 9, 37]),
    views=st.integers(1, 16),
    shape=st.sampled_from([(1, 8), (3, 59), (8, 32), (2, 256), (5, 97), (70, 8), (4, 12), (16, 16)]),
    masked=st.booleans(),
    biased=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_against_reference(
    count: int, views: int, shape: tuple[int, int], masked: bool, biased: bool, dtype: torch.dtype, seed: int
) -> None:
    check(make_case(count, views, *shape, masked=masked, biased=biased, dtype=dtype, seed=seed))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("used", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
def test_outputs_that_nobody_used(used: tuple[int, int, int], masked: bool) -> None:
    out, mass, entropy = used
    check(make_case(300, 3, 8, 32, masked=masked, biased=True), (bool(out), bool(mass), bool(entropy)))


def test_no_gradient_at_all() -> None:
    case = make_case(20, 3, 2, 16)
    gradients = torch.ops.umda_fast.cross_view_backward(None, None, None, *case.inputs)
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("views", [1, 2, 3, 6])
def test_many_partitions(views: int) -> None:
    """d_bias is summed over 20,000 instances."""
    check(make_case(20_000 // views, views, 4, 8, biased=True, masked=True, seed=views))


def test_gate_in_another_type_and_saturated() -> None:
    check(make_case(50, 3, 4, 16, dtype=torch.bfloat16, gate_dtype=torch.float32))
    case = make_case(60, 3, 4, 16, biased=True)
    case.gate[:20] *= 30
    case.gate[20:40] = torch.tensor([200.0, -200.0, 88.0])[:, None]
    case.gate[40:50] = torch.tensor([math.inf, -math.inf, 0.0])[:, None]
    check(case)


def test_large_scores() -> None:
    """Attention of 1 and 0: the entropy's gradient meets log 0."""
    case = make_case(60, 4, 2, 32, biased=True)
    case.q.mul_(100)
    check(case)


def test_strides() -> None:
    packed = make_case(40, 3, 4, 24, masked=True)
    expected = torch.ops.umda_fast.cross_view(*packed.inputs)
    gradients = torch.ops.umda_fast.cross_view_backward(*packed[-3:], *packed.inputs)
    for layout in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 2, 3), (2, 1, 0, 3)):
        back = [layout.index(d) for d in range(4)]
        moved = [x.permute(layout).contiguous().permute(back) for x in packed[:3]]
        d_out = packed.d_out.permute(layout).contiguous().permute(back)
        outputs = torch.ops.umda_fast.cross_view(*moved, *packed.inputs[3:])
        found = torch.ops.umda_fast.cross_view_backward(d_out, *packed[-2:], *moved, *packed.inputs[3:])
        for a, b in zip((*outputs, *found), (*expected, *gradients), strict=True):
            assert torch.equal(a, b)
    shared = packed.d_out[:1, :1, :1, :1].nan_to_num().expand_as(packed.d_out)  # what sum().backward() gives
    found = torch.ops.umda_fast.cross_view_backward(shared, None, None, *packed.inputs)
    again = torch.ops.umda_fast.cross_view_backward(shared.contiguous(), None, None, *packed.inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("masked", [False, True])
def test_same_bits_for_any_number_of_threads(masked: bool) -> None:
    case = make_case(3000, 3, 4, 16, masked=masked, biased=True)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            outputs = torch.ops.umda_fast.cross_view(*case.inputs)
            results.append((*outputs, *torch.ops.umda_fast.cross_view_backward(*case[-3:], *case.inputs)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_not_a_number_stays_in_its_instance() -> None:
    """Of two present views one is NaN: it reaches what reads it, and no missing row, no other instance."""
    case = make_case(30, 3, 2, 16)
    mask = torch.ones(30, 3, dtype=torch.bool)
    mask[:, 2] = False
    case.v[4, 1] = math.nan
    case.k[5, 1] = math.inf
    inputs = (*case.inputs[:5], mask)
    outputs = torch.ops.umda_fast.cross_view(*inputs)
    gradients = torch.ops.umda_fast.cross_view_backward(*case[-3:], *inputs)
    for tensor in (*outputs, *gradients[:4]):
        assert (tensor[:, 2] == 0).all()
        assert tensor[:4].isfinite().all()
        assert tensor[6:].isfinite().all()
    assert outputs[0][4, :2].isnan().all()
    assert (outputs[1][:, :, 2] == 0).all()


def test_direct_callers_are_checked() -> None:
    q, gate = torch.zeros(4, 3, 2, 8), torch.zeros(4, 3, 2)
    for arguments, message in [
        ((q[0], q, q, gate, None, None), "q must have 4 dimensions"),
        ((q, q[:3], q, gate, None, None), "k must have size 4"),
        ((q, q, q.half(), gate, None, None), "v must be Float"),
        ((q.double(), q.double(), q.double(), gate, None, None), "q must be float32"),
        ((q, q, q, gate[:, :2], None, None), "gate_logits must have size 3"),
        ((q, q, q, gate, torch.zeros(2, 3, 2), None), "bias must have size 3"),
        ((q, q, q, gate, None, torch.zeros(4, 3)), "mask must be Bool"),
        ((torch.zeros(1, 17, 1, 8),) * 3 + (torch.zeros(1, 17, 1), None, None), "1 to 16 views"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.umda_fast.cross_view(*arguments)
    with pytest.raises(RuntimeError, match="d_mass must be Float"):
        torch.ops.umda_fast.cross_view_backward(q, torch.zeros(4, 3, 3).double(), None, q, q, q, gate, None, None)


def check_instruction_set() -> None:
    for views in (1, 2, 3, 5):
        for heads, width in ((3, 59), (8, 32), (20, 8)):
            for dtype in DTYPES:
                check(make_case(33, views, heads, width, masked=views > 1, biased=True, dtype=dtype))
    test_gate_in_another_type_and_saturated()


@pytest.mark.parametrize("instruction_set", FORCED_SETS)
def test_instruction_sets(instruction_set: str) -> None:
    run_on(instruction_set, __name__, "check_instruction_set")
