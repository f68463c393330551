"""A run small enough for a test: few bags of digits, a narrow model."""

from __future__ import annotations

from typing import Any

from umda_fast.data import load_source
from umda_fast.train import RunConfig, make_config

DATA = {"train_bags": 40, "val_bags": 16, "test_bags": 16}


def small_config(**sections: Any) -> RunConfig:
    """A configuration of seconds; `sections` are laid over it, a model of another architecture replaces its
    model."""
    values: dict[str, Any] = {
        "device": "cpu",
        "data": {"options": dict(DATA), "budget": 96},
        "model": {"width": 16, "heads": 2, "layers": 1},
        # Fitting and weighing the linear model takes longer than such a training: tests that are about it ask for it.
        "train": {"epochs": 2, "log_steps": 2, "checkpoint_steps": 3, "linear": "off"},
    }
    for name, section in sections.items():
        if isinstance(section, dict) and "architecture" not in section:
            values[name] = {**values.get(name, {}), **section}
        else:
            values[name] = section
    return make_config(values)


def small_data(**more: int) -> dict[str, Any]:
    """Bags for `small_config`; `more` bags of a split than it takes, as a calibration needs."""
    return dict(load_source("digits", seed=0, **{**DATA, **more}))
