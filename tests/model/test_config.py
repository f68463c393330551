"""Configurations: errors that name the field, and the trip through JSON."""

from __future__ import annotations

from typing import Any

import pytest

from tests.model.conftest import TASKS, VIEWS, make_config
from umda_fast import TaskSpec, UMDAConfig, ViewSpec

FOUR = tuple(tuple(0.0 if s == t else 2.0 for t in range(4)) for s in range(4))


def test_json() -> None:
    tasks = (*TASKS[:3], TaskSpec("w", "binary", labels=("no", "yes"), class_weights=(1.0, 2.0)))
    config = make_config(hierarchy=FOUR, tasks=tasks, message="mean", private_rank=3)
    assert UMDAConfig.from_json(config.to_json()) == config
    assert UMDAConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"width": 0}, ValueError, "UMDAConfig.width: expected at least 1, got 0"),
        ({"width": 16.0}, TypeError, "UMDAConfig.width: expected an int, got 16.0"),
        ({"heads": 3}, ValueError, "UMDAConfig.heads: expected a divisor of width = 16, got 3"),
        ({"heads": 16}, ValueError, r"UMDAConfig.heads: expected width / heads in 8..256, got 16 / 16 = 1"),
        ({"dropout": 1.0}, ValueError, "UMDAConfig.dropout: expected at least 0 and below 1, got 1.0"),
        ({"graph_tau": 0}, ValueError, "UMDAConfig.graph_tau: expected a positive number, got 0.0"),
        ({"gamma": -1}, ValueError, "UMDAConfig.gamma: expected at least 0, got -1.0"),
        ({"kappa": float("nan")}, ValueError, "UMDAConfig.kappa: expected a finite number"),
        ({"message": "sum"}, ValueError, "UMDAConfig.message: expected one of attention, mean, none, got 'sum'"),
        ({"hcva": 1}, TypeError, "UMDAConfig.hcva: expected a bool or 'auto', got 1"),
        ({"hcva": "never"}, TypeError, "UMDAConfig.hcva: expected a bool or 'auto', got 'never'"),
        ({"message_norm": "none"}, ValueError, "UMDAConfig.message_norm: expected one of post, pre, got 'none'"),
        (
            {"message_ffn": 2, "message_norm": "post"},
            ValueError,
            "UMDAConfig.message_ffn: expected 0 with message_norm=post, got 2",
        ),
        ({"layer_scale": "0"}, TypeError, "UMDAConfig.layer_scale: expected a number, got '0'"),
        ({"private_rank": 0}, ValueError, "UMDAConfig.private_rank: expected at least 1, got 0"),
        ({"hierarchy": ((0.0,),)}, ValueError, "UMDAConfig.hierarchy: expected 4 x 4 distances"),
        ({"hierarchy": ((1.0, *FOUR[0][1:]), *FOUR[1:])}, ValueError, r"UMDAConfig.hierarchy: .*\[0\]\[0\] = 1.0"),
        ({"views": ()}, ValueError, "UMDAConfig.views: expected at least one, got none"),
        ({"views": (VIEWS[0], VIEWS[0])}, ValueError, "UMDAConfig.views: expected distinct names, got a.b"),
        ({"views": [ViewSpec(str(i), 1) for i in range(17)]}, ValueError, "UMDAConfig.views: expected at most 16"),
        ({"tasks": (VIEWS[0],)}, TypeError, "UMDAConfig.tasks: expected TaskSpec, got ViewSpec"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_config(**options)


def test_unknown_and_missing_fields() -> None:
    values = make_config().to_dict()
    with pytest.raises(ValueError, match="got 'widht'"):
        UMDAConfig.from_dict({**values, "widht": 3})
    del values["tasks"]
    with pytest.raises(ValueError, match=r"UMDAConfig.tasks"):
        UMDAConfig.from_dict(values)
