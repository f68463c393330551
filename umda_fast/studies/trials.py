"""Which configuration to try next, by Optuna: a seeded search on a finite grid, kept in a journal."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import optuna

__all__ = ["Chosen", "Value", "choose"]

Value = float | bool | str


@dataclass(frozen=True)
class Chosen:
    """Attributes:
    trials: the values of different configurations and their scores, as they were tried; None of a failure.
    """

    trials: Sequence[tuple[Mapping[str, Value], float | None]]

    @property
    def given(self) -> Mapping[str, Value]:
        """Those of the first, which was configured."""
        return self.trials[0][0]

    @property
    def best(self) -> Mapping[str, Value]:
        """Those of the highest score; of equal ones the first."""
        return max(self.trials, key=lambda trial: -math.inf if trial[1] is None else trial[1])[0]

    def listed(self) -> list[dict[str, Any]]:
        """As reports have them."""
        return [{"values": dict(values), "score": score} for values, score in self.trials]


def choose(
    score: Callable[[Mapping[str, Value]], float | None],
    choices: Mapping[str, Sequence[Value]],
    trials: int,
    *,
    journal: Path,
    study: str,
    seed: Sequence[int],
    tell: Callable[[int, Mapping[str, Value], float | None], None],
) -> Chosen:
    """Try `trials` different configurations, or all that there are, for the highest score: first the first choice of
    every key, then those of Optuna's tree-structured Parzen estimator (Bergstra et al., "Algorithms for
    hyper-parameter optimization", 2011), after its ten first ones at random.

    What is tried depends on the seed and on what is finished alone, so that a search which was stopped goes on as if it
    had not been.

    Args:
        score: of one value for every key, in 0..1; None if there is none.
        choices: of every key.
        journal, study: the file of the journal, and the name in it.
        seed: of this study.
        tell: what is told of every trial: which one it is, from 1, its values and its score.
    """
    import optuna

    grid = math.prod(len(values) for values in choices.values())
    distributions: dict[str, Any] = {
        key: optuna.distributions.CategoricalDistribution(tuple(values)) for key, values in choices.items()
    }
    with _quiet():
        kept = _opened(journal, study)
        for trial in kept.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            kept.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # stopped; it will be asked for again
        while True:
            finished = kept.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
            tried = {tuple(trial.params[key] for key in choices): trial for trial in finished}
            # The estimator may ask for the same again and again where it is sure: that costs nothing, but has an end.
            if len(tried) >= min(trials, grid) or len(finished) >= 20 * trials:
                break
            if finished:
                own = np.random.SeedSequence([*seed, len(finished)]).generate_state(1)
                kept.sampler = optuna.samplers.TPESampler(seed=int(own[0]))
            else:
                kept.enqueue_trial({key: values[0] for key, values in choices.items()})
            asked = kept.ask(distributions)
            values = {key: asked.params[key] for key in choices}
            before = tried.get(tuple(values.values()))
            found = score(values) if before is None else before.user_attrs["score"]
            asked.set_user_attr("score", found)
            kept.tell(asked, 0.0 if found is None else found)  # no worse a score than 0 is possible
            if before is None:
                tell(len(tried) + 1, values, found)
    order = sorted({tuple(t.params[key] for key in choices): t for t in reversed(finished)}.values(), key=_number)
    return Chosen([({key: t.params[key] for key in choices}, t.user_attrs["score"]) for t in order])


def _number(trial: optuna.trial.FrozenTrial) -> int:
    number: int = trial.number  # of any type where optuna is not installed
    return number


def _opened(journal: Path, study: str) -> optuna.Study:
    """The study in the journal, without the half of a line that a process which was killed may have left in it."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    journal.parent.mkdir(parents=True, exist_ok=True)
    if journal.is_file():
        text = journal.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            os.truncate(journal, whole)
    backend = JournalFileBackend(os.fspath(journal))
    return optuna.create_study(
        storage=optuna.storages.JournalStorage(backend), study_name=study, direction="maximize", load_if_exists=True
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's own lines on standard error."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
