"""A trained trunk for other tasks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.model.conftest import Batch, make_config
from umda_fast import UMDA, TaskSpec
from umda_fast.model.adapters import add_adapters, merge_adapters, transfer

OTHER = (TaskSpec("new", "multiclass", 5), TaskSpec("type", "binary"))


def test_adapters_change_nothing_until_they_are_trained_and_merge_to_what_they_became() -> None:
    net = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 40), nn.Linear(40, 2))
    x = torch.randn(6, 32)
    before = net(x)
    frozen = net[0].weight.detach().clone()
    added = add_adapters(net, rank=3)
    assert torch.equal(net(x), before)
    assert {id(p) for p in net.parameters() if p.requires_grad} == {id(p) for p in added}
    assert sum(p.numel() for p in added) == 3 * (32 + 48 + 48 + 40)  # the last layer is smaller than a correction
    optimizer = torch.optim.SGD(added, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    after = net(x)
    assert not torch.allclose(after, before)
    merge_adapters(net)
    torch.testing.assert_close(net(x), after)
    assert [name for name, _ in net.named_parameters() if "parametrization" in name] == []
    assert torch.linalg.matrix_rank(net[0].weight - frozen, rtol=1e-4) == 3


def test_a_rank_is_positive() -> None:
    with pytest.raises(ValueError, match="rank: expected at least 1, got 0"):
        add_adapters(nn.Linear(3, 3), 0)


def test_transfer_keeps_the_trunk_and_nothing_else(model: UMDA, batch: Batch) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        model.encoders.encoders[0].shift.fill_(0.25)  # a statistic of the data, kept in a buffer
    other = transfer(model, OTHER).eval()
    assert other.config.tasks == OTHER
    assert torch.equal(other(**batch.inputs()).representation, model(**batch.inputs()).representation)
    for ours, theirs in zip(other.shared_parameters(), model.shared_parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()
    assert other(**batch.inputs()).logits["new"].shape == (5, 5)


def test_transfer_copies_an_encoder_of_ones_own() -> None:
    model = UMDA(make_config(), encoders={"type": nn.Linear(5, 16)})
    other = transfer(model, OTHER)
    assert torch.equal(other.encoders.encoders[1].weight, model.encoders.encoders[1].weight)
    assert other.encoders.encoders[1].weight.data_ptr() != model.encoders.encoders[1].weight.data_ptr()


def test_a_transferred_model_trains_through_adapters(model: UMDA, batch: Batch) -> None:
    other = transfer(model, OTHER)
    before = {name: value.clone() for name, value in other.named_parameters()}
    for part in (other.encoders, other.hcva, other.gmip):
        add_adapters(part, rank=1)
    optimizer = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # A moves once B has left zero
        optimizer.zero_grad()
        nn.functional.cross_entropy(other(**batch.inputs()).logits["new"], batch.labels["type"]).backward()
        optimizer.step()
    for part in (other.encoders, other.hcva, other.gmip):
        for name, adapter in part.named_parameters():
            if name.endswith(".0.write"):
                assert adapter.count_nonzero() > 0, name
    for part in (other.encoders, other.hcva, other.gmip):
        merge_adapters(part)
    moved = {name for name, value in other.named_parameters() if not torch.equal(value, before[name])}
    assert any(name.startswith("encoders.") for name in moved)
    assert "encoders.embedding" not in moved  # frozen, and no linear layer
