"""The whole model: what it may depend on, what it must not, dtypes, errors, files."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.model.conftest import MORE, TASKS, VIEWS, Batch, make_batch, make_config, total_loss
from umda_fast import UMDA, TaskSpec, UMDAConfig, ViewSpec, use_backend
from umda_fast.model import UMDAOutput
from umda_fast.model.config import BEFORE_2

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "mean messages": {"message": "mean"},
    "no messages": {"message": "none"},
    "symmetric": {"symmetrize": True},
    "no hcva": {"hcva": False},
    "no graph": {"graph": False},
    "no private paths": {"private": False},
    "bare": {"hcva": False, "graph": False, "private": False},
    "more": MORE,
    "more, one view": {**MORE, "views": VIEWS[:1]},
    "one view": {"views": VIEWS[:1]},
    "one task": {"tasks": TASKS[:1]},
    "before": BEFORE_2,
    "before, mean messages": {**BEFORE_2, "message": "mean"},
    "before, bare": {**BEFORE_2, "hcva": False, "graph": False, "private": False},
    "before, one view": {**BEFORE_2, "views": VIEWS[:1]},
}


def tensors(out: UMDAOutput) -> dict[str, Tensor]:
    found = {f"logits {name}": x for name, x in out.logits.items()}
    found.update({f"penalty {name}": x for name, x in out.penalties.items()})
    names = ("attention", "attention_entropy", "view_mass", "view_weights", "influence", "representation")
    return found | {name: getattr(out, name) for name in (*names, "view_consistency", "branches")}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """float64: two orders of the same sums."""
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_gradients(variant: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = make_config(**VARIANTS[variant])
    batch = make_batch(views=config.views)
    if dtype == torch.float64:
        batch = batch.double()
    model = UMDA(config).to(dtype)
    out = model(**batch.inputs())
    n, bags, views, tasks = 17, 5, len(config.views), len(config.tasks)
    shapes = {name: tuple(x.shape) for name, x in tensors(out).items() if " " not in name}
    assert shapes == {
        "attention": (n, tasks),
        "attention_entropy": (bags, tasks),
        "view_mass": (n, views, views),
        "view_weights": (n, views),
        "influence": (tasks, tasks),
        "representation": (n, 16),
        "view_consistency": (),
        "branches": (bags, tasks, 16),
    }
    assert {name: x.shape for name, x in out.logits.items()} == {t.name: (bags, t.outputs) for t in config.tasks}
    assert list(out.penalties) == [
        "entropy",
        "consistency",
        "dispersion",
        "smoothness",
        "diversity",
        "divergence",
        "cohesion",
        "linear",
    ]
    assert all(x.dtype == dtype and x.isfinite().all() for x in tensors(out).values())
    ones = torch.ones(n, dtype=dtype)
    torch.testing.assert_close(out.view_weights.sum(1), ones)
    torch.testing.assert_close(out.view_mass.sum(2), batch.mask.to(dtype))
    sums = torch.segment_reduce(out.attention.detach(), "sum", lengths=batch.ptr.diff(), axis=0)
    torch.testing.assert_close(sums, (batch.ptr.diff() > 0).to(dtype)[:, None].expand(-1, tasks))
    torch.testing.assert_close(out.influence.sum(1), torch.ones(tasks, dtype=dtype))

    total_loss(model, batch).backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    if views == 1:  # nothing to compare with, nothing to listen to
        assert all(
            any(part in name for part in ("qkv", "gate", "bias", "consistency", "fusion", "attention_norm"))
            for name in unused
        ), unused
    elif variant == "one task":
        assert unused == {"atsb.task_embedding"}
    elif variant == "no messages":
        assert unused == set()
    else:
        assert unused == set()


def test_the_first_step_opens_what_begins_at_zero() -> None:
    """As `UMDA` is made by default: at first all parameters have a gradient, if of zeros (none may be missing, or
    several processes would wait for it); after one step there is none that does not learn."""
    torch.manual_seed(0)
    model, batch = UMDA(make_config(layer_scale=UMDAConfig.layer_scale)), make_batch()
    closed = {"attention_gain", "ffn_gain", "gain"}
    opened = {name for name, p in model.named_parameters() if name.rsplit(".", 1)[1] in closed}
    assert len(opened) == 2 * 2 + 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(2):
        optimizer.zero_grad()
        total_loss(model, batch).backward()
        waiting = {name for name, p in model.named_parameters() if not p.grad.any()}
        assert not waiting & opened
        assert bool(waiting) == (step == 0), waiting
        optimizer.step()


def permuted_instances(batch: Batch) -> tuple[Batch, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ptr = batch.ptr.tolist()
    order = torch.cat([a + torch.randperm(b - a, generator=generator) for a, b in pairwise(ptr)])
    views = {name: x[order] for name, x in batch.views.items()}
    return Batch(views, batch.ptr, batch.mask[order], batch.labels), order


def test_order_of_instances(model: UMDA, batch: Batch) -> None:
    model, batch = model.double(), batch.double()
    wanted = tensors(model(**batch.inputs()))
    moved, order = permuted_instances(batch)
    for name in ("attention", "view_mass", "view_weights", "representation"):
        wanted[name] = wanted[name][order]
    assert_same(tensors(model(**moved.inputs())), wanted)


def test_order_of_bags(model: UMDA, batch: Batch) -> None:
    model, batch = model.double(), batch.double()
    wanted = tensors(model(**batch.inputs()))
    bags = [3, 1, 4, 0, 2]
    ptr = batch.ptr.tolist()
    order = torch.cat([torch.arange(ptr[b], ptr[b + 1]) for b in bags])
    new_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), batch.ptr.diff()[bags].cumsum(0)])
    views = {name: x[order] for name, x in batch.views.items()}
    for name in ("attention", "view_mass", "view_weights", "representation"):
        wanted[name] = wanted[name][order]
    for name in ("attention_entropy", "branches", *(n for n in wanted if n.startswith("logits"))):
        wanted[name] = wanted[name][bags]
    assert_same(tensors(model(views, new_ptr, batch.mask[order])), wanted)


def test_order_of_views(model: UMDA, batch: Batch) -> None:
    model, batch = model.double(), batch.double()
    order = [2, 0, 1]
    other = UMDA(replace(model.config, views=tuple(VIEWS[v] for v in order))).double().eval()
    state = model.state_dict()
    renamed = {}
    for name, value in state.items():
        if name.startswith("encoders.encoders."):
            position, rest = name.removeprefix("encoders.encoders.").split(".", 1)
            name = f"encoders.encoders.{order.index(int(position))}.{rest}"
        elif name == "encoders.embedding":
            value = value[order]
        elif name.endswith("influence_bias"):
            value = value[:, order][:, :, order]
        elif name.startswith("view_heads.gate"):
            value = value[:, order]
        elif name.startswith("view_heads."):
            value = value[order]
        renamed[name] = value
    other.load_state_dict(renamed)
    wanted = tensors(model(**batch.inputs()))
    wanted["view_mass"] = wanted["view_mass"][:, order][:, :, order]
    wanted["view_weights"] = wanted["view_weights"][:, order]
    assert_same(tensors(other(batch.views, batch.ptr, batch.mask[:, order])), wanted)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_missing_views_do_not_leak(model: UMDA, batch: Batch, backend: str) -> None:
    def run() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model.zero_grad()
        with use_backend(backend):
            out = tensors(model(**batch.inputs()))
            total_loss(model, batch).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {name: x.detach() for name, x in out.items()}, gradients

    with torch.no_grad():  # influence_bias starts at 0
        for name, parameter in model.named_parameters():
            if name.endswith("influence_bias"):
                parameter.normal_()
    clean = run()
    for position, view in enumerate(VIEWS):
        features = batch.views[view.name].clone()
        features[~batch.mask[:, position]] = float("nan")
        batch.views[view.name] = features
    poisoned = run()
    for before, after in zip(clean, poisoned, strict=True):
        for name, value in before.items():
            torch.testing.assert_close(after[name], value, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_absent_mask_is_a_full_mask(model: UMDA, batch: Batch) -> None:
    model, batch = model.double(), batch.double()
    everything = torch.ones_like(batch.mask)
    assert_same(tensors(model(batch.views, batch.ptr)), tensors(model(batch.views, batch.ptr, everything)))


def test_instances_of_other_bags_do_not_matter(model: UMDA) -> None:
    one, two = make_batch((6, 4), seed=1).double(), make_batch((6, 4), seed=1).double()
    for features in two.views.values():
        features[6:] = torch.randn_like(features[6:])
    model = model.double()
    first, second = (model(**b.inputs()) for b in (one, two))
    for name in first.logits:
        torch.testing.assert_close(first.logits[name][0], second.logits[name][0], rtol=1e-12, atol=1e-13)
        assert not torch.allclose(first.logits[name][1], second.logits[name][1], rtol=1e-6)


def test_float32_agrees_with_float64(model: UMDA) -> None:
    """Native kernels lose at most twice what plain PyTorch in float32 loses, plus an ulp or two of the scale."""
    batch = make_batch((20, 0, 1, 40, 33), seed=3)
    exact = copy.deepcopy(model).double()
    wanted = tensors(exact(**batch.double().inputs()))
    with use_backend("reference"):
        plain = tensors(model(**batch.inputs()))
    native = tensors(model(**batch.inputs()))
    for name, value in wanted.items():
        allowed = 2 * (plain[name] - value).abs().max() + 4 * torch.finfo(torch.float32).eps * value.abs().max()
        assert (native[name] - value).abs().max() <= allowed, name
        assert (plain[name] - value).abs().max() <= 1e-3 * (1 + value.abs().max()), name


def test_bfloat16_autocast(model: UMDA, batch: Batch) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**batch.inputs())
        loss = total_loss(model, batch)
    loss.backward()
    assert all(x.isfinite().all() for x in tensors(out).values())
    assert all(x.dtype == torch.float32 for x in out.penalties.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert abs(float(loss.detach()) - float(total_loss(model, batch).detach())) < 0.05


def test_empty_batch_of_instances(model: UMDA) -> None:
    batch = make_batch((0, 0))
    out = model(**batch.inputs())
    assert {name: x.shape[0] for name, x in out.logits.items()} == dict.fromkeys(out.logits, 2)
    assert all(x.isfinite().all() for x in tensors(out).values())
    total_loss(model, batch).backward()


def test_coordinates() -> None:
    torch.manual_seed(0)
    model = UMDA(make_config(coords_k=2, graph_k=1)).eval()
    batch = make_batch((6, 0, 1, 5))
    near = model(**batch.inputs(), coords=torch.randn(12, 2))
    assert near.graph is not None
    assert near.graph.indptr is not None
    assert all(2 <= degree <= 3 for degree in near.graph.indptr.diff()[:6].tolist())
    with pytest.raises(ValueError, match=r"coords: expected \[N, 2\] for coords_k = 2, got None"):
        model(**batch.inputs())
    with pytest.raises(ValueError, match=r"coords must have shape \[12, 2\], got \[3, 2\]"):
        model(**batch.inputs(), coords=torch.zeros(3, 2))


def test_representation_is_what_the_losses_pass_through(model: UMDA, batch: Batch) -> None:
    out = model(**batch.inputs())
    assert out.representation.requires_grad
    for logits in out.logits.values():
        (gradient,) = torch.autograd.grad(logits.sum(), out.representation, retain_graph=True)
        assert gradient.any()


def test_parameter_lists(model: UMDA, batch: Batch) -> None:
    shared, task = model.shared_parameters(), model.task_parameters()
    everything = {id(p) for p in model.parameters()}
    assert {id(p) for p in shared} | {id(p) for p in task} == everything
    assert len(shared) + len(task) == len(everything)
    assert {id(p) for p in model.last_shared_layer()} <= {id(p) for p in shared}
    out = model(**batch.inputs())
    for logits in out.logits.values():
        gradients = torch.autograd.grad(logits.sum(), model.last_shared_layer(), retain_graph=True)
        assert all(g.any() for g in gradients)


def test_task_cosines() -> None:
    torch.manual_seed(0)
    model = UMDA(make_config(kappa_g=3.0)).eval()
    batch = make_batch()
    cosines = -torch.ones(4, 4) + 2 * torch.eye(4)
    assert (model(**batch.inputs(), task_cosines=cosines).influence - model(**batch.inputs()).influence).abs().max() > 0
    with pytest.raises(ValueError, match=r"task_cosines must have shape \[4, 4\], got \[2, 2\]"):
        model(**batch.inputs(), task_cosines=torch.zeros(2, 2))


class Scale(nn.Module):
    """An encoder of images."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(9, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


