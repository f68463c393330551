"""What each part of UMDA is worth: trained without it, everything else the same.

    python -m bench.results_ablation --data DIR [--sets digits,birds,movies] [--out docs/results/ablation.json]

Once for every seed (of the split, the model and the order of the bags; `--seeds`, five unless the table says less). Δ
is the mean over the seeds of the difference to the whole model with the same seed, ± its standard error: negative
means that the part helps.
"""

from __future__ import annotations

from typing import Any

from . import tables

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


def measure(values: dict[str, Any]) -> dict[str, Any]:
    found = tables.fit(values)
    keys = ("mean_score", "tasks", "view_consistency", "parameters", "cpu_seconds")
    return {key: found[key] for key in keys}


def text(table: tables.Table, sets: list[str]) -> str:
    parts = [(__doc__ or "").partition("\n\n")[2].partition("\n\n")[2]]
    for name in sets:
        whole = table.where(data=name, variant="UMDA")
        if not whole:
            continue
        rows = []
        for variant in VARIANTS:
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
        parts.append(f"{tables.heading(name, EPOCHS[name])}\n{tables.markdown(header, rows)}")
    return "\n".join(parts)


def main() -> None:
    parser = tables.parser(__doc__ or "", "ablation.json")
    parser.add_argument("--sets", default="digits,birds,movies")
    options = parser.parse_args()
    tables.start()
    data = tables.sources(options.data)
    epochs = {name: options.epochs or count for name, count in EPOCHS.items()}
    settings = {"common": COMMON, "epochs": epochs, "variants": VARIANTS}
    table = tables.Table(options.out, "python -m bench.results_ablation --data DIR", settings)
    table.content["data"] = {name: section.get("options", {}) for name, section in data.items()}
    table.write("Ablation", text(table, list(data)))
    for seed in range(options.seeds):
        for name in options.sets.split(","):
            for variant, change in VARIANTS.items():
                values = tables.merged(
                    COMMON, {"seed": seed, "data": data[name], "train": {"epochs": epochs[name]}}, change
                )
                table.run({"data": name, "variant": variant, "seed": seed}, lambda values=values: measure(values))
            table.write("Ablation", text(table, list(data)))


if __name__ == "__main__":
    main()
