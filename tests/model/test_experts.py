"""Expert gates in place of the private paths: MMoE and PLE."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.model.conftest import Batch, make_config, total_loss
from umda_fast import UMDA
from umda_fast.model import ExpertGates


@pytest.mark.parametrize(("shared", "private"), [(3, 0), (2, 2), (1, 1)])
def test_a_branch_is_the_gated_sum_of_its_experts(shared: int, private: int) -> None:
    gates = ExpertGates(6, tasks=3, shared=shared, private=private).double()
    torch.nn.init.normal_(gates.gate)
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    out = gates(x)
    for b in range(4):
        for t in range(3):
            row = x[b, t]
            banks = [gates.shared, *([gates.private[t]] if private else [])]
            experts = [
                F.gelu(row @ weight + bias)
                for bank in banks
                for weight, bias in zip(bank.weight, bank.bias, strict=True)
            ]
            share = (row @ gates.gate[t]).softmax(0)
            expected = sum(s * e for s, e in zip(share, experts, strict=True))
            torch.testing.assert_close(out[b, t], expected)


def test_a_private_expert_serves_its_own_task_only() -> None:
    gates = ExpertGates(5, tasks=3, shared=2, private=1)
    gates(torch.randn(4, 3, 5))[:, 1].sum().backward()
    assert gates.private[0].weight.grad.count_nonzero() == 0
    assert gates.private[1].weight.grad.count_nonzero() > 0
    assert gates.shared.weight.grad.count_nonzero() > 0


def test_gates_start_equal_and_sum_to_one() -> None:
    gates = ExpertGates(5, tasks=2, shared=3, private=1)
    share = gates.gates(torch.randn(7, 2, 5))
    torch.testing.assert_close(share, torch.full((7, 2, 4), 0.25))


@pytest.mark.parametrize("counts", [(0, 0), (0, 2), (2, -1)])
def test_impossible_numbers_of_experts(counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1 shared"):
        ExpertGates(4, 2, *counts)


@pytest.mark.parametrize("branching", ["mmoe", "ple"])
def test_the_model_trains_with_experts(branching: str, batch: Batch) -> None:
    model = UMDA(make_config(branching=branching, experts=2, private_experts=2))
    total_loss(model, batch).backward()
    gates = model.atsb.experts
    assert gates is not None
    assert len(gates.private) == (0 if branching == "mmoe" else 4)
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []
    shared = {id(parameter) for parameter in model.shared_parameters()}
    assert id(gates.shared.weight) in shared
    assert id(gates.gate) not in shared
    out = model(**batch.inputs())
    torch.testing.assert_close(out.influence, torch.eye(4))
    assert float(out.penalties["cohesion"]) == float(out.penalties["divergence"]) == 0.0


def test_unknown_branching() -> None:
    with pytest.raises(ValueError, match="branching: expected one of dual, mmoe, ple, got 'moe'"):
        make_config(branching="moe")
