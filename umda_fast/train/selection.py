"""Which epoch's weights are kept: what `train.select` makes of an evaluation, higher is better."""

from __future__ import annotations

import math
from collections.abc import Sequence

from umda_fast.model import TaskSpec
from umda_fast.runtime.config import ConfigError
from umda_fast.score.evaluation import SplitResult
from umda_fast.score.skill import Skill
from umda_fast.tasks import kind_of
from umda_fast.tasks.metric_names import metric_name

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
        ConfigError: `select` names no task or metric of these.
    """

    def __init__(self, select: str, tasks: Sequence[TaskSpec]) -> None:
        self.select = select
        self.task, _, self.metric = select.rpartition("/")
        if select in _WHOLE:
            return
        known = {task.name: list(kind_of(task).metrics(task)) for task in tasks}
        if self.metric not in known.get(self.task, ()):
            metrics = [f"{task}/{metric}" for task, metrics in known.items() for metric in metrics]
            raise ConfigError(f"train.select: expected one of {', '.join([*_WHOLE, *metrics])}, got {select!r}")

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
        return -value if metric_name(self.metric).lower_is_better else value

    def show(self, score: float) -> str:
        """A score, in words."""
        lower = self.select == "loss" or (self.select not in _WHOLE and metric_name(self.metric).lower_is_better)
        return f"{self.select} {-score if lower else score:.4f}"
