"""csrc/cuda/representation_gram.cu, emulated, against the reference in float64."""

import ctypes
from ctypes import c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda_host._host import (
    STORAGE,
    Arena,
    assert_parity,
    call,
    dtype_code,
    pointer,
    repeatable,
    structure,
    workspace_size,
)
from umda_fast.parity.cases import representation_gram_case
from umda_fast.reference.representation_gram import representation_gram as reference

ORDER = ("z", "attention", "ptr", "pooled", "value", "gate", "score_weight", "value_weight", "gate_weight")


@cache
def _structure() -> Any:
    return structure(
        "RepresentationGram",
        **dict.fromkeys(("losses", "bags", "instances", "tasks", "width", "hidden"), c_int64),
        ptr=c_void_p,
        d_pooled=c_void_p,
        pooled=c_void_p,
        z=c_void_p,
        z_stride=c_int64,
        **dict.fromkeys(("attention", "value", "gate", "score_weight", "value_weight", "gate_weight"), c_void_p),
        gram=c_void_p,
        workspace=c_void_p,
        z_type=c_int,
        hidden_type=c_int,
    )


def kernel(d_pooled: list[Tensor], rest: dict[str, Tensor], max_blocks: int = 1000, order: int = 0) -> Tensor:
    """The emulated kernel."""
    arena = Arena()
    held = [arena.put(d) for d in d_pooled]
    pointers = (c_void_p * len(held))(*map(pointer, held))
    x = {name: arena.put(tensor) for name, tensor in rest.items()}
    gram = arena.empty(len(held), len(held), dtype=torch.float32)
    arguments = _structure()(
        *(len(held), len(x["ptr"]) - 1, *x["z"].shape[:1], x["attention"].shape[1], x["z"].shape[1]),
        *(x["value"].shape[1], pointer(x["ptr"]), ctypes.cast(pointers, c_void_p), pointer(x["pooled"])),
        *(pointer(x["z"]), x["z"].stride(0), pointer(x["attention"]), pointer(x["value"]), pointer(x["gate"])),
        *(pointer(x[name]) for name in ("score_weight", "value_weight", "gate_weight")),
        *(pointer(gram), None, dtype_code(x["z"].dtype), dtype_code(x["value"].dtype)),
    )
    space = arena.workspace(workspace_size("representation_gram", arguments))
    arguments.workspace = pointer(space)
    call("representation_gram", arguments, arena, max_blocks, order)
    return gram


def inputs(*shape: Any, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict[str, Tensor]]:
    found = representation_gram_case("", *shape).rounded(dtype, "cpu")
    return list(found["d_pooled"]), {name: found[name] for name in ORDER}


def check(d_pooled: list[Tensor], rest: dict[str, Tensor]) -> None:
    """Parity, and the same bits for every grid and order."""
    (gram,) = repeatable(lambda blocks, order: [kernel(d_pooled, rest, blocks, order)])
    wide = [x.double() if x.is_floating_point() else x for x in rest.values()]
    exact = reference([d.double() for d in d_pooled], *wide)
    assert_parity(gram, exact, reference(d_pooled, *rest.values()), 2, "gram")
    assert torch.equal(gram, gram.T)


@pytest.mark.parametrize(
    "shape",
    [
        ([3, 0, 40, 1, 0, 17], 59, 5, 33, 3),
        ([3, 0, 20, 1], 72, 8, 40, 8),
        ([70, 3], 1, 1, 1, 1),
        ([0, 0, 65], 5, 3, 7, 2),
        ([2] * 20, 130, 4, 9, 5),
        ([0, 0], 3, 2, 4, 1),
        ([], 3, 2, 4, 2),
    ],
    ids=str,
)
def test_shapes(shape: Any) -> None:
    check(*inputs(*shape))


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_storage(dtype: torch.dtype) -> None:
    check(*inputs([9, 0, 24], 20, 3, 12, 4, dtype=dtype))


def test_hidden_units_of_another_type() -> None:
    d_pooled, rest = inputs([9, 0, 24], 20, 3, 12, 2)
    check(d_pooled, {**rest, "value": rest["value"].half(), "gate": rest["gate"].half()})


def test_rows_apart() -> None:
    d_pooled, rest = inputs([9, 5], 20, 3, 12, 2)
    apart = torch.zeros(14, 33)
    apart[:, 3:23] = rest["z"]
    assert torch.equal(kernel(d_pooled, {**rest, "z": apart[:, 3:23]}), kernel(d_pooled, rest))


def test_more_units_than_slots() -> None:
    check(*inputs([1000, 0, 8500], 1, 1, 1, 4))


@pytest.mark.parametrize(
    "ptr", [[0, 90, 30, 200], [0, 10, 20, 30], [5, 5, 5, 5], [300, 200, 100, 0], [-7, 250, 999, 64]]
)
def test_a_ptr_that_is_wrong_hangs_nothing(ptr: list[int]) -> None:
    d_pooled, rest = inputs([60, 70, 70], 8, 2, 3, 2)
    kernel(d_pooled, {**rest, "ptr": torch.tensor(ptr)})
