"""The model of a run, measured on a split of its own data or of others."""

from __future__ import annotations

from collections.abc import Mapping

from umda_fast import ops
from umda_fast.data import BagDataset
from umda_fast.errors import DataError
from umda_fast.score.evaluation import SplitResult, evaluate_dataset
from umda_fast.train.data import measured_split, model_data
from umda_fast.train.loading import Run

__all__ = ["evaluate"]


def evaluate(
    run: Run,
    *,
    source: str | None = None,
    split: str | None = None,
    datasets: Mapping[str, BagDataset] | None = None,
    format: str | None = None,
    device: str = "auto",
    backend: str = "auto",
    skip_bad: bool = False,
    progress: bool = True,
) -> SplitResult:
    """The model of a run on a split of its own data, of `source`, or of `datasets`.

    Args:
        split: train, val or test, as the run recorded its bags (splits.csv), or as other data says itself; `new`, bags
            that came since; `all`, every bag but those that the run was trained or validated on. None: the test split
            of the run's own data and of `datasets`, `all` of other data.

    Raises:
        DataError: there is no such split, or the data does not fit the model; members of an ensemble were trained on
            different data or splits.
    """
    if datasets is None:
        split = measured_split(run, source, split)
    dataset, fabric = model_data(
        run,
        source=source,
        datasets=datasets,
        split=split or "test",
        format=format,
        device=device,
        skip_bad=skip_bad,
        measured=True,
    )
    if len(dataset) == 0:
        raise DataError(f"{source or run.config.data.source}: split {split!r} holds no bags to evaluate on")
    model = fabric.to_device(run.model)
    with ops.prefer_backend(backend):
        return evaluate_dataset(model, dataset, fabric, run.config.data, progress=progress)
