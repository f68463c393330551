"""Triton reads TRITON_INTERPRET when it is imported: a process either interprets kernels or compiles them.

A plain pytest run collects what compiles, and ``test_interpreter.py``, which runs the rest in processes of
their own with TRITON_INTERPRET=1. With that variable set, pytest collects the interpreted tests directly.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
COMPILED_MODULES = ("test_compile.py", "test_interpreter.py")
INTERPRETED_MODULES = sorted({path.name for path in Path(__file__).parent.glob("test_*.py")} - {*COMPILED_MODULES})
collect_ignore = [*(COMPILED_MODULES if INTERPRETED else INTERPRETED_MODULES)]


# What somebody measured on this machine is not what is tested.
os.environ["UMDA_FAST_TUNING"] = str(Path(__file__).with_name("no-such-file.json"))


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.empty`` holds NaN (or the lowest integer), so that an element nobody wrote is seen."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        x = empty(*args, **kwargs)
        if x.device.type != "meta" and x.dtype != torch.bool:
            x.fill_(float("nan") if x.dtype.is_floating_point else torch.iinfo(x.dtype).min)
        return x

    monkeypatch.setattr(torch, "empty", poisoned)
