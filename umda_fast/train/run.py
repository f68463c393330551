"""From a configuration to a run directory and back: `train`, `load_run`, `load_data`, `evaluate`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

import umda_fast
from umda_fast import ops
from umda_fast.data import BagDataset, Splits, concat, find_format, load_source
from umda_fast.data.adapt import adapt_dataset
from umda_fast.errors import DataError
from umda_fast.files import write_json
from umda_fast.model import UMDA, Ensemble, UMDAConfig
from umda_fast.model.baselines import BASELINES, Baseline
from umda_fast.model.readout import Readout
from umda_fast.runtime.config import (
    ARCHITECTURES,
    ConfigError,
    RunConfig,
    as_dict,
    dump_config,
    load_config,
    make_config,
)
from umda_fast.runtime.progress import peak_memory_mb
from umda_fast.runtime.random_state import rank_seed
from umda_fast.runtime.rundir import RunDirectory, read_metrics, save_model
from umda_fast.runtime.together import one_decides, processes_of, started_together, strategy
from umda_fast.score.collect import calibrate, collect
from umda_fast.score.evaluation import SplitResult, evaluate_dataset
from umda_fast.score.thresholds import tune_thresholds
from umda_fast.sgl.outliers import outlier_tasks
from umda_fast.train.log import tensorboard_events
from umda_fast.train.plots import plot_run
from umda_fast.train.trainer import Trainer

__all__ = [
    "Run",
    "RunResult",
    "build_model",
    "evaluate",
    "load_data",
    "load_ensemble",
    "load_run",
    "make_fabric",
    "run_config",
    "train",
]


@dataclass
class RunResult:
    """A finished run: its directory, the content of metrics.json, the split it was measured on, and the model
    with the best weights, in evaluation mode."""

    directory: Path
    metrics: dict[str, Any]
    split: str
    model: Any


@dataclass
class Run:
    """A run read back from its directory; or several as one, `members`: the model is then an `Ensemble`, directory and
    configuration are those of the first."""

    directory: Path
    config: RunConfig
    model: Any
    members: tuple[Run, ...] = ()


def make_fabric(config: RunConfig) -> Fabric:
    """Fabric on the configured device; under torchrun, with the process group of all that it started.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: expected a device of this machine, got 'cuda', but torch sees no GPU")
    accelerator = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    local, world = started_together()
    if world == 1:
        return Fabric(accelerator=accelerator, devices=1, precision=config.precision)
    fabric = Fabric(
        accelerator=accelerator,
        devices=local,
        num_nodes=world // local,
        strategy=strategy(),
        precision=config.precision,
    )
    fabric.launch()
    return fabric


def load_data(config: RunConfig) -> Splits:
    """The splits of the configured source.

    Raises:
        DataError: from the source.
    """
    data = config.data
    splits = load_source(data.source, format=data.format, seed=data_seed(config), **data.options)
    tell_skipped(splits.skipped)
    return splits


def tell_skipped(lines: Sequence[str]) -> None:
    """List on standard error what of a source was left out, which is done only where it was asked for."""
    for line in lines:
        print(f"skipped: {line}", file=sys.stderr)


def data_seed(config: RunConfig) -> int:
    """The seed of splits and generated bags."""
    return config.seed if config.data.seed is None else config.data.seed


def build_model(
    config: RunConfig, dataset: BagDataset, encoders: Mapping[str, nn.Module] | None = None
) -> UMDA | Baseline:
    """The configured model for the views and tasks of `dataset`.

    Raises:
        ConfigError: a model option does not go with another or with the data.
    """
    options = dict(config.model)
    architecture = options.pop("architecture", "umda")
    try:
        if architecture not in BASELINES and dataset.metadata is not None:
            options["metadata"] = dataset.metadata.specs()
        model_config = ARCHITECTURES[architecture](views=dataset.views, tasks=dataset.tasks, **options)
        if architecture in BASELINES:
            if encoders:
                raise ValueError(f"encoders: {architecture} takes none")
            baseline: Baseline = BASELINES[architecture](model_config)
            return baseline
        assert isinstance(model_config, UMDAConfig)
        return UMDA(model_config, encoders)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model: {error}") from None


