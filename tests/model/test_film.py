"""Conditioning on the metadata of a bag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.conftest import Batch, make_config, total_loss
from umda_fast import UMDA
from umda_fast.model import FiLM, MetadataSpec

METADATA = (MetadataSpec("age", 60.0, 10.0), MetadataSpec("magnification", 20.0, 5.0))


def trained_film() -> FiLM:
    film = FiLM(METADATA, 6)
    torch.nn.init.normal_(film.output.weight)
    torch.nn.init.normal_(film.output.bias)
    return film


def test_untrained_it_changes_nothing() -> None:
    x = torch.randn(3, 2, 6)
    assert torch.equal(FiLM(METADATA, 6)(x, torch.tensor([[50.0, 20], [70, 40], [torch.nan, 10]])), x)


def test_scale_and_shift_are_those_of_the_bag() -> None:
    film, x = trained_film(), torch.randn(2, 3, 6)
    values = torch.tensor([[70.0, 15.0], [60.0, 20.0]])
    inputs = torch.tensor([[1.0, -1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])  # standardised, then: they are there
    scale, shift = film.output(torch.nn.functional.gelu(film.hidden(inputs))).chunk(2, 1)
    torch.testing.assert_close(film(x, values), x * (1 + scale[:, None]) + shift[:, None])


def test_a_missing_value_is_not_the_mean() -> None:
    """It enters as the mean, but the model is told."""
    film, x = trained_film(), torch.randn(1, 6)
    there = film(x, torch.tensor([[60.0, 20.0]]))
    missing = film(x, torch.tensor([[torch.nan, 20.0]]))
    assert missing.isfinite().all()
    assert not torch.allclose(there, missing)


def test_wrong_metadata_are_named(batch: Batch) -> None:
    model = UMDA(make_config(metadata=METADATA))
    with pytest.raises(ValueError, match=r"metadata: expected \[5, 2\], got None"):
        model(**batch.inputs())
    with pytest.raises(ValueError, match=r"metadata must have shape \[5, 2\], got \[5, 3\]"):
        model(**batch.inputs(), metadata=torch.zeros(5, 3))


class _WithMetadata:
    def __init__(self, batch: Batch, metadata: Tensor) -> None:
        self.labels, self._batch, self._metadata = batch.labels, batch, metadata

    def inputs(self) -> dict[str, Any]:
        return {**self._batch.inputs(), "metadata": self._metadata}


def test_the_model_learns_from_metadata_and_is_read_back(batch: Batch, tmp_path: Path) -> None:
    metadata = torch.tensor([[50.0, 20], [60, 20], [70, torch.nan], [80, 40], [torch.nan, torch.nan]])
    model = UMDA(make_config(metadata=METADATA, dropout=0.0))
    given: Any = _WithMetadata(batch, metadata)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # the first step moves the last layer away from zero
        optimizer.zero_grad()
        total_loss(model, given).backward()
        optimizer.step()
    assert model.film is not None
    assert model.film.hidden.weight.grad.count_nonzero() > 0
    model.save_pretrained(tmp_path)
    again = UMDA.from_pretrained(tmp_path)
    assert again.config.metadata == METADATA
    ours, theirs = model.eval()(**given.inputs()), again.eval()(**given.inputs())
    for task, logits in ours.logits.items():
        assert torch.equal(logits, theirs.logits[task])
    changed = again(**batch.inputs(), metadata=metadata + 10)
    assert not torch.allclose(changed.logits["type"], theirs.logits["type"])
