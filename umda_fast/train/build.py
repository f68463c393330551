"""The configured model for the views and tasks of some bags."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from umda_fast.data import BagDataset
from umda_fast.model import UMDA, UMDAConfig
from umda_fast.model.baselines import BASELINES, Baseline
from umda_fast.runtime.config import ARCHITECTURES, ConfigError, RunConfig

__all__ = ["build_model"]


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
