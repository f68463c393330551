"""Where a training step spends its time, block by block (docs/profiling.md)."""

from umda_fast.profiling.steps import RESULT, TRACE, WARMUP, StepProfile
from umda_fast.profiling.table import copy_rate

__all__ = ["RESULT", "TRACE", "WARMUP", "StepProfile", "copy_rate"]
