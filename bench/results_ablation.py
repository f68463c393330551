"""What each part of UMDA is worth: trained without it, everything else the same.

    python -m bench.results_ablation --data DIR [--sets digits,birds,movies] [--out docs/results/ablation.json]
    python -m bench.results_ablation --data DIR --plain [--sets which-view,outlier,...] [--out FILE.json]

With `--plain` as `umda-fast train` trains by default, on the sets of bench/results_plain.py that are split, without
the parts that matter there; else with the small models and short trainings of version 0.1.0.

Once for every seed (of the split, the model and the order of the bags; `--seeds`, five unless the table says less). Δ
is the mean over the seeds of the difference to the whole model with the same seed, ± its standard error: negative
means that the part helps.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

from . import results_plain, tables

COMMON: dict[str, Any] = {
    "model": {"width": 32, "heads": 4, "layers": 1},
    "data": {"budget": 256},
    "sgl": {"variance_window": 0},
    "train": {"lr": 3e-3, "log_steps": 1000},
}
EPOCHS = {"digits": 12, "birds": 10, "movies": 4}
PENALTIES = ("entropy", "consistency", "dispersion", "smoothness", "diversity", "divergence", "cohesion")
VARIANTS: dict[str, dict[str, Any]] = {
    "UMDA": {},
    "without HCVA": {"model": {"hcva": False}},
    "without ATSB": {"model": {"private": False}},
    "without GMIP": {"model": {"graph": False}},
    "without SGL": {"sgl": {"balancer": "none"}},
    "without any penalty": {"penalties": dict.fromkeys(PENALTIES, 0.0)},
    **{f"without {name}": {"penalties": {name: 0.0}} for name in PENALTIES},
}
PLAIN_VARIANTS: dict[str, dict[str, Any]] = {
    "UMDA": {},
    "without HCVA": {"model": {"hcva": False}},
    "without ATSB": {"model": {"private": False}},
    "without GMIP": {"model": {"graph": False}},
    "without SGL": {"sgl": {"balancer": "none"}},
    "without any penalty": {"penalties": dict.fromkeys(PENALTIES, 0.0)},
    "residuals at full size": {"model": {"layer_scale": None}},
    "without bag statistics": {"model": {"bag_statistics": False}},
    "without whole inputs": {"model": {"whole_inputs": False}},
    "without averaged weights": {"train": {"ema": 0.0}},
    "without the linear model": {"train": {"linear": "off"}},
}


def measure(values: dict[str, Any]) -> dict[str, Any]:
    found = tables.fit(values)
    keys = ("mean_score", "tasks", "view_consistency", "parameters", "cpu_seconds")
    return {key: found[key] for key in keys}


def text(table: tables.Table, sets: Mapping[str, str], variants: Iterable[str]) -> str:
    """Of each of `sets` under its heading, a row for every one of `variants` that was run."""
    parts = [(__doc__ or "").rpartition("0.1.0.\n\n")[2]]
    for name, heading in sets.items():
        whole = table.where(data=name, variant="UMDA")
        if not whole:
            continue
        rows = []
        for variant in variants:
            runs = table.where(data=name, variant=variant)
            apart = tables.paired(runs, whole, "mean_score")
            row = [
                variant,
                tables.plus_minus(run["mean_score"] for run in runs),
                "" if variant == "UMDA" else tables.plus_minus(apart),
                str(len(runs)),
                tables.plus_minus((run["cpu_seconds"] for run in runs), 1),
            ]
            if runs:
                rows.append(row)
        header = ["variant", "mean score", "Δ", "seeds", "CPU s"]
        parts.append(f"{heading}\n{tables.markdown(header, rows)}")
    return "\n".join(parts)


def main() -> None:
    parser = tables.parser(__doc__ or "", "ablation.json")
    parser.add_argument("--sets", help="other than all")
    parser.add_argument("--plain", action="store_true", help="by the plain command, into ablation_plain.json")
    options = parser.parse_args()
    tables.start()
    (plain if options.plain else short)(options)


def plain(options: argparse.Namespace) -> None:
    """The plain command without its parts, seed by seed."""
    out = options.out.with_stem("ablation_plain") if options.out == tables.RESULTS / "ablation.json" else options.out
    settings = {"base": results_plain.BASE, "variants": PLAIN_VARIANTS}
    table = tables.Table(out, "python -m bench.results_ablation --data DIR --plain", settings)
    names = {name: f"## {title}\n" for name, title in results_plain.SETS.items() if name not in results_plain.FOLDED}
    for seed in range(options.seeds):
        for name in options.sets.split(",") if options.sets else names:
            parts = results_plain.parts_of(name, options.data, seed)
            for variant, change in PLAIN_VARIANTS.items():
                values = tables.merged(results_plain.BASE, {"seed": seed}, change)
                table.run(
                    {"data": name, "variant": variant, "seed": seed},
                    lambda values=values, parts=parts: results_plain.fit(values, parts),
                )
            table.write("Ablation, plain command", text(table, names, PLAIN_VARIANTS))


def short(options: argparse.Namespace) -> None:
    """The tables of version 0.1.0."""
    data = tables.sources(options.data)
    epochs = {name: options.epochs or count for name, count in EPOCHS.items()}
    settings = {"common": COMMON, "epochs": epochs, "variants": VARIANTS}
    table = tables.Table(options.out, "python -m bench.results_ablation --data DIR", settings)
    table.content["data"] = {name: section.get("options", {}) for name, section in data.items()}
    headings = {name: tables.heading(name, EPOCHS[name]) for name in data}
    table.write("Ablation", text(table, headings, VARIANTS))
    for seed in range(options.seeds):
        for name in options.sets.split(",") if options.sets else data:
            for variant, change in VARIANTS.items():
                values = tables.merged(
                    COMMON, {"seed": seed, "data": data[name], "train": {"epochs": epochs[name]}}, change
                )
                table.run({"data": name, "variant": variant, "seed": seed}, lambda values=values: measure(values))
            table.write("Ablation", text(table, headings, VARIANTS))


if __name__ == "__main__":
    main()
