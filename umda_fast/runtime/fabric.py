"""Fabric for a run: its device and precision, and the process group of all that torchrun started."""

from __future__ import annotations

import atexit
import logging
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy

from umda_fast.errors import DataError
from umda_fast.runtime.config import ConfigError, RunConfig
from umda_fast.sgl.distributed import Processes

__all__ = ["make_fabric", "processes_of"]

# How long a process waits for another before it stops; the longest thing that one does alone, while the others
# wait, is to write a checkpoint.
TIMEOUT = 600.0


def make_fabric(config: RunConfig) -> Fabric:
    """Fabric on the configured device; under torchrun, with the process group of all that it started.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: expected a device of this machine, got 'cuda', but torch sees no GPU")
    accelerator = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    local, world = _started_together()
    if world == 1:
        return Fabric(accelerator=accelerator, devices=1, precision=config.precision)
    fabric = Fabric(
        accelerator=accelerator,
        devices=local,
        num_nodes=world // local,
        strategy=_strategy(),
        precision=config.precision,
    )
    fabric.launch()
    return fabric


def processes_of(fabric: Fabric) -> Processes | None:
    """The processes of the run; None where there is one."""
    if fabric.world_size == 1:
        return None
    assert dist.group.WORLD is not None
    return Processes(dist.group.WORLD)


def _started_together() -> tuple[int, int]:
    """Processes on this machine and in all, as torchrun started them; (1, 1) without it."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return 1, 1
    return int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])


def _strategy() -> DDPStrategy:
    """Fabric's strategy for a process group: gloo on the CPU, NCCL on GPUs.

    The variable `UMDA_FAST_TIMEOUT` says how many seconds a process waits for another.

    Raises:
        DataError: it is not a positive number.
    """
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # says that processes have found each other
    text = os.environ.get("UMDA_FAST_TIMEOUT", "")
    try:
        seconds = float(text) if text else TIMEOUT
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise DataError(f"UMDA_FAST_TIMEOUT: expected seconds, more than 0, got {text!r}")
    atexit.unregister(_leave)
    atexit.register(_leave)
    return DDPStrategy(timeout=timedelta(seconds=seconds))


def _leave() -> None:
    # gloo's threads must end before the interpreter does.
    if dist.is_initialized():
        dist.destroy_process_group()
