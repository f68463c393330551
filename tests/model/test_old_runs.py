"""Models saved before config.json had a version: the same weights still give the same predictions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.conftest import TASKS, VIEWS, Batch, make_batch
from umda_fast import UMDA, UMDAConfig, use_backend
from umda_fast.model.config import BEFORE_2, VERSION

PLAIN: dict[str, Any] = {
    "architecture": "umda",
    "custom_encoders": [],
    "views": [{"name": view.name, "width": view.width} for view in VIEWS],
    "tasks": [
        {"name": "is it", "kind": "binary"},
        {"name": "type", "kind": "multiclass", "classes": 3},
        {"name": "a.b", "kind": "multilabel", "classes": 4},
        {"name": "parameters", "kind": "regression", "mean": 2.0, "std": 3.0},
    ],
    "width": 16,
    "heads": 2,
    "layers": 2,
    "ffn": 2,
    "dropout": 0.1,
    "encoder_hidden": None,
    "input_dropout": 0.0,
    "scale_wide": False,
    "bins": 0,
    "linear_path": False,
    "graph_k": 3,
    "graph_width": 64,
    "graph_tau": 0.5,
    "graph_layers": 2,
    "message": "attention",
    "symmetrize": False,
    "coords_k": 0,
    "pool_hidden": None,
    "private_rank": None,
    "task_embedding": 16,
    "kappa": 1.0,
    "kappa_g": 0.0,
    "hierarchy": None,
    "branching": "dual",
    "experts": 4,
    "private_experts": 1,
    "metadata": [],
    "delta": 1.0,
    "gamma": 0.5,
    "chunk": 0,
    "hcva": True,
    "graph": True,
    "private": True,
}
"""config.json as it was written before it had a version, every key of it."""

AGE = [{"name": "age", "mean": 50.0, "std": 10.0}]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one view": {"views": PLAIN["views"][:1]},
    "bare": {"hcva": False, "graph": False, "private": False},
    "mean messages, symmetric": {"message": "mean", "symmetrize": True, "graph_layers": 1},
    "inputs": {"bins": 4, "scale_wide": True, "linear_path": True, "encoder_hidden": 6},
    "experts": {"branching": "ple", "pool_hidden": 3, "chunk": 4},
    "metadata": {"metadata": AGE, "private_rank": 5, "layers": 1},
}
RECORDED = {
    "plain": [0.8894510966, -1.3821600438, -0.2528717443, -1.3619844212, 1.5025574684],
    "one view": [-0.6909873192, 0.5020850322, -0.1273023283, -1.1072710348, -0.1051137206],
    "bare": [0.7667304860, -1.9747468248, -0.4472815273, -1.5077456659, 0.0529013584],
    "mean messages, symmetric": [1.2148035749, 0.2888610864, 0.5094559049, 0.3387924497, 1.2316313601],
    "inputs": [-1.9172754331, 11.3868710476, 1.3789014861, 1.9580392630, 12.2875748953],
    "experts": [0.6450271735, -5.6231190370, -4.1327851446, -0.4680400951, 0.3043107596],
    "metadata": [-1.5536944734, 0.1246041906, -0.8921880456, 2.2638777573, 1.6944117621],
}
"""`figures` by the code of that time (commit 4358044)."""


def fill(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Numbers that depend on nothing but names and shapes, of the size of trained ones."""
    filled = {}
    for position, name in enumerate(sorted(weights)):
        shape = weights[name].shape
        steps = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
        values = torch.sin(1.7 * steps + 0.3 * position).reshape(shape)
        positive = name.endswith((".scale", ".size"))
        filled[name] = 0.7 + values.square() if positive else 0.4 * values + (name.endswith("norm.weight"))
    return filled


def figures(model: UMDA, batch: Batch, **inputs: Tensor) -> list[float]:
    """A number for every task's logits, in order, and one for all penalties."""
    with torch.no_grad(), use_backend("reference"):
        out = model(**batch.double().inputs(), **inputs)
    flat = [*(out.logits[task.name].flatten() for task in TASKS), torch.stack(list(out.penalties.values()))]
    return [float(x @ torch.cos(torch.arange(len(x), dtype=x.dtype))) for x in flat]


def write_model(place: Path, values: dict[str, Any]) -> None:
    """config.json as it is given, and weights by formula."""
    from safetensors.torch import save_file

    (place / "config.json").write_text(json.dumps(values))
    plain = {name: value for name, value in values.items() if name not in ("architecture", "custom_encoders")}
    weights = UMDA(UMDAConfig.from_dict(plain)).double().state_dict()
    save_file(fill(weights), place / "model.safetensors")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_predictions(variant: str, tmp_path: Path) -> None:
    write_model(tmp_path, {**PLAIN, **VARIANTS[variant]})
    model = UMDA.from_pretrained(tmp_path).eval()
    inputs = {}
    if model.config.metadata:
        inputs["metadata"] = torch.tensor([[40.0], [60.0], [float("nan")], [70.0], [50.0]], dtype=torch.float64)
    found = figures(model, make_batch(views=model.config.views), **inputs)
    assert found == pytest.approx(RECORDED[variant], rel=1e-9, abs=2e-10)


def test_an_option_that_came_later_changes_them(tmp_path: Path) -> None:
    """The figures above tell one model from another."""
    write_model(tmp_path, {**PLAIN, "message_norm": "pre"})
    found = figures(UMDA.from_pretrained(tmp_path).eval(), make_batch())
    assert found != pytest.approx(RECORDED["plain"], rel=1e-3)


@pytest.mark.parametrize("option", ["bag_statistics", "whole_inputs", "view_heads"])
def test_an_option_that_came_with_a_version_already(option: str) -> None:
    """Version 2 is older than some options: what was written without one had none of it."""
    values = UMDAConfig(VIEWS, TASKS, width=16, heads=2).to_dict()
    del values[option]
    assert UMDAConfig.from_dict(values) == UMDAConfig(VIEWS, TASKS, width=16, heads=2, **{option: BEFORE_2[option]})


def test_a_version_from_the_future_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, PLAIN)
    (tmp_path / "config.json").write_text(json.dumps({**PLAIN, "version": 99}))
    with pytest.raises(ValueError, match=r"UMDAConfig.version: expected 1\.\.\d+, got 99: from a newer umda-fast"):
        UMDA.from_pretrained(tmp_path)


def test_what_is_saved_now_says_its_version(tmp_path: Path) -> None:
    model = UMDA(UMDAConfig(VIEWS, TASKS, width=16, heads=2))
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["version"] == VERSION
    assert UMDA.from_pretrained(tmp_path).config == model.config
