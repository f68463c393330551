"""What the scripts `bench/results_*.py` share: many small runs of the trainer, kept one by one in a JSON file from
which the Markdown table is made. A script that was stopped goes on where it was; no figure is typed.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from umda_fast.data import BagDataset
from umda_fast.files import json_ready, write_json, write_text
from umda_fast.heap import keep_freed_pages
from umda_fast.model import Ensemble
from umda_fast.model.config import BEFORE_2
from umda_fast.runtime.rundir import read_metrics
from umda_fast.train import Run, evaluate, make_config, train

Values = dict[str, Any]
RESULTS = Path("docs/results")


def merged(*parts: Mapping[str, Any]) -> Values:
    """Nested plain values, the later laid over the earlier; `options` of a balancer or a source are replaced whole."""
    result: Values = {}
    for part in parts:
        for key, value in part.items():
            below = result.get(key)
            if isinstance(value, Mapping) and isinstance(below, dict) and key != "options":
                result[key] = merged(below, value)
            else:
                result[key] = dict(value) if isinstance(value, Mapping) else value
    return result


def sources(folder: Path) -> dict[str, Values]:
    """The data sets of the tables by name: `data` sections of a configuration."""
    return {
        "digits": {"source": "digits", "options": {"train_bags": 400, "val_bags": 200, "test_bags": 1000}},
        "birds": {"source": str(folder / "birds.npz")},
        "movies": {"source": str(folder / "movies"), "options": {"text_width": 1024}},
    }


# What the tables' configurations leave open, as it was when they were made: batches by instances alone, no running mean
# of the weights, kept by mean_score, no linear model mixed in, UMDA as it was before version 2 of its configuration.
BASE: Values = {
    "device": "cpu",
    "data": {"bags": None, "budget": 512, "standardize": True},
    "train": {
        "keep": "scores",
        "ema": 0.0,
        "select": "mean_score",
        "weight_decay": 0.01,
        "linear": "off",
        "thresholds": "half",
    },
}
BASE_UMDA: Values = {"model": {**BEFORE_2, "dropout": 0.1}}


def settings_of(*values: Mapping[str, Any]) -> Values:
    """`values` laid over what the tables hold fixed."""
    settings = merged(BASE, *values)
    if settings.get("model", {}).get("architecture", "umda") == "umda":
        return merged(BASE_UMDA, settings)
    return settings


def heading(name: str, epochs: int) -> str:
    """Title of one data set's part of a table, and what of it is used."""
    options = ", ".join(f"{key} {value}" for key, value in sources(Path())[name].get("options", {}).items())
    return f"## {name}\n\n{epochs} epochs{'; ' + options if options else ''}\n"


def fit(values: Mapping[str, Any], datasets: Mapping[str, BagDataset] | None = None) -> Values:
    """One run: its metrics.json, `cpu_seconds` of the whole run (data included) and `log`, the logged steps."""
    settings = settings_of(values)
    with tempfile.TemporaryDirectory() as place:
        began = time.process_time()
        result = train(make_config(settings), Path(place) / "run", datasets=datasets, progress=False, plots=False)
        seconds = time.process_time() - began
        log = read_metrics(Path(place) / "run" / "metrics.jsonl")
    parameters = sum(parameter.numel() for parameter in result.model.parameters())
    return {**result.metrics, "cpu_seconds": seconds, "parameters": parameters, "log": log}


def fit_ensemble(values: Mapping[str, Any], datasets: Mapping[str, BagDataset], seeds: Sequence[int]) -> Values:
    """One run for every seed, and the mean of what their models predict: its `tasks` on the test split, and the
    `cpu_seconds` of all."""
    began = time.process_time()
    models = []
    for seed in seeds:
        settings = settings_of(values, {"seed": seed})
        with tempfile.TemporaryDirectory() as place:
            config = make_config(settings)
            models.append(train(config, Path(place) / "run", datasets=datasets, progress=False, plots=False).model)
    found = evaluate(Run(Path(), config, Ensemble(models)), datasets=datasets, split="test", progress=False)
    seconds = time.process_time() - began
    return {"tasks": found.tasks, "data": {"bags": {"test": found.bags}}, "cpu_seconds": seconds}


