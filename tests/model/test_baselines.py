"""Every baseline: shapes, bags that do not see each other, missing views that do not matter, saving."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.model.conftest import TASKS, VIEWS, make_batch
from umda_fast.model import task_losses
from umda_fast.model.baselines import BASELINES, LateFusionConfig, MaxPooling, MeanPooling, TransMILConfig
from umda_fast.sgl import SelfGuided

NAMES = list(BASELINES)
TRAINED = [name for name in NAMES if name != "linear"]  # which is fitted, and has nothing that tasks share
SIZES = (5, 0, 1, 7, 4)


def make(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    kind = BASELINES[name]
    return kind(kind.config_class(VIEWS, TASKS, width=16, **options)).eval()


@pytest.mark.parametrize("name", NAMES)
def test_logits_attention_and_gradients(name: str) -> None:
    model, batch = make(name), make_batch(SIZES)
    out = model(**batch.inputs())
    assert {task: tuple(x.shape) for task, x in out.logits.items()} == {t.name: (5, t.outputs) for t in TASKS}
    assert out.attention.shape == (17, 4)
    assert out.attention_entropy.shape == (5, 4)
    sums = torch.stack([part.sum(0) for part in out.attention.split(SIZES)])
    full = torch.tensor(SIZES) > 0
    torch.testing.assert_close(sums[full], torch.ones(4, 4))
    assert out.attention_entropy[~full].abs().max() == 0
    sum(task_losses(TASKS, out.logits, batch.labels).values()).backward()  # type: ignore[union-attr]
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.isfinite().all()), key


@pytest.mark.parametrize("name", NAMES)
def test_a_bag_sees_itself_alone(name: str) -> None:
    model, batch = make(name), make_batch(SIZES)
    together = model(**batch.inputs())
    rows = slice(int(batch.ptr[3]), int(batch.ptr[4]))
    alone = model(
        {view: x[rows] for view, x in batch.views.items()}, torch.tensor([0, 7]), mask=batch.mask[rows]
    )
    for task, logits in alone.logits.items():
        torch.testing.assert_close(logits[0], together.logits[task][3])
    torch.testing.assert_close(alone.attention, together.attention[rows])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_is_not_read(name: str) -> None:
    model, batch = make(name), make_batch(SIZES)
    before = model(**batch.inputs())
    for column, view in enumerate(VIEWS):
        batch.views[view.name][~batch.mask[:, column]] = torch.nan
    after = model(**batch.inputs())
    for task, logits in before.logits.items():
        torch.testing.assert_close(after.logits[task], logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_order_within_a_bag_does_not_matter(name: str) -> None:
    model, batch = make(name), make_batch((6,))
    before = model(**batch.inputs())
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    views = {view: x[order] for view, x in batch.views.items()}
    after = model(views, batch.ptr, mask=batch.mask[order])
    for task, logits in before.logits.items():
        torch.testing.assert_close(after.logits[task], logits)
    torch.testing.assert_close(after.attention, before.attention[order])


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_read_back(name: str, tmp_path: Path) -> None:
    model, batch = make(name), make_batch(SIZES)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config == model.config
    for task, logits in model(**batch.inputs()).logits.items():
        assert torch.equal(again(**batch.inputs()).logits[task], logits)
    other = BASELINES["ple" if name != "ple" else "mmoe"]
    with pytest.raises(ValueError, match=f"expected {other.architecture}, got '{name}'"):
        other.from_pretrained(tmp_path)


def test_comes_back_in_the_dtype_it_had(tmp_path: Path) -> None:
    make("gated_attention").double().save_pretrained(tmp_path)
    again = BASELINES["gated_attention"].from_pretrained(tmp_path)
    assert {value.dtype for value in again.state_dict().values()} == {torch.float64}


@pytest.mark.parametrize("scope", ["shared_parameters", "last_shared_layer", "representation"])
@pytest.mark.parametrize("name", TRAINED)
def test_every_balancer_can_guide_it(name: str, scope: Any) -> None:
    model, batch = make(name), make_batch(SIZES)
    shared, own = model.shared_parameters(), model.task_parameters()
    assert {id(p) for p in shared} | {id(p) for p in own} == {id(p) for p in model.parameters()}
    assert not {id(p) for p in shared} & {id(p) for p in own}
    sgl = SelfGuided(
        shared,
        [task.name for task in TASKS],
        task_parameters=own,
        scope=scope,
        last_shared_layer=model.last_shared_layer() if scope == "last_shared_layer" else (),
    )
    out = model(**batch.inputs())
    step = sgl.backward(task_losses(TASKS, out.logits, batch.labels), representation=out.representation)
    assert bool((step.norms > 0).all())  # every task's gradient is there
    assert all(p.grad is not None for p in model.parameters())


def test_means_and_maxima_are_those() -> None:
    z, ptr = torch.randn(7, 16), torch.tensor([0, 3, 3, 7])
    mean, largest = make("mean_pooling").pool(z, ptr), make("max_pooling").pool(z, ptr)
    torch.testing.assert_close(mean.vectors[0, 0], z[:3].mean(0))
    torch.testing.assert_close(mean.attention[:3, 0], torch.full((3,), 1 / 3))
    torch.testing.assert_close(mean.entropy[2, 0], torch.tensor(4.0).log())
    assert torch.equal(largest.vectors[2, 0], z[3:].amax(0))
    assert largest.vectors[1].abs().max() == 0
    held = (z[3:] == z[3:].amax(0)).float().mean(1)
    torch.testing.assert_close(largest.attention[3:, 0], held)
    assert isinstance(make("mean_pooling"), MeanPooling)
    assert isinstance(make("max_pooling"), MaxPooling)


def test_one_view_by_name_reads_no_other() -> None:
    model, batch = make("gated_attention", view="type"), make_batch(SIZES)
    before = model(**batch.inputs()).logits["type"]
    batch.views["forward"] += 1.0
    assert torch.equal(model(**batch.inputs()).logits["type"], before)
    batch.views["type"] += torch.randn(17, 5)
    assert not torch.equal(model(**batch.inputs()).logits["type"], before)


def test_late_fusion_averages_over_the_views_a_bag_has() -> None:
    model, batch = make("late_fusion"), make_batch((4, 3))
    batch.mask[:] = True
    batch.mask[:4, 1:] = False  # the first bag has the first view only
    logits = model(**batch.inputs()).logits["is it"]
    alone = zip(VIEWS, model.models, strict=True)
    parts = [one({view.name: batch.views[view.name]}, batch.ptr).logits["is it"] for view, one in alone]
    torch.testing.assert_close(logits[0], parts[0][0])
    torch.testing.assert_close(logits[1], torch.stack(parts)[:, 1].mean(0))


def test_the_class_token_alone_answers_for_an_empty_bag() -> None:
    model = make("transmil", layers=3)
    out = model({v.name: torch.zeros(0, v.width) for v in VIEWS}, torch.tensor([0, 0]))
    assert all(bool(x.isfinite().all()) for x in out.logits.values())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mean_pooling", {"view": "b"}, "view: expected one of"),
        ("gated_attention", {"hidden": 0}, "hidden: expected at least 1, got 0"),
        ("mmoe", {"experts": 0}, "experts: expected at least 1"),
        ("max_pooling", {"dropout": 1.0}, "dropout"),
    ],
)
def test_wrong_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name, **options)


def test_options_of_one_architecture_only() -> None:
    with pytest.raises(ValueError, match="heads: expected a divisor of width = 16, got 3"):
        TransMILConfig(VIEWS, TASKS, width=16, heads=3)
    with pytest.raises(ValueError, match="late fusion takes all views"):
        LateFusionConfig(VIEWS, TASKS, view="type")
    assert isinstance(make("ple").experts.private, nn.ModuleList)
    assert len(make("ple").experts.private) == 4
    assert len(make("mmoe").experts.private) == 0
