import pytest
import torch
from torch import nn

from tests.model.conftest import TASKS, VIEWS, make_batch, make_config, total_loss
from umda_fast import UMDA
from umda_fast.model.chunked import forward_chunked
from umda_fast.model.linear_path import LENGTH


def with_weights(**options):
    """A model whose path has weights, standardised by made-up moments."""
    torch.manual_seed(0)
    model = UMDA(make_config(linear_path=True, **options)).eval()
    with torch.no_grad():
        for linear in model.linear.maps:
            linear.weight.normal_()
        for encoder in model.encoders.encoders:
            encoder.set_scaling(torch.randn(encoder.shift.shape), torch.rand(encoder.scale.shape) + 0.5)
    return model


def path_logits(model, batch):
    """What the path adds, by the formula, bag after bag."""
    result = {task.name: torch.zeros(len(batch.ptr) - 1, task.outputs) for task in TASKS}
    for v, view in enumerate(VIEWS):
        encoder = model.encoders.encoders[v]
        unit = (batch.views[view.name] - encoder.shift) / encoder.scale
        if model.config.whole_inputs:
            unit = torch.where(unit.abs() > 4, unit.sign() * (4 + torch.asinh(unit.abs() - 4)), unit)
        scores = (LENGTH * unit / unit.norm(dim=1, keepdim=True)) @ model.linear.maps[v].weight.T
        for b in range(len(batch.ptr) - 1):
            rows = slice(int(batch.ptr[b]), int(batch.ptr[b + 1]))
            there = scores[rows][batch.mask[rows, v]]
            if len(there):
                offset = 0
                for task in TASKS:
                    result[task.name][b] += there.mean(0)[offset : offset + task.outputs]
                    offset += task.outputs
    return result


@pytest.mark.parametrize("whole_inputs", [True, False])
def test_is_the_formula(whole_inputs):
    model, batch = with_weights(whole_inputs=whole_inputs), make_batch()
    for view in VIEWS:
        batch.views[view.name][::3, 0] = 30.0  # an outlier
        batch.views[view.name][~batch.mask[:, VIEWS.index(view)]] = torch.nan
    with torch.no_grad():
        out = model(**batch.inputs())
        path, model.linear = model.linear, None
        without = model(**batch.inputs())
        model.linear = path
    for name, expected in path_logits(model, batch).items():
        torch.testing.assert_close(out.logits[name] - without.logits[name], expected, rtol=1e-4, atol=1e-5)


def test_begins_at_nothing_and_learns():
    torch.manual_seed(0)
    model, batch = UMDA(make_config(linear_path=True)), make_batch()
    assert all((linear.weight == 0).all() for linear in model.linear.maps)
    for view in VIEWS:
        batch.views[view.name][~batch.mask[:, VIEWS.index(view)]] = torch.nan
    total_loss(model, batch).backward()
    for linear in model.linear.maps:
        assert linear.weight.grad.isfinite().all()
        assert linear.weight.grad.abs().sum() > 0
    owned = {id(parameter) for parameter in model.task_parameters()}
    assert {id(linear.weight) for linear in model.linear.maps} <= owned


def test_the_penalty_is_the_ridge():
    model, batch = with_weights(), make_batch()
    expected = sum(float(linear.weight.detach().square().sum()) for linear in model.linear.maps)
    assert float(model(**batch.inputs()).penalties["linear"].detach()) == pytest.approx(expected)
    assert float(UMDA(make_config())(**batch.inputs()).penalties["linear"].detach()) == 0.0


def test_in_chunks_too():
    model, batch = with_weights(), make_batch((40, 0, 1, 23))
    with torch.no_grad():
        whole = model(**batch.inputs())
        chunked = forward_chunked(model, **batch.inputs(), chunk=16)
    for name, logits in whole.logits.items():
        torch.testing.assert_close(chunked.logits[name], logits, rtol=1e-4, atol=1e-5)


def test_is_kept_with_the_model(tmp_path):
    model, batch = with_weights(), make_batch()
    model.save_pretrained(tmp_path)
    again = UMDA.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch.inputs()).logits, model(**batch.inputs()).logits, rtol=0, atol=0)


def test_views_with_encoders_of_the_user_are_left_out():
    torch.manual_seed(0)
    batch = make_batch()
    model = UMDA(make_config(linear_path=True), {VIEWS[0].name: nn.Linear(VIEWS[0].width, 16)}).eval()
    total_loss(model, batch).backward()
    first, *others = model.linear.maps
    assert (first.weight.grad == 0).all()
    assert all(linear.weight.grad.abs().sum() > 0 for linear in others)


def test_the_option_is_checked():
    with pytest.raises(TypeError, match="linear_path: expected a bool"):
        make_config(linear_path=1)
    assert UMDA(make_config()).linear is None
