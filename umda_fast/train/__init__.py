"""One run: training, and what is read back from its directory.

Needs the extra `train`. What is done with runs is in `umda_fast.studies`; the names of it that used to be here are
still found here.
"""

# ruff: noqa: E402 - what is missing is named before anything is imported

from umda_fast.extras import TRAINING, require

require("umda_fast.train", *TRAINING)

from typing import TYPE_CHECKING, Any

from umda_fast.files import write_json
from umda_fast.runtime.config import (
    ConfigError,
    DataConfig,
    PenaltyConfig,
    RunConfig,
    SGLConfig,
    TrainConfig,
    dump_config,
    load_config,
    make_config,
)
from umda_fast.runtime.guard import NonFiniteError
from umda_fast.score.evaluation import SplitResult
from umda_fast.train.build import build_model
from umda_fast.train.data import load_data
from umda_fast.train.loading import Run, load_ensemble, load_run, run_config
from umda_fast.train.measure import evaluate
from umda_fast.train.profile import profile_steps
from umda_fast.train.run import RunResult, train
from umda_fast.train.trainer import Trainer

if TYPE_CHECKING:
    from umda_fast.studies import compare_models, comparison_markdown, cross_validate, predict

__all__ = [
    "ConfigError",
    "DataConfig",
    "NonFiniteError",
    "PenaltyConfig",
    "Run",
    "RunConfig",
    "RunResult",
    "SGLConfig",
    "SplitResult",
    "TrainConfig",
    "Trainer",
    "build_model",
    "compare_models",
    "comparison_markdown",
    "cross_validate",
    "dump_config",
    "evaluate",
    "load_config",
    "load_data",
    "load_ensemble",
    "load_run",
    "make_config",
    "predict",
    "profile_steps",
    "run_config",
    "train",
    "write_json",
]

# The one door that leads up (tests/test_floors.py): these were public here before `studies` had a room of its own.
_MOVED = ("compare_models", "comparison_markdown", "cross_validate", "predict")


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module 'umda_fast.train' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("umda_fast.studies"), name)