def test_encoder_of_ones_own(tmp_path: Path, batch: Batch) -> None:
    torch.manual_seed(0)
    model = UMDA(make_config(), {"forward": Scale()}).eval()
    flat = batch.views["forward"]
    images = flat.reshape(-1, 3, 3).clone()
    images[~batch.mask[:, 2]] = float("nan")
    wanted = tensors(model(**batch.inputs()))
    batch.views["forward"] = images
    got = tensors(model(**batch.inputs()))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    total_loss(model, batch).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"encoders: .*\(forward\), got none"):
        UMDA.from_pretrained(tmp_path)
    again = UMDA.from_pretrained(tmp_path, {"forward": Scale()}).eval()
    assert torch.equal(tensors(again(**batch.inputs()))["logits type"], wanted["logits type"])

    with pytest.raises(ValueError, match=r"encoders: expected views among a\.b, type, forward, got 'x'"):
        UMDA(make_config(), {"x": Scale()})
    with pytest.raises(TypeError, match=r"encoders\['type'\]: expected a torch.nn.Module, got int"):
        UMDA(make_config(), {"type": 3})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"encoder of view 'forward': expected an output of shape \[17, 16\]"):
        UMDA(make_config(), {"forward": nn.Flatten()})(**batch.inputs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_save_and_load(tmp_path: Path, model: UMDA, dtype: torch.dtype) -> None:
    model = model.to(dtype)
    model.save_pretrained(tmp_path)
    again = UMDA.from_pretrained(tmp_path)
    assert again.config == model.config
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert state[name].dtype == dtype
        assert torch.equal(state[name], value)
    (tmp_path / "config.json").write_text('{"architecture": "other"}')
    with pytest.raises(ValueError, match="architecture: expected umda, got 'other'"):
        UMDA.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"views": {}}, ValueError, "views: expected features of view 'a.b', got none"),
        ({"type": torch.zeros(17, 4)}, ValueError, r"views\['type'\]: expected shape \[17, 5\], got \[17, 4\]"),
        ({"type": torch.zeros(16, 5)}, ValueError, r"views\['type'\]: expected shape \[17, 5\], got \[16, 5\]"),
        (
            {"type": torch.zeros(17, 5).int()},
            TypeError,
            r"views\['type'\]: expected floating features, got torch.int32",
        ),
        ({"type": [1.0]}, TypeError, r"views\['type'\]: expected a torch.Tensor, got list"),
        ({"mask": torch.ones(17, 2).bool()}, ValueError, r"mask must have shape \[17, 3\], got \[17, 2\]"),
        ({"mask": torch.ones(17, 3)}, TypeError, "mask must be bool, got float32"),
        ({"mask": torch.zeros(17, 3).bool()}, ValueError, "instance 0 has none"),
        ({"ptr": torch.tensor([0, 5, 16])}, ValueError, "ptr must end at N = 17, got 16"),
        ({"ptr": torch.tensor([0, 17]).int()}, TypeError, "ptr must be int64, got int32"),
        ({"ptr": torch.tensor([0, 9, 5, 17])}, ValueError, r"ptr must not decrease, got ptr\[1\] = 9"),
    ],
)
@pytest.mark.parametrize("hcva", [True, False])
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str, hcva: bool) -> None:
    batch = make_batch()
    arguments = batch.inputs()
    for name, value in change.items():
        if name in arguments:
            arguments[name] = value
        else:
            arguments["views"][name] = value
    with pytest.raises(error, match=message):
        UMDA(make_config(hcva=hcva, graph=hcva))(**arguments)


