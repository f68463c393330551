"""What every view alone says for every task: pools, logits, losses, and bags cut into pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.model.conftest import TASKS, VIEWS, Batch, make_batch, make_config, total_loss
from umda_fast import UMDA, TaskSpec
from umda_fast.model import task_losses, view_losses
from umda_fast.model.adapters import transfer
from umda_fast.model.chunked import forward_chunked
from umda_fast.model.readout import Readout


def with_heads(**options: Any) -> UMDA:
    """A model whose views are not all heard alike."""
    torch.manual_seed(0)
    model = UMDA(make_config(view_heads=True, **options)).double().eval()
    with torch.no_grad():
        for gate in (model.view_heads.gate, model.view_heads.gate_bias):
            assert not gate.any()
            gate.copy_(torch.randn(gate.shape, generator=torch.Generator().manual_seed(1)))
    return model


def without(model: UMDA, batch: Batch) -> dict[str, Tensor]:
    """Logits of the same model without its view heads."""
    heads, model.view_heads = model.view_heads, None
    try:
        return model(**batch.inputs()).logits
    finally:
        model.view_heads = heads


def test_is_the_formula() -> None:
    """Bag after bag, view after view, task after task."""
    model, batch = with_heads(), make_batch().double()
    out, fused, x = model(**batch.inputs()), without(model, batch), model.encoders(batch.views, batch.mask)
    heads = model.view_heads
    hidden = torch.tanh(model.pooling.value(x)) * torch.sigmoid(model.pooling.gate(x))
    for t, task in enumerate(TASKS):
        weight, bias = heads.get_parameter(f"weight_{t}"), heads.get_parameter(f"bias_{t}")
        for b in range(5):
            rows = torch.arange(int(batch.ptr[b]), int(batch.ptr[b + 1]))
            said = []
            for v in range(len(VIEWS)):
                own = rows[batch.mask[rows, v]]
                assert out.view_present[b, v] == (len(own) > 0)
                if not len(own):
                    assert (out.view_logits[task.name][b, v] == 0).all()
                    continue
                share = (hidden[own, v] @ heads.score[v, t]).softmax(0)
                alone = weight[v] @ F.layer_norm(share @ x[own, v], (16,)) + bias[v]
                torch.testing.assert_close(out.view_logits[task.name][b, v], alone, rtol=1e-9, atol=1e-11)
                heard = 2 / (1 + torch.exp(-heads.gate[t, v] @ out.branches[b, t] - heads.gate_bias[t, v]))
                said.append(heard * alone)
            total = torch.stack(said).sum(0) if said else torch.zeros(task.outputs, dtype=torch.float64)
            if said and task.kind == "regression":
                total = total / len(said)
            torch.testing.assert_close(out.logits[task.name][b], fused[task.name][b] + total, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["is it", "type", "a.b", "parameters"])
@pytest.mark.parametrize("masked", [False, True])
def test_losses_are_the_formula(name: str, masked: bool) -> None:
    torch.manual_seed(0)
    weights = {"is it": (1.0, 3.0), "type": (1.0, 2.0, 0.5), "a.b": (1.0, 2.0, 3.0, 4.0), "parameters": None}
    (task,) = (task for task in TASKS if task.name == name)
    task = TaskSpec(**{**task.__dict__, "class_weights": weights[name]})
    batch = make_batch().double()
    logits = torch.randn(5, 3, task.outputs, dtype=torch.float64)
    present = torch.tensor([[1, 1, 1], [0, 0, 0], [0, 1, 0], [1, 0, 1], [1, 1, 1]]).bool()
    keep = torch.tensor([True, True, False, True, True])
    found = view_losses([task], {name: logits}, present, batch.labels, {name: keep} if masked else None)[name]
    total = weight = 0.0
    for b in range(5):
        if masked and not keep[b]:
            continue
        label = batch.labels[name][b : b + 1]
        own = float(weights[name][int(label)]) if name in ("is it", "type") else 1.0
        each = [
            float(task_losses([task], {name: logits[b, v][None]}, {name: label})[name])
            for v in range(3)
            if present[b, v]
        ]
        total += own * (sum(each) / len(each) if each else 0.0)
        weight += own
    assert float(found) == pytest.approx(total / weight, rel=1e-12)


def test_at_first_all_views_are_heard_alike() -> None:
    torch.manual_seed(0)
    model, batch = UMDA(make_config(view_heads=True)).double().eval(), make_batch().double()
    out, fused = model(**batch.inputs()), without(model, batch)
    torch.testing.assert_close(out.logits["type"], fused["type"] + out.view_logits["type"].sum(1))


def test_losses_where_all_views_agree_are_those_of_the_task() -> None:
    batch = make_batch((5, 2, 1)).double()
    logits = {task.name: torch.randn(3, task.outputs, dtype=torch.float64) for task in TASKS}
    every = {name: x[:, None].expand(-1, 3, -1) for name, x in logits.items()}
    whole = task_losses(TASKS, logits, batch.labels)
    alone = view_losses(TASKS, every, torch.ones(3, 3, dtype=torch.bool), batch.labels)
    for name, loss in whole.items():
        torch.testing.assert_close(alone[name], loss, rtol=1e-12, atol=0)


def test_losses_name_what_is_wrong() -> None:
    batch, present = make_batch(), torch.ones(5, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"task 'type': logits: expected shape \[B, 3, 3\], got \[5, 2, 3\]"):
        view_losses(TASKS[1:2], {"type": torch.zeros(5, 2, 3)}, present, batch.labels)
    with pytest.raises(ValueError, match="task 'type': expected logits, got none"):
        view_losses(TASKS[1:2], {}, present, batch.labels)


def test_what_is_missing_does_not_leak() -> None:
    model, clean = with_heads(), make_batch().double()
    poisoned = make_batch().double()
    for v, view in enumerate(VIEWS):
        poisoned.views[view.name][~poisoned.mask[:, v]] = torch.nan

    def run(batch: Batch) -> list[Tensor]:
        model.zero_grad()
        out = model(**batch.inputs())
        losses = view_losses(TASKS, out.view_logits, out.view_present, batch.labels)
        (torch.stack(list(losses.values())).sum() + total_loss(model, batch)).backward()
        return [*out.view_logits.values(), *(p.grad.clone() for p in model.parameters())]

    for one, other in zip(run(clean), run(poisoned), strict=True):
        assert torch.equal(one, other)


def test_every_weight_learns_and_belongs_to_the_tasks() -> None:
    model, batch = with_heads(), make_batch().double()
    total_loss(model, batch).backward()
    owned = {id(p) for p in model.task_parameters()}
    for name, parameter in model.view_heads.named_parameters():
        assert parameter.grad.any(), name
        assert id(parameter) in owned, name
    biases = [p for name, p in model.view_heads.named_parameters() if name.startswith("bias")]
    assert len(biases) == len(TASKS)


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_bags_cut_into_pieces(chunk: int) -> None:
    """Bags of one, of none, and cut anywhere: the same logits and, with gradients, the same gradients."""
    sizes = (0, 40, 0, 0, 1, 23, 4, 0)
    model, batch = with_heads(), make_batch(sizes).double()
    whole = model(**batch.inputs())
    with torch.no_grad():
        served = forward_chunked(model, **batch.inputs(), chunk=chunk)
    pieces = with_heads(chunk=chunk)
    cut = pieces(**batch.inputs())
    assert torch.equal(served.view_present, whole.view_present)
    for name, logits in whole.logits.items():
        for other in (served, cut):
            torch.testing.assert_close(other.logits[name], logits, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(other.view_logits[name], whole.view_logits[name], rtol=1e-9, atol=1e-11)
    total_loss(model, batch).backward()
    total_loss(pieces, batch).backward()
    for (name, one), other in zip(model.named_parameters(), pieces.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_wrong_offsets_are_named_before_bags_are_cut() -> None:
    batch = make_batch((20, 3)).double()
    with pytest.raises(ValueError, match="ptr must end at N = 23, got 22"):
        with_heads(chunk=4)(batch.views, torch.tensor([0, 20, 22]), batch.mask)


def test_bfloat16_autocast() -> None:
    model, batch = with_heads().float(), make_batch()
    exact = model(**batch.inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**batch.inputs())
        loss = total_loss(model, batch)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for name, logits in exact.view_logits.items():
        assert (out.view_logits[name].float() - logits).abs().max() < 0.05


def test_new_tasks_on_the_trunk() -> None:
    model = with_heads().float()
    other = transfer(model, [TaskSpec("new", "multiclass", 5)])
    assert other.view_heads.score.shape == (3, 1, 8)
    assert torch.equal(other.pooling.value.weight, model.pooling.value.weight)
    assert other(**make_batch().inputs()).view_logits["new"].shape == (5, 3, 5)


def test_new_heads_read_the_views_too(tmp_path: Path) -> None:
    """The linear heads of a readout can give again what the trunk's heads of single views say."""
    trunk, batch = with_heads().float(), make_batch()
    model = Readout(trunk, [TaskSpec("new", "binary")]).eval()
    width, tasks = 16, len(TASKS)
    weight, heads = model.heads[0].weight, trunk.view_heads
    assert weight.shape == (1, (tasks + 3) * width)
    out = trunk(**batch.inputs())
    with torch.no_grad():
        weight[0, tasks * width + width : tasks * width + 2 * width] = heads.weight_0[1, 0]
        found = model(**batch.inputs()).logits["new"][:, 0]
    expected = out.view_features.mean(2)[:, 1] @ heads.weight_0[1, 0]
    torch.testing.assert_close(found, expected)
    assert (out.view_features[~out.view_present] == 0).all()
    assert out.view_features.shape == (5, 3, tasks, width)
    model.save_pretrained(tmp_path)
    again = Readout.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**batch.inputs()).logits["new"][:, 0], found, rtol=0, atol=0)


def test_compiles_in_one_graph() -> None:
    torch.manual_seed(0)
    model, batch = UMDA(make_config(view_heads=True, dropout=0.0, layers=1, graph_layers=1)), make_batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, wanted = compiled(**batch.inputs()), model(**batch.inputs())
    for name, logits in wanted.logits.items():
        torch.testing.assert_close(got.logits[name], logits)
        torch.testing.assert_close(got.view_logits[name], wanted.view_logits[name])
