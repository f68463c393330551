"""SGL against the other balancers: score, variance of the update, conflicts, seconds.

    python -m bench.results_sgl --data DIR [--sets digits,birds,movies] [--out docs/results/sgl.json]

Every method trains the same model on the same bags in the same order, once for every seed (of the split, the model and
the order; `--seeds`, five unless the table says less). SGL takes its weights from running means of the task gradients
(beta 0.9) and applies them to this step's gradients; "SGL, averages" and "equal + EMA" apply them to the running means,
which take the place of Adam's momentum. The competitors get what their papers ask for: weights from this step's
gradients, for this step's gradients. `scope representation` is the trainer's default, at the cost of about one backward
pass. All with options as they come.

Variance: tr Var(d) / ||mean d||^2 of the update d on the shared parameters, every d scaled to norm 1 first, over
windows of 25 updates, the first window left out, mean over the windows. `/ control's` divides by the same figure for
equal weights on the same task gradients with the same smoothing, on the same batches (never applied). Conflicts: share
of the pairs of gradients that the weights are made from. CPU s: of the whole run, with this telemetry. ± is the
standard error over the seeds; "to SGL": mean over the seeds of the difference to SGL with the same seed.
"""

from __future__ import annotations

import math
from typing import Any

from . import tables

WINDOW = 25
TITLE = "Self-guided learning against other balancers"
OURS = "SGL"
COMMON: dict[str, Any] = {
    "model": {"width": 32, "heads": 4, "layers": 1},
    "data": {"budget": 256},
    "train": {"lr": 3e-3, "log_steps": WINDOW},
}
EPOCHS = {"digits": 12, "birds": 10, "movies": 4}
SMOOTHED: dict[str, Any] = {"scope": "shared_parameters", "direction": "average", "beta": 0.9}
PLAIN: dict[str, Any] = {"scope": "shared_parameters", "direction": "gradient", "beta": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "SGL": {**SMOOTHED, "direction": "gradient", "balancer": "sgl"},
    "SGL, averages": {**SMOOTHED, "balancer": "sgl"},
    "SGL, scope representation": {"balancer": "sgl"},
    "equal": {**PLAIN, "balancer": "equal", "statistics": True},
    "equal + EMA": {**SMOOTHED, "balancer": "equal", "statistics": True},
    "uncertainty": {**PLAIN, "balancer": "uncertainty", "statistics": True},
    "PCGrad": {**PLAIN, "balancer": "pcgrad"},
    "CAGrad": {**PLAIN, "balancer": "cagrad"},
    "UPGrad": {**PLAIN, "balancer": "upgrad"},
    "Nash-MTL": {**PLAIN, "balancer": "nash_mtl"},
}


def configuration(data: dict[str, Any], method: dict[str, Any], epochs: int, seed: int) -> dict[str, Any]:
    guided = method["balancer"] == "sgl" and method.get("scope") == "shared_parameters"
    sgl = {**method, "variance_window": WINDOW, "control": guided}
    return tables.merged(COMMON, {"seed": seed, "data": data, "sgl": sgl, "train": {"epochs": epochs}})


def measure(values: dict[str, Any]) -> dict[str, Any]:
    found = tables.fit(values)
    steps = [record["sgl"] for record in found["log"] if record["kind"] == "step"][1:]

    def mean(name: str) -> float:
        known = [step[name] for step in steps if step.get(name) is not None and math.isfinite(step[name])]
        return sum(known) / len(known) if known else math.nan

    best = max((r["val"]["mean_score"] for r in found["log"] if r["kind"] == "epoch"), default=math.nan)
    return {
        "mean_score": found["mean_score"],
        "val_score": best,
        "tasks": found["tasks"],
        "variance": mean("gradient_variance_matched"),
        "control_variance": mean("control_gradient_variance_matched"),
        "conflict_share": mean("conflict_share"),
        "cpu_seconds": found["cpu_seconds"],
    }


def text(table: tables.Table, sets: list[str]) -> str:
    parts = [(__doc__ or "").partition("\n\n")[2].partition("\n\n")[2]]
    for name in sets:
        equal = tables.mean_error(run["variance"] for run in table.where(data=name, method="equal"))[0]
        ours = table.where(data=name, method=OURS)
        rows = []
        for method in METHODS:
            runs = table.where(data=name, method=method)
            if not runs:
                continue
            variance = tables.mean_error(run["variance"] for run in runs)[0]
            control = [run["variance"] / run["control_variance"] if run["control_variance"] else None for run in runs]
            rows.append(
                [
                    method,
                    tables.plus_minus(run["mean_score"] for run in runs),
                    "" if method == OURS else tables.plus_minus(tables.paired(runs, ours, "mean_score")),
                    str(len(runs)),
                    tables.plus_minus((run["variance"] for run in runs), 2),
                    f"{variance / equal:.2f}",
                    tables.plus_minus(control, 2),
                    tables.plus_minus((run["conflict_share"] for run in runs), 2),
                    tables.plus_minus((run["cpu_seconds"] for run in runs), 1),
                ]
            )
        header = ["method", "score", "to SGL", "seeds", "variance", "/ equal's", "/ control's", "conflicts", "CPU s"]
        if rows:
            parts.append(f"{tables.heading(name, EPOCHS[name])}\n{tables.markdown(header, rows)}")
    return "\n".join(parts)


def main() -> None:
    parser = tables.parser(__doc__ or "", "sgl.json")
    parser.add_argument("--sets", default="digits,birds,movies")
    parser.add_argument("--methods", help="names separated by semicolons; default all")
    options = parser.parse_args()
    tables.start()
    data = tables.sources(options.data)
    epochs = {name: options.epochs or count for name, count in EPOCHS.items()}
    settings = {"common": COMMON, "epochs": epochs, "methods": METHODS, "window": WINDOW}
    table = tables.Table(options.out, "python -m bench.results_sgl --data DIR", settings)
    table.content["data"] = {name: section.get("options", {}) for name, section in data.items()}
    table.write(TITLE, text(table, list(data)))
    sets = options.sets.split(",")
    chosen = options.methods.split(";") if options.methods else list(METHODS)
    for name in sets:
        for seed in range(options.seeds):
            for method in chosen:
                values = configuration(data[name], METHODS[method], epochs[name], seed)
                table.run({"data": name, "method": method, "seed": seed}, lambda values=values: measure(values))
            table.write(TITLE, text(table, list(data)))


if __name__ == "__main__":
    main()