class Table:
    """Runs kept in `path` (JSON), each under its key; `settings` must be those of the runs already there."""

    def __init__(self, path: Path, command: str, settings: Mapping[str, Any]) -> None:
        self.path = path
        plain = json_ready(dict(settings))
        self.content: Values = {
            "command": command,
            "machine": machine(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "settings": plain,
            "runs": [],
        }
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            if before["settings"] != plain:
                raise SystemExit(f"{path}: holds runs with other settings; move it away or choose another --out")
            self.content["runs"] = before["runs"]

    @property
    def runs(self) -> list[Values]:
        runs: list[Values] = self.content["runs"]
        return runs

    def run(self, key: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> Values:
        """The run kept under `key`, or a new one, kept at once."""
        for known in self.runs:
            if known["key"] == dict(key):
                return known
        entry = {"key": dict(key), "commit": commit(), **json_ready(dict(measure()))}
        self.runs.append(entry)
        write_json(self.path, self.content)
        print(", ".join(f"{name} {value}" for name, value in key.items()), brief(entry), flush=True)
        return entry

    def where(self, **key: Any) -> list[Values]:
        return [run for run in self.runs if key.items() <= run["key"].items()]

    def write(self, title: str, text: str) -> None:
        """The Markdown beside the JSON: what was run, then `text`."""
        write_json(self.path, self.content)
        commits = sorted({run["commit"] for run in self.runs})
        total = sum(run.get("cpu_seconds", 0.0) for run in self.runs)
        head = [
            f"# {title}",
            "",
            f"Made by `{self.content['command']}`; do not edit.",
            "",
            f"Commit {', '.join(commits) or '-'}; {self.content['machine']}; one thread; {len(self.runs)} runs, "
            f"{total:,.0f} s of processor time.",
        ]
        write_text(self.path.with_suffix(".md"), "\n".join(head) + "\n\n" + text.strip() + "\n")


def brief(entry: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in entry.items() if isinstance(value, float)}
    return "; " + ", ".join(f"{key} {value:.4g}" for key, value in shown.items())


def machine() -> str:
    name = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else ""
    return f"{name or platform.machine()}"


def commit() -> str:
    """Short hash of the checkout, with a + where tracked files of the package differ from it."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short=9", "HEAD") or "unknown"


def mean_error(values: Iterable[float | None]) -> tuple[float, float]:
    """Mean and standard error of the mean of the finite values; NaN where there are too few."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return math.nan, math.nan
    error = statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return statistics.fmean(known), error


def paired(runs: Iterable[Values], others: Iterable[Values], score: str) -> list[float]:
    """For every seed that both have, the difference of `runs` to `others`."""
    there = {other["key"]["seed"]: other[score] for other in others}
    return [run[score] - there[run["key"]["seed"]] for run in runs if run["key"]["seed"] in there]


def plus_minus(values: Iterable[float | None], digits: int = 4) -> str:
    mean, error = mean_error(values)
    if math.isnan(mean):
        return "-"
    return f"{mean:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column left, the others right."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def parser(description: str, out: str, *, data: bool = True) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if data:
        result.add_argument("--data", type=Path, required=True, metavar="DIR", help="the folder of the data sets")
    result.add_argument("--out", type=Path, default=RESULTS / out, metavar="FILE.json")
    result.add_argument("--seeds", type=int, default=5)
    result.add_argument("--epochs", type=int, help="instead of the table's own, for a quick look")
    return result


def start() -> None:
    """One thread, and freed pages kept, as `umda-fast train` does."""
    torch.set_num_threads(1)
    keep_freed_pages()
