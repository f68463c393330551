"""What is done with trained models and with many runs: predictions, maps, reports, comparisons, new heads.

Needs the extra `train`.
"""

# ruff: noqa: E402 - what is missing is named before anything is imported

from umda_fast.extras import TRAINING, require

require("umda_fast.studies", *TRAINING)

from umda_fast.studies.compare import compare_models, comparison_markdown
from umda_fast.studies.crossval import cross_validate
from umda_fast.studies.maps import explain
from umda_fast.studies.predict import predict
from umda_fast.studies.readapt import readapt
from umda_fast.studies.report import write_report
from umda_fast.studies.search import search
from umda_fast.studies.shots import few_shot

__all__ = [
    "compare_models",
    "comparison_markdown",
    "cross_validate",
    "explain",
    "few_shot",
    "predict",
    "readapt",
    "search",
    "write_report",
]
