"""Which epoch's weights are kept: what `train.select` makes of an evaluation, higher is better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from umda_fast.model import TaskSpec
from umda_fast.runtime.config import ConfigError
from umda_fast.score.evaluation import SplitResult
from umda_fast.score.skill import Skill
from umda_fast.tasks import kind_of
from umda_fast.tasks.metric_names import METRIC_NAMES
from umda_fast.train.checkpoint import TrainingState

__all__ = ["Selection"]

_WHOLE = ("skill", "mean_score", "loss", "last")


class Selection:
    """Scores an evaluation by `train.select`.

    One set of weights is kept for all tasks: heads of different epochs do not fit one trunk, and a trunk for each task
    would be as many models. That one task overfits while others still learn costs it what it had, and the others
    nothing: a skill lies between 0 and 1, so it can take no more than its own share out of the mean.

    Args:
        select: as in the configuration.
        tasks: of the model.

    Raises:
        ConfigError: `select` names no task or metric of these, or a metric of which it is not known whether more is
            better.
    """

    def __init__(self, select: str, tasks: Sequence[TaskSpec]) -> None:
        self.select = select
        self.task, _, self.metric = select.rpartition("/")
        self.lower = select == "loss"
        if select in _WHOLE:
            return
        known = {task.name: kind_of(task).metrics(task) for task in tasks}
        if self.metric not in known.get(self.task, ()):
            metrics = [f"{task}/{metric}" for task, metrics in known.items() for metric in metrics]
            raise ConfigError(f"train.select: expected one of {', '.join([*_WHOLE, *metrics])}, got {select!r}")
        self.lower = self._lower_is_better(known[self.task][self.metric])

    def _lower_is_better(self, metric: Any) -> bool:
        """By the name, or, of a metric that a kind from outside brings along, by what the metric says of itself."""
        if self.metric in METRIC_NAMES:
            return METRIC_NAMES[self.metric].lower_is_better
        if metric.higher_is_better is None:
            raise ConfigError(
                f"train.select: {self.select}: whether more of it is better is not known: expected `higher_is_better` "
                f"of {type(metric).__name__} to be True or False, got None"
            )
        return not metric.higher_is_better

    def score(self, result: SplitResult, skill: Skill) -> float:
        """NaN where there is nothing to go by: the last weights are then the best known."""
        if self.select == "skill":
            return skill.mean
        if self.select == "mean_score":
            return result.mean_score
        if self.select == "loss":
            losses = [loss for loss in result.losses.values() if math.isfinite(loss)]
            return -sum(losses) if losses else math.nan
        if self.select == "last":
            return math.nan
        value = result.tasks[self.task][self.metric]
        return -value if self.lower else value

    def value(self, score: float) -> float:
        """What a score is of, as it is known: a loss is positive."""
        return -score if self.lower else score

    def show(self, score: float) -> str:
        """A score, in words."""
        return f"{self.select} {self.value(score):.4f}"

    def kept(self, state: TrainingState) -> dict[str, Any]:
        """Which weights a training kept, for metrics.json: `select`, the `epoch`, counted from 0, the `split` that
        decided, and the `score` there; both None where nothing did, and the last weights are kept."""
        decided = math.isfinite(state.best_score)
        score = self.value(state.best_score) if decided else None
        return {"select": self.select, "epoch": state.best_epoch, "split": "val" if decided else None, "score": score}
