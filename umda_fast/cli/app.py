"""The commands. Everything heavy is imported inside them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app"]

app = typer.Typer(
    name="umda-fast",
    help="Unified multitask, multiview deep learning on bags of instances.",
    epilog="Example: umda-fast train --data digits --out runs/first && umda-fast evaluate runs/first",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Source = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="SOURCE", help="digits, a directory of bags beside a labels.csv, or an .npz file."
    ),
]
Format = Annotated[
    str | None,
    typer.Option("--format", help="The kind of SOURCE, instead of recognising it from its content."),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE.yaml", help="Any part of a configuration.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One value of the configuration; may be repeated."),
]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda.")]
BackendName = Annotated[
    str | None,
    typer.Option("--backend", help="auto, reference, cpp, triton or cuda: who computes the operations."),
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
RunDirs = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="A run directory; of several, the mean of what they predict.")
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")
]
SkipBad = Annotated[
    bool,
    typer.Option("--skip-bad", help="Leave out what is bad in a directory of bags, and list it."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")]


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of any error.")] = False,
) -> None:
    pass


def _values(
    data: str | None,
    format: str | None,
    device: str | None,
    backend: str | None,
    seed: int | None,
    epochs: int | None,
    skip_bad: bool = False,
) -> dict[str, Any]:
    values: dict[str, Any] = {"device": device, "backend": backend, "seed": seed}
    values["data"] = {"source": data, "format": format, "options": {"skip_bad": skip_bad or None}}
    values["train"] = {"epochs": epochs}
    return _given(values)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """`values` without what was not on the command line."""
    pruned = {key: _given(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in pruned.items() if value is not None and value != {}}


def _keep_pages() -> None:
    """Training makes the same large temporaries step after step: see docs/performance.md, "The heap"."""
    from umda_fast.heap import keep_freed_pages

    if os.environ.get("UMDA_FAST_HEAP", "keep") != "default":
        keep_freed_pages()


def _default_out(command: str, source: str) -> Path:
    stem = Path(source).stem or "data"
    return Path("runs") / f"{command}-{stem}-{time.strftime('%Y%m%d-%H%M%S')}"


@app.command(
    epilog="Example: umda-fast train --data digits --set model.layers=3 --epochs 20 --out runs/first"
)
def train(
    data: Source = None,
    format: Format = None,
    config: ConfigFile = None,
    set_: Set = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run directory.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out where it was stopped.")
    ] = False,
    device: Device = None,
    backend: BackendName = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the run.  [default: 0]")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the training bags.")] = None,
    skip_bad: SkipBad = False,
    quiet: Quiet = False,
) -> None:
    """Train a model, measure it on the test split, and leave a run directory."""
    from umda_fast.cli.render import make_console, metrics_table
    from umda_fast.train import ConfigError, load_config, run_config
    from umda_fast.train import train as train_run

    values = _values(data, format, device, backend, seed, epochs, skip_bad)
    if resume:
        if out is None:
            raise ConfigError("--resume: say which run with --out DIR")
        fixed: dict[str, Any] = {"--data": data, "--format": format, "--config": config, "--set": set_, "--seed": seed}
        fixed["--skip-bad"] = skip_bad
        given = [name for name, value in fixed.items() if value]
        if given:
            raise ConfigError(
                f"{given[0]}: a resumed run keeps its configuration; "
                "only --epochs, --device and --backend may change"
            )
        settings = run_config(out, values)
    else:
        settings = load_config(config, set_ or (), values)
    _keep_pages()
    result = train_run(
        settings, out or _default_out("train", settings.data.source), resume=resume, progress=not quiet
    )
    console = make_console()
    console.print(metrics_table({"": result.metrics["tasks"]}, title=f"Split {result.split}"))
    score, seconds = result.metrics["mean_score"], result.metrics["seconds"]
    console.print(f"mean_score {_number(score)} after {seconds:.0f} s of training")
    console.print(f"run directory: {result.directory}, plots in {result.directory / 'plots'}", soft_wrap=True)


def _number(value: float | None) -> str:
    return "undefined" if value is None or value != value else f"{value:.4f}"


@app.command(epilog="Example: umda-fast evaluate runs/first --split val --json scores.json")
def evaluate(
    runs: RunDirs,
    data: Source = None,
    format: Format = None,
    split: Annotated[str, typer.Option("--split", help="Which part of the data.")] = "test",
    json: JsonFile = None,
    device: Device = None,
    backend: BackendName = None,
    skip_bad: SkipBad = False,
    quiet: Quiet = False,
) -> None:
    """Measure a trained model, or the mean of several, on a split of its own data or of other data."""
    from umda_fast.cli.render import make_console, metrics_table
    from umda_fast.train import evaluate as evaluate_run
    from umda_fast.train import load_ensemble, load_run, write_json

    loaded = load_run(runs[0]) if len(runs) == 1 else load_ensemble(runs)
    name = ", ".join(str(run) for run in runs)
    result = evaluate_run(
        loaded,
        source=data,
        format=format,
        split=split,
        device=device or "auto",
        backend=backend or "auto",
        skip_bad=skip_bad,
        progress=not quiet,
    )
    console = make_console()
    console.print(metrics_table({"": result.tasks}, title=f"{name}, split {split}, {result.bags} bags"))
    console.print(f"mean_score {_number(result.mean_score)}")
    if json is not None:
        write_json(
            json,
            {
                "run": name,
                "data": {"source": data or loaded.config.data.source, "split": split, "bags": result.bags},
                "tasks": result.tasks,
                "mean_score": result.mean_score,
                "view_consistency": result.view_consistency,
            },
        )


@app.command(
    epilog="Example: umda-fast predict runs/first --data new.npz --out predicted.csv --attention attention.h5"
)
def predict(
    runs: RunDirs,
    data: Annotated[str, typer.Option("--data", metavar="SOURCE", help="What to predict for.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.csv", help="One line a bag.")],
    attention: Annotated[
        Path | None,
        typer.Option("--attention", metavar="FILE.h5", help="Also write each instance's attention."),
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Only this part of the data.")] = None,
    refer_below: Annotated[
        float | None,
        typer.Option(
            "--refer-below", min=0.0, max=1.0, help="Add calibrated confidences; name the tasks below this one."
        ),
    ] = None,
    format: Format = None,
    device: Device = None,
    backend: BackendName = None,
    skip_bad: SkipBad = False,
    quiet: Quiet = False,
) -> None:
    """Write a trained model's predictions, or the mean of several models', for every bag."""
    from umda_fast.cli.render import make_console
    from umda_fast.studies import predict as predict_run
    from umda_fast.train import load_ensemble, load_run

    bags = predict_run(
        load_run(runs[0]) if len(runs) == 1 else load_ensemble(runs),
        source=data,
        out=out,
        attention=attention,
        split=split,
        refer_below=refer_below,
        format=format,
        device=device or "auto",
        backend=backend or "auto",
        skip_bad=skip_bad,
        progress=not quiet,
    )
    also = f" and {attention}" if attention is not None else ""
    make_console().print(f"predictions for {bags} bags in {out}{also}", soft_wrap=True)


@app.command(epilog="Example: umda-fast crossval --data musk1.npz --folds 10 --repeats 5 --out runs/musk1")
def crossval(
    data: Source = None,
    format: Format = None,
    folds: Annotated[int, typer.Option("--folds", min=2, help="Parts the bags are cut into.")] = 10,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Times the bags are cut anew.")] = 1,
    config: ConfigFile = None,
    set_: Set = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where each fold's run goes.")
    ] = None,
    device: Device = None,
    backend: BackendName = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of folds and runs.  [default: 0]")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the training bags.")] = None,
    skip_bad: SkipBad = False,
    quiet: Quiet = False,
) -> None:
    """Cross-validate. Started again with the same --out, it continues: finished folds are kept, a stopped one
    is resumed.
    """
    from umda_fast.cli.render import crossval_table, make_console
    from umda_fast.studies import cross_validate
    from umda_fast.train import load_config

    settings = load_config(config, set_ or (), _values(data, format, device, backend, seed, epochs, skip_bad))
    directory = out or _default_out("crossval", settings.data.source)
    _keep_pages()
    result = cross_validate(settings, directory, folds=folds, repeats=repeats, progress=not quiet)
    console = make_console()
    console.print(crossval_table(result))
    console.print(f"every fold's result: {directory / 'crossval.json'}", soft_wrap=True)


def _inspect_options(overrides: Sequence[str]) -> dict[str, Any]:
    """The options of the source among `--set` values; nothing else of a configuration matters to inspect."""
    if not overrides:
        return {}
    from umda_fast.train import load_config

    return load_config(overrides=overrides).data.options


@app.command(epilog="Example: umda-fast inspect slides/")
def inspect(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="digits, a directory of bags, or an .npz file.")
    ],
    format: Format = None,
    set_: Set = None,
    skip_bad: SkipBad = False,
    json: JsonFile = None,
) -> None:
    """Say what the data holds: bags, instances, views, tasks, what is missing, and the first problem by
    name.
    """
    from umda_fast.cli.render import make_console, print_inspection
    from umda_fast.data import inspect_source

    options = _inspect_options(set_ or ()) | ({"skip_bad": True} if skip_bad else {})
    report = inspect_source(source, format=format, **options)
    print_inspection(make_console(), report)
    if json is not None:
        from umda_fast.files import write_json

        write_json(json, report)


@app.command(epilog="Example: umda-fast parity --device cpu --json parity.json")
def parity(
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    json: JsonFile = None,
) -> None:
    """Hold every operation, on every backend, to the float64 reference; exit code 1 if one fails."""
    from umda_fast.cli.render import make_console, parity_table
    from umda_fast.parity import run_parity

    report = run_parity(device)
    table, passed = parity_table(report)
    make_console().print(table)
    if json is not None:
        from umda_fast.files import write_json

        write_json(json, report)
    if not passed:
        raise typer.Exit(1)


@app.command(epilog="Example: umda-fast info")
def info(json: JsonFile = None) -> None:
    """Show versions, devices, and each backend: available, or why not."""
    from umda_fast.cli.render import collect_info, make_console, print_info

    report = collect_info()
    print_info(make_console(), report)
    if json is not None:
        from umda_fast.files import write_json

        write_json(json, report)