def train(
    config: RunConfig,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    datasets: Mapping[str, BagDataset] | None = None,
    encoders: Mapping[str, nn.Module] | None = None,
    progress: bool = True,
    plots: bool = True,
) -> RunResult:
    """Train, keep the weights with the best validation score, measure them on the test split, and fill the
    run directory.

    Args:
        config: everything the run depends on.
        out: the run directory; must not hold a run unless `resume`.
        resume: continue from the directory's checkpoint. On the CPU the weights come out bit-identical to
            those of a run that was never stopped.
        datasets: split -> bags, instead of `config.data.source`. "train" is needed, "val" and "test" are used
            if there.
        encoders: view -> module, see `UMDA`.
        progress: show progress on standard error.
        plots: draw plots/ at the end.

    Under torchrun all processes train one model together, as one of them would: `data.budget` is that of the
    whole batch, and the weights come out the same within rounding (with dropout, each draws numbers of its
    own). Process 0 alone writes; the result is the same in all.

    Raises:
        DataError, ConfigError: the configuration, the directory or the data cannot be used.
        NonFiniteError: a loss or a gradient became NaN or infinite; the weights and the last checkpoint are
        untouched.
        ProcessLostError: another process ended or did not answer in time; the last checkpoint is whole.
    """
    fabric = make_fabric(config)
    processes = processes_of(fabric)
    zero = fabric.is_global_zero
    # The default name of a run directory has the time in it, which two processes may read differently.
    run = RunDirectory(out if processes is None else processes.object_from_first(os.fspath(out)))
    one_decides(processes, lambda: run.begin(resume=resume))
    if datasets is None:
        datasets = load_data(config)
    if isinstance(datasets, Splits) and datasets.fixed:
        options = {**config.data.options, **datasets.fixed}
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, options=options))
    if "train" not in datasets:
        raise DataError(f"datasets: expected a split 'train', got {', '.join(datasets) or 'none'}")
    if not datasets["train"].tasks:
        raise DataError(
            f"{datasets['train'].name}: expected labels of at least one task, got none; a directory of bags has "
            "them in labels.csv, a column for each task"
        )
    on_cpu = fabric.device.type == "cpu"
    deterministic = config.train.deterministic if config.train.deterministic is not None else on_cpu
    with _deterministic(deterministic), ops.use_backend(config.backend):
        Fabric.seed_everything(config.seed, verbose=False)
        model = build_model(config, datasets["train"], encoders)
        trainer = Trainer(config, model, datasets, run, fabric, progress=progress)
        if not zero:
            Fabric.seed_everything(rank_seed(config.seed, fabric.global_rank, 0), verbose=False)
        if resume:
            trainer.load()
        if zero:
            dump_config(config, run.config)
        keep_all = config.train.keep == "all"
        with contextlib.ExitStack() as stack:
            if keep_all and zero:
                trainer.log.events = stack.enter_context(tensorboard_events(run, trainer.state.step))
            trainer.fit()
        best = trainer.best_model()
        if config.train.thresholds == "f1" and len(datasets.get("val", ())):
            found = collect(best, datasets["val"], fabric, config.data)
            best.config = dataclasses.replace(best.config, tasks=tune_thresholds(best.config.tasks, found))
        split = next((name for name in ("test", "val") if name in datasets and len(datasets[name])), "train")
        result = trainer.evaluate(datasets[split].with_tasks(best.config.tasks), best)
        if keep_all and zero and len(datasets.get("val", ())):
            calibrate(best, datasets["val"], fabric, config.data).save(run.calibration)
    peak = peak_memory_mb(fabric.device)
    if processes is not None:
        peak = max(processes.objects(peak))
    metrics = one_decides(processes, lambda: summary(config, datasets, split, result, run, trainer, peak))
    if zero:
        if keep_all:
            save_model(best, run.path)
        write_json(run.metrics, metrics)
        if plots and keep_all:
            plot_run(run, datasets["train"].views, datasets["train"].tasks, result)
    return RunResult(run.path, metrics, split, best)


