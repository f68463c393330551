"""The table of films: its rows, its linear model, and that the Markdown shows what the runs hold."""

import csv
from pathlib import Path

import numpy as np
import pytest

from bench import results_films, tables
from umda_fast.train import make_config


@pytest.fixture
def movies(tmp_path: Path) -> Path:
    """Films whose plot and poster tell the genre."""
    rng = np.random.default_rng(0)
    posters = rng.normal(size=(120, 5)).astype(np.float32)
    place = tmp_path / "movies"
    place.mkdir()
    with open(place / "movies.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "title", "overview", "tagline", "genres", "split"])
        for row in range(120):
            kind = row % 3
            posters[row, kind] += 3.0
            plot = ("Soldiers march to war.", "Two lovers laugh.", "A killer hides.")[kind]
            split = "val" if row % 4 == 3 else "train"
            writer.writerow([f"f{row}", "", plot, "", ("War|Drama", "Comedy", "Crime")[kind], split])
    np.save(place / "poster_features.npy", posters)
    return place


def test_rows_and_configuration() -> None:
    rows = results_films.rows()
    assert len(rows) == len(set(rows)) == 5
    assert results_films.views("n-grams and encoder", "plot and poster") == ["text", "embedding", "poster"]
    assert results_films.views("n-grams", "plot") == ["text"]
    assert {tuple(results_films.views(*row)) for row in rows if row[1] == "poster"} == {("poster",)}
    make_config(results_films.COMMON)


@pytest.mark.parametrize("views", [["text", "poster"], ["text"], ["poster"]])
def test_both_models_learn_what_the_features_tell(movies: Path, views: list[str]) -> None:
    splits = results_films.load(movies, None, views, 0)
    found = results_films.linear(splits)
    assert found["strength"] in results_films.STRENGTHS
    assert found["f1"] > 0.8
    ours = results_films.ours(splits, 0, 20)
    assert set(ours) == {"f1", "map", "parameters", "cpu_seconds"}
    assert ours["map"] > 0.8


def test_a_missing_part_is_zero_and_a_poster_standardised(movies: Path) -> None:
    posters = np.load(movies / "poster_features.npy")
    posters[0] = np.nan
    np.save(movies / "poster_features.npy", posters)
    splits = results_films.load(movies, None, ["text", "poster"], 0)
    x = results_films.matrix(splits.whole, np.full(5, 2.0), np.full(5, 0.5)).toarray()
    first = splits.whole[1].views["poster"][0].numpy()
    np.testing.assert_allclose(x[1, -5:], (first - 2.0) * 0.5, rtol=1e-6)
    assert (x[0, -5:] == 0).all()
    np.testing.assert_allclose(np.linalg.norm(x[0]), 1.0, rtol=1e-6)  # the plot's n-grams


def test_the_table_shows_what_its_runs_hold(tmp_path: Path) -> None:
    table = tables.Table(tmp_path / "films.json", "command", {})
    for seed in (0, 1):
        for model, f1 in (("UMDA", 0.6), ("linear", 0.5)):
            key = {"model": model, "features": "n-grams", "inputs": "poster", "seed": seed}
            entry = {"f1": f1 + 0.1 * seed, "map": 0.7, "cpu_seconds": 9.0}
            table.run(key, lambda entry=entry: entry)
    lines = [line for line in results_films.text(table).splitlines() if line.startswith("| poster")]
    assert len(lines) == 1
    cells = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert cells[1:6] == ["-", "2", "0.650 ± 0.050", "0.550 ± 0.050", "0.100 ± 0.000"]
