"""A model with a linear one mixed in: its logits, its files, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from umda_fast.model import UMDA, Ensemble, Mixture, TaskSpec, UMDAConfig, ViewSpec, with_members
from umda_fast.model.baselines import Linear, LinearConfig, linear
from umda_fast.model.mixture import MIXTURE

VIEWS = (ViewSpec("a", 5), ViewSpec("b", 3))
TASKS = (TaskSpec("yes", "binary"), TaskSpec("tags", "multilabel", classes=2), TaskSpec("age", "regression"))
COEFFICIENTS = {"yes": (0.25, 3.0), "tags": (1.0, 0.0), "age": (0.0, 1.0)}


def made() -> Mixture:
    torch.manual_seed(0)
    model = UMDA(UMDAConfig(views=VIEWS, tasks=TASKS, width=16, heads=2, layers=1))
    member = Linear(LinearConfig(VIEWS, TASKS))
    for parameter in member.parameters():
        torch.nn.init.normal_(parameter)
    return Mixture(model, {"linear": member}, COEFFICIENTS).eval()


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    views = {view.name: torch.randn(20, view.width, generator=generator) for view in VIEWS}
    mask = torch.ones(20, 2, dtype=torch.bool)
    mask[3:9, 0] = False
    return {"views": views, "ptr": torch.tensor([0, 8, 8, 20]), "mask": mask}


@torch.no_grad()
def test_logits_are_sums_and_all_else_is_the_model_s() -> None:
    mixture = made()
    found, own, other = (part(**inputs()) for part in (mixture, mixture.model, mixture.members["linear"]))
    assert torch.equal(found.logits["yes"], 0.25 * own.logits["yes"] + 3.0 * other.logits["yes"])
    assert torch.equal(found.logits["tags"], own.logits["tags"])
    assert torch.equal(found.logits["age"], other.logits["age"])
    assert torch.equal(found.attention, own.attention)
    assert found.representation.shape == own.representation.shape


@torch.no_grad()
def test_what_has_no_part_need_not_be_finite() -> None:
    mixture = made()
    member = mixture.members["linear"]
    own = mixture.model(**inputs()).logits["tags"]
    member.heads[1].bias.fill_(float("inf"))
    assert torch.equal(mixture(**inputs()).logits["tags"], own)


@torch.no_grad()
def test_the_members_do_not_lose_precision_under_autocast() -> None:
    mixture = made()
    expected = mixture.members["linear"](**inputs()).logits["age"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mixture(**inputs()).logits
    assert torch.equal(found["age"], expected)
    assert all(value.dtype == torch.float32 for value in found.values())


@torch.no_grad()
def test_means_of_many_instances_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    member, compact = made().members["linear"], inputs()
    compact["views"] = {name: x.half() for name, x in compact["views"].items()}
    whole = member.bag_logits(**compact)
    monkeypatch.setattr(linear, "_ROWS", 3)
    for name, value in member.bag_logits(**compact).items():
        torch.testing.assert_close(value, whole[name])


@torch.no_grad()
def test_written_and_read(tmp_path: Path) -> None:
    mixture = made()
    mixture.config = replace(mixture.config, tasks=(TASKS[0], replace(TASKS[1], thresholds=(0.2, 0.3)), TASKS[2]))
    mixture.save_pretrained(tmp_path)
    read = with_members(UMDA.from_pretrained(tmp_path).eval(), tmp_path)
    assert isinstance(read, Mixture)
    assert read.config == mixture.config
    assert read.coefficients == mixture.coefficients
    expected = mixture(**inputs()).logits
    assert all(torch.equal(value, expected[name]) for name, value in read(**inputs()).logits.items())
    ensemble = Ensemble([read, read])
    torch.testing.assert_close(ensemble(**inputs()).logits["yes"], expected["yes"])
    (tmp_path / MIXTURE).unlink()
    alone = UMDA.from_pretrained(tmp_path)
    assert with_members(alone, tmp_path) is alone


def test_what_is_no_mixture_is_named(tmp_path: Path) -> None:
    mixture = made()
    parts = mixture.model, dict(mixture.members)
    with pytest.raises(ValueError, match="expected the tasks yes, tags, age, got yes"):
        Mixture(*parts, {"yes": (1.0, 0.0)})
    for wrong in ((1.0,), (1.0, float("nan")), (0.0, 0.0)):
        with pytest.raises(ValueError, match="coefficients: age: expected 2 finite numbers, not all 0, got"):
            Mixture(*parts, {**COEFFICIENTS, "age": wrong})
    mixture.save_pretrained(tmp_path)
    content = json.loads((tmp_path / MIXTURE).read_text())
    (tmp_path / MIXTURE).write_text(json.dumps({**content, "members": {"forest": {}}}))
    with pytest.raises(ValueError, match=r"mixture.json: members: expected some of linear, got 'forest'"):
        with_members(mixture.model, tmp_path)