@contextlib.contextmanager
def _deterministic(on: bool) -> Iterator[None]:
    """Torch's deterministic algorithms for the length of a run.

    Filling fresh memory with NaN finds reads of it in tests and costs time in a run, so it is off.
    """
    before = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(on)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = fill


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {
        "python": platform.python_version(),
        "umda_fast": umda_fast.__version__,
        "torch": torch.__version__,
    }
    for package in ("numpy", "triton", "lightning-fabric", "torchmetrics"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def summary(
    config: RunConfig,
    datasets: Mapping[str, BagDataset],
    split: str,
    result: SplitResult,
    run: RunDirectory,
    trainer: Trainer,
    peak_memory: float,
) -> dict[str, Any]:
    """The content of metrics.json."""
    stability = [
        record["sgl"] for record in read_metrics(run.log) if record["kind"] == "step" and "sgl" in record
    ]

    def mean(key: str) -> float | None:
        values = [record[key] for record in stability if record.get(key) is not None]
        return sum(values) / len(values) if values else None

    return {
        "seed": config.seed,
        "data": {
            "source": config.data.source,
            "split": split,
            "views": {view.name: view.width for view in datasets["train"].views},
            "bags": {name: len(dataset) for name, dataset in datasets.items()},
            "instances": {name: int(dataset.sizes.sum()) for name, dataset in datasets.items()},
            "skipped": list(datasets["train"].skipped),
            "scaling": trainer.scaling,
        },
        "tasks": result.tasks,
        "mean_score": result.mean_score,
        "view_consistency": result.view_consistency,
        "gradient_variance": mean("gradient_variance"),
        "conflict_share": mean("conflict_share"),
        "outlier_tasks": outliers(trainer),
        "seconds": trainer.state.total_seconds,
        "instances_per_second": trainer.state.instances_per_second,
        "peak_memory_mb": peak_memory,
        "processes": trainer.fabric.world_size,
        "versions": versions(),
        "backend": ops.backends_used(),
    }


def outliers(trainer: Trainer) -> list[str] | None:
    """Tasks whose gradients conflict with those of the others, see `outlier_tasks`; None without task gradients."""
    guided = trainer.train_step.gradients.guided
    if guided is None or not guided.statistics:
        return None
    return outlier_tasks(guided.cosine_ema, guided.tasks)


def load_run(directory: str | os.PathLike[str]) -> Run:
    """The configuration and the model (best weights, evaluation mode, on the CPU) of a run directory.

    Raises:
        DataError: it is no run directory, or its files cannot be read.
    """
    run = RunDirectory.existing(directory)
    config = load_config(run.config)
    try:
        # Not the configuration's: a model with new heads keeps that of its trunk.
        architecture = json.loads((run.path / "config.json").read_text(encoding="utf-8"))["architecture"]
        kind: Any = {**BASELINES, "readout": Readout}.get(architecture, UMDA)
        model = kind.from_pretrained(run.path)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise DataError(
            f"{run.path}: the model cannot be read: {' '.join(str(error).split())[:300]}"
        ) from None
    return Run(run.path, config, model.eval())


def load_ensemble(directories: Sequence[str | os.PathLike[str]]) -> Run:
    """Several runs as one, which predicts the mean of what they predict (see `Ensemble`).

    Raises:
        DataError: one cannot be read, or is for other views or tasks than the first.
    """
    runs = tuple(load_run(directory) for directory in directories)
    try:
        model = Ensemble([run.model for run in runs])
    except ValueError as error:
        raise DataError(f"{', '.join(str(run.directory) for run in runs)}: {error}") from None
    return Run(runs[0].directory, runs[0].config, model.eval(), runs)


def _check_same_split(run: Run) -> None:
    """Bags that one member is measured on must not be among those that another was trained on.

    Raises:
        DataError: the members' data differ, or how it is split.
    """

    def split(config: RunConfig) -> dict[str, Any]:
        data = config.data
        return {"source": data.source, "options": dict(data.options), "format": data.format, "seed": data_seed(config)}

    expected = split(run.config)
    for member in run.members:
        for name, found in split(member.config).items():
            if found != expected[name]:
                raise DataError(
                    f"{member.directory}: data.{name}: expected {expected[name]!r} as in {run.directory}, for one "
                    f"split of the data (train every member with the same --set data.seed=N), got {found!r}"
                )


def run_config(directory: str | os.PathLike[str], values: Mapping[str, Any]) -> RunConfig:
    """The configuration of the run in `directory`, with `values` laid over it, to resume it.

    Raises:
        DataError: there is no run.
    """
    run = RunDirectory(directory)
    if not run.config.is_file():
        raise DataError(f"{run.path}: holds no run to resume (no {run.config.name})")
    return load_config(run.config, values=values)


def model_data(
    run: Run,
    *,
    source: str | None,
    datasets: Mapping[str, BagDataset] | None,
    split: str | None,
    format: str | None,
    device: str,
    skip_bad: bool = False,
) -> tuple[BagDataset, Fabric]:
    """Bags as the run's model takes them, and the device to run it on: one split, or with `split=None` all of
    them. `skip_bad` leaves out what is bad in the source and lists it on standard error.

    Raises:
        DataError: there is no such split, or the data does not fit the model.
    """
    data = run.config.data
    model = run.model.config
    if datasets is None:
        where = data.source if source is None else source
        kind = find_format(where, format if source is not None else data.format)
        understood = kind.options()
        other = source is not None and source != data.source
        foreign = kind.local if other else ()
        options = {name: value for name, value in data.options.items() if name in understood and name not in foreign}
        if skip_bad:
            options["skip_bad"] = True
        if "kinds" in understood:
            # What the model was trained on decides what a label means: a file with two of ten classes is not
            # binary.
            options["kinds"] = model.tasks
        loaded = load_source(where, format=kind.name, seed=data_seed(run.config), **options)
        tell_skipped(loaded.skipped)
        splits: Mapping[str, BagDataset] = loaded
    else:
        where, splits = "datasets", datasets
    if split is not None and split not in splits:
        raise DataError(f"{where}: expected a split among {', '.join(splits)}, got {split!r}")
    if split is not None:
        chosen = [splits[split]]
    elif isinstance(splits, Splits):
        chosen = [splits.whole]
    else:
        chosen = list(splits.values())
    metadata = getattr(model, "metadata", ())
    parts = [adapt_dataset(part, model.views, model.tasks, metadata) for part in chosen]
    fabric = make_fabric(make_config({**as_dict(run.config), "device": device}))
    return (parts[0] if len(parts) == 1 else concat(parts, where)), fabric


def evaluate(
    run: Run,
    *,
    source: str | None = None,
    split: str | None = "test",
    datasets: Mapping[str, BagDataset] | None = None,
    format: str | None = None,
    device: str = "auto",
    backend: str = "auto",
    skip_bad: bool = False,
    progress: bool = True,
) -> SplitResult:
    """The model of a run on a split (None: all splits) of its own data, of `source`, or of `datasets`.

    Raises:
        DataError: there is no such split, or the data does not fit the model; members of an ensemble were trained on
            different data or splits.
    """
    if datasets is None:
        _check_same_split(run)
    dataset, fabric = model_data(
        run, source=source, datasets=datasets, split=split, format=format, device=device, skip_bad=skip_bad
    )
    if len(dataset) == 0:
        raise DataError(f"{source or run.config.data.source}: split {split!r} holds no bags to evaluate on")
    model = fabric.to_device(run.model)
    with ops.use_backend(backend):
        return evaluate_dataset(model, dataset, fabric, run.config.data, progress=progress)
