"""What a finished run says of itself: the content of metrics.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from umda_fast import ops
from umda_fast.data import BagDataset
from umda_fast.runtime.config import RunConfig
from umda_fast.runtime.provenance import stamped, versions
from umda_fast.runtime.rundir import RunDirectory, read_metrics
from umda_fast.score.evaluation import SplitResult
from umda_fast.score.skill import SkillScale
from umda_fast.sgl import SelfGuided
from umda_fast.sgl.outliers import outlier_tasks
from umda_fast.train.checkpoint import TrainingState

__all__ = ["outliers", "summary", "versions"]


def summary(
    config: RunConfig,
    datasets: Mapping[str, BagDataset],
    split: str,
    result: SplitResult,
    run: RunDirectory,
    state: TrainingState,
    *,
    scaling: Sequence[str],
    guided: SelfGuided | None,
    linear: Mapping[str, Any] | None,
    kept: Mapping[str, Any],
    processes: int,
    peak_memory: float,
) -> dict[str, Any]:
    """The content of metrics.json.

    Args:
        config, datasets, run: of the run; its metrics.jsonl is there.
        split: of `datasets`, that `result` was measured on.
        state: where the training ended.
        scaling: how the features of every view were scaled, a line each.
        guided: its self-guided learning, if there was any.
        kept: which weights were, see `Selection.kept`.
        linear: what a linear model does beside it, see `beside_linear`.
        processes: that trained together. peak_memory: the highest of them, in MiB.
    """
    stability = [
        record["sgl"] for record in read_metrics(run.log) if record["kind"] == "step" and "sgl" in record
    ]

    def mean(key: str) -> float | None:
        values = [record[key] for record in stability if record.get(key) is not None]
        return sum(values) / len(values) if values else None

    found = {
        "seed": config.seed,
        "data": {
            "source": config.data.source,
            "split": split,
            "views": {view.name: view.width for view in datasets["train"].views},
            "bags": {name: len(dataset) for name, dataset in datasets.items()},
            "instances": {name: int(dataset.sizes.sum()) for name, dataset in datasets.items()},
            "skipped": list(datasets["train"].skipped),
            "scaling": list(scaling),
        },
        "tasks": result.tasks,
        "mean_score": result.mean_score,
        "skill": vars(SkillScale(datasets["train"])(result, datasets[split])),
        "view_consistency": result.view_consistency,
        "gradient_variance": mean("gradient_variance"),
        "conflict_share": mean("conflict_share"),
        "outlier_tasks": outliers(guided),
        "linear": linear,
        "kept": dict(kept),
        "seconds": state.total_seconds,
        "instances_per_second": state.instances_per_second,
        "peak_memory_mb": peak_memory,
        "processes": processes,
        "backend": ops.backends_used(),
    }
    return stamped("metrics", found)


def outliers(guided: SelfGuided | None) -> list[str] | None:
    """Tasks whose gradients conflict with those of the others, see `outlier_tasks`; None without task gradients."""
    if guided is None or not guided.statistics:
        return None
    return outlier_tasks(guided.cosine_ema, guided.tasks)
