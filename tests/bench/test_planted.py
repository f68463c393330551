"""Made bags with a known answer: the default recipe finds it where a part of it must do so."""

from typing import Any

import pytest

from bench import planted, results_plain, tables

SHORT: dict[str, Any] = {
    "model": {"width": 32, "heads": 4, "layers": 1, "graph_layers": 1},
    "sgl": {"variance_window": 0},
    "train": {"linear": "off"},
}


def score(name: str, sizes: dict[str, int], steps: int, **model: Any) -> float:
    parts = planted.planted(name, 0, sizes)
    values = tables.merged(results_plain.BASE, SHORT, {"model": model, "train": {"steps": steps}})
    found = results_plain.fit(values, parts)
    (scores,) = found["tasks"].values()
    return float(next(iter(scores.values())))


@pytest.mark.parametrize("name", ["one feature", "common shift"])
def test_what_a_norm_of_the_row_takes_away_is_found(name: str) -> None:
    sizes = {"train": 150, "val": 50, "test": 300}
    assert score(name, sizes, 100) > 0.98
    assert score(name, sizes, 100, whole_inputs=False) < 0.9


def test_instances_are_compared() -> None:
    sizes = {"train": 400, "val": 100, "test": 400}
    assert score("outlier", sizes, 200) > score("outlier", sizes, 200, graph=False, bag_statistics=False) + 0.1
