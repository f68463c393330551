"""Run as a process of its own: trains the run of the resume test and kills itself with SIGKILL at a given
step.

python -m tests.train.killed DIRECTORY STEP
"""

import os
import signal
import sys
from typing import Any

from tests.small import small_config
from umda_fast.data import BagBatch
from umda_fast.train import train
from umda_fast.train.step import StepResult, TrainStep

RESUMED_RUN: dict[str, Any] = {
    "train": {"epochs": 3, "log_steps": 1, "checkpoint_steps": 3, "ema": 0.9, "linear": "mix"},
    "model": {"width": 16, "heads": 2, "layers": 1, "dropout": 0.2, "view_heads": True},
    "sgl": {"scope": "shared_parameters", "every": 2},
}


def main(directory: str, step: int) -> None:
    original = TrainStep.__call__

    def train_step(self: TrainStep, host: BagBatch, progress: float, number: int) -> StepResult:
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, host, progress, number)

    TrainStep.__call__ = train_step  # type: ignore[method-assign]
    train(small_config(**RESUMED_RUN), directory, progress=False, plots=False)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
