"""Training, evaluation and prediction: everything behind the `umda-fast` command, callable from Python.

Needs the extra `train`.
"""

from umda_fast.train.compare import compare_models, comparison_markdown
from umda_fast.train.config import (
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
from umda_fast.train.crossval import cross_validate
from umda_fast.train.evaluation import SplitResult
from umda_fast.train.files import write_json
from umda_fast.train.guard import NonFiniteError
from umda_fast.train.predict import predict
from umda_fast.train.run import (
    Run,
    RunResult,
    build_model,
    evaluate,
    load_data,
    load_ensemble,
    load_run,
    run_config,
    train,
)
from umda_fast.train.trainer import Trainer

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
    "run_config",
    "train",
    "write_json",
]
