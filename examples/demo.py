"""Train UMDA and a plain baseline on the same bags of real handwritten digits and print both; `make demo`
runs this.

    python examples/demo.py --out runs/demo

The baseline is gated-attention pooling (Ilse, Tomczak, Welling 2018) of the pixels alone: one encoder, one
pooling and one head per task, the plain sum of the losses. Same trainer, same optimiser, same bags.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

from umda_fast.cli.render import make_console, metrics_table
from umda_fast.train import RunResult, load_config, train

# Small enough for two cores; what is not named here has its default.
COMMON = ["data.budget=512", "train.lr=3e-3", "train.epochs=15"]
UMDA = ["model.width=64"]
BASELINE = ["model.architecture=gated_attention", "model.view=pixels", "sgl.balancer=none", "train.linear=off"]


def run(out: Path, name: str, overrides: list[str]) -> RunResult:
    directory = out / name
    if (directory / "metrics.json").exists():
        shutil.rmtree(directory)  # an earlier demo, finished
    resume = (directory / "config.yaml").exists()  # one that was stopped goes on where it was
    return train(load_config(overrides=overrides), directory, resume=resume)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="directory for the two runs")
    parser.add_argument("--epochs", type=int, help="passes over the training bags")
    options = parser.parse_args()
    common = COMMON if options.epochs is None else [*COMMON, f"train.epochs={options.epochs}"]

    console = make_console()
    began = time.monotonic()
    console.print("Training UMDA on bags of handwritten digits (three views, four tasks) ...")
    umda = run(options.out, "umda", [*common, *UMDA])
    console.print("Training the baseline, gated-attention pooling of the pixels, on the same bags ...")
    baseline = run(options.out, "baseline", [*common, *BASELINE])

    console.print()
    columns = {"UMDA": umda.metrics["tasks"], "baseline": baseline.metrics["tasks"]}
    bags = umda.metrics["data"]["bags"][umda.split]
    console.print(metrics_table(columns, title=f"Test split, {bags} bags (bold: better)", mark_best=True))
    for name, result in (("UMDA", umda), ("baseline", baseline)):
        score, seconds, rate, memory = (
            result.metrics[key] for key in ("mean_score", "seconds", "instances_per_second", "peak_memory_mb")
        )
        speed = f"{seconds:.0f} s of training, {rate:,.0f} instances/s, peak memory {memory:,.0f} MiB"
        console.print(f"{name}: mean_score {score:.4f}, {speed}")
    console.print(f"view consistency of UMDA: {umda.metrics['view_consistency']:.3f}")
    seconds = time.monotonic() - began
    console.print(f"both runs took {seconds:.0f} s, plots: {umda.directory / 'plots'}", soft_wrap=True)
    files = " and ".join(str(result.directory / "metrics.json") for result in (umda, baseline))
    console.print(f"metrics: {files}", soft_wrap=True)


if __name__ == "__main__":
    main()