@pytest.mark.parametrize("options", [BEFORE_2, MORE], ids=["before version 2", "more"])
def test_compiles_in_one_graph(options: dict[str, Any], batch: Batch) -> None:
    """The native path: the reference kNN reads ptr."""
    torch.manual_seed(0)
    model = UMDA(make_config(**options, dropout=0.0, layers=1, graph_layers=1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, wanted = compiled(**batch.inputs()), model(**batch.inputs())
    for name, value in tensors(wanted).items():
        torch.testing.assert_close(tensors(got)[name], value, msg=lambda m, name=name: f"{name}: {m}")
    sum(x.sum() for x in got.logits.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in model.last_shared_layer())


def test_learns_a_marked_bag() -> None:
    torch.manual_seed(0)
    config = UMDAConfig((ViewSpec("a", 6), ViewSpec("b", 4)), (TaskSpec("t", "binary"),), width=16, heads=2, layers=1)
    sizes = torch.randint(2, 9, (64,))
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    views = {"a": torch.randn(int(ptr[-1]), 6), "b": torch.randn(int(ptr[-1]), 4)}
    labels = torch.arange(64) % 2
    views["a"][ptr[:-1][labels == 1], :3] += 3.0
    batch = Batch(views, ptr, torch.ones(int(ptr[-1]), 2, dtype=torch.bool), {"t": labels.float()})
    model = UMDA(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        total_loss(model, batch).backward()
        optimizer.step()
    predicted = model.eval()(**batch.inputs()).logits["t"][:, 0] > 0
    assert (predicted == labels.bool()).float().mean() > 0.95


def test_import_is_light() -> None:
    code = (
        "import sys, umda_fast; umda_fast.UMDA\n"
        "heavy = ['lightning_fabric', 'sklearn', 'matplotlib', 'typer', 'pydantic', 'safetensors']\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]", found
