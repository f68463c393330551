"""The plain command on every set: no option but the data, beside models that people have without UMDA.

    python -m bench.results_plain --data DIR [--sets musk1,films,...] [--repeats 1] [--out docs/results/plain.json]

Every model is trained as `umda-fast compare` trains it: the same updates, batches and optimiser, defaults for
everything. UMDA is what `umda-fast train` leaves, with whatever it mixed in; `UMDA alone` is the same run without
that. MUSK1, MUSK2, Fox and Tiger are cross-validated in ten folds, `--repeats` times, as `umda-fast
crossval` does; the other sets are split (films: tested on the table's own `val`) and trained once for every seed
(`--seeds`). Made sets: bench/planted.py.

Mean over the runs ± standard error. `UMDA to it`: the mean difference of UMDA to the row, of the mean over the tasks'
first scores, on the same bags, ± its standard error; positive where UMDA is better.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from umda_fast.data import BagDataset, load_folds, load_source
from umda_fast.runtime.config import make_config
from umda_fast.studies.compare import model_config
from umda_fast.tasks import kind_of
from umda_fast.train import Run, evaluate, train

from . import planted, results_mfeat, tables

FOLDS = 10
BASE: dict[str, Any] = {"device": "cpu", "train": {"keep": "scores"}}
FOLDED = {"musk1": "MUSK1", "musk2": "MUSK2", "fox": "Fox", "tiger": "Tiger"}
SPLIT = {
    "films": "films",
    "birds": "birds",
    "digits": "digits",
    "mfeat": "mfeat (zer, fou, mor)",
    "mfeat-half": "mfeat (zer, fou, mor), half of the views missing",
}
SETS = {**FOLDED, **SPLIT, **{name.replace(" ", "-"): name for name in planted.SIZES}}
MODELS = ("umda", "linear", "mean_pooling", "gated_attention", "late_fusion")
# Beside the first score of a task.
ALSO = {"binary": ("accuracy",), "multilabel": ("map",), "survival": ("c_index_uno", "ibs")}


def parts_of(name: str, folder: Path, seed: int) -> Mapping[str, BagDataset]:
    """The splits of a set that is not folded."""
    if name.startswith("mfeat"):
        return results_mfeat.load(folder / "mfeat.npz", 0.5 if name == "mfeat-half" else 0.0, seed)
    if name == "films":
        return load_source(str(folder / "movies"), seed=seed)
    if name in ("digits", "birds"):
        section = tables.sources(folder)[name]
        return load_source(section["source"], seed=seed, **section.get("options", {}))
    return planted.planted(SETS[name], seed)


def runs_of(name: str, options: Any) -> Iterator[tuple[int, Mapping[str, BagDataset]]]:
    """Seed and splits of every run of a set."""
    if name not in FOLDED:
        yield from ((seed, parts_of(name, options.data, seed)) for seed in range(options.seeds))
        return
    for repeat in range(options.repeats):
        # With another seed each, a repeat can be added without cutting the others anew.
        folds = load_folds(options.data / f"{name}.npz", folds=FOLDS, seed=repeat)
        yield from ((repeat * FOLDS + fold, parts) for fold, parts in enumerate(folds))


def models_of(parts: Mapping[str, BagDataset]) -> tuple[str, ...]:
    """With one view there is nothing to fuse late."""
    return MODELS if len(parts["train"].views) > 1 else MODELS[:-1]


def fit(values: Mapping[str, Any], parts: Mapping[str, BagDataset], model: str = "umda") -> dict[str, Any]:
    """Scores of one run on its test bags, of UMDA also without what was weighed in."""
    config = make_config(values)
    if model != "umda":
        config = model_config(config, model)
    with tempfile.TemporaryDirectory() as place:
        began = time.process_time()
        result = train(config, Path(place) / "run", datasets=parts, progress=False, plots=False)
        seconds = time.process_time() - began
    found: dict[str, Any] = {
        "tasks": _scores(parts["test"], result.metrics["tasks"]),
        "mean_score": result.metrics["mean_score"],
        "cpu_seconds": seconds,
    }
    if model == "umda":
        alone = evaluate(
            Run(Path(), config, getattr(result.model, "model", result.model)), datasets=parts, progress=False
        )
        found["alone"] = {"tasks": _scores(parts["test"], alone.tasks), "mean_score": alone.mean_score}
    return found


def _scores(dataset: BagDataset, scores: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    found = {}
    for task in dataset.tasks:
        names = (kind_of(task).primary, *ALSO.get(task.kind, ()))
        found[task.name] = {name: scores[task.name][name] for name in names}
    return found


def text(table: tables.Table) -> str:
    lines = [(__doc__ or "").partition("\n\n")[2].partition("\n\n")[2]]
    for name, title in SETS.items():
        ours = table.where(data=name, model="umda")
        if not ours:
            continue
        rows: dict[str, list[dict[str, Any]]] = {"**UMDA**": ours}
        rows["UMDA alone"] = [{**run, **run["alone"]} for run in ours]
        rows |= {model.replace("_", " "): table.where(data=name, model=model) for model in MODELS[1:]}
        columns = [(task, metric) for task, found in ours[0]["tasks"].items() for metric in found]
        cells = []
        for row, runs in rows.items():
            if not runs:
                continue
            scores = [tables.plus_minus((run["tasks"][task][metric] for run in runs), 3) for task, metric in columns]
            apart = tables.paired(ours, runs, "mean_score")
            last = ["", ""] if runs is ours else [tables.plus_minus(apart, 3), str(len(apart))]
            cells.append([row, *scores, *last, f"{tables.mean_error(run['cpu_seconds'] for run in runs)[0]:.1f}"])
        header = ["model", *(f"{task}, {metric}" for task, metric in columns), "UMDA to it", "pairs", "CPU s"]
        lines.append(f"## {title}\n\n{tables.markdown(header, cells)}")
    return "\n".join(lines)


def main() -> None:
    parser = tables.parser(__doc__ or "", "plain.json")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    tables.start()
    table = tables.Table(options.out, "python -m bench.results_plain --data DIR", {"base": BASE, "folds": FOLDS})
    title = "The plain command"
    table.write(title, text(table))
    for name in options.sets.split(","):
        for seed, parts in runs_of(name, options):
            values = tables.merged(BASE, {"seed": seed})
            for model in models_of(parts):
                table.run(
                    {"data": name, "model": model, "seed": seed},
                    lambda model=model, parts=parts, values=values: fit(values, parts, model),
                )
            table.write(title, text(table))


if __name__ == "__main__":
    main()
