"""umda_fast: unified multitask, multiview deep learning on bags of instances.

Names are imported on first use, so that ``import umda_fast`` (and ``umda-fast --help``) costs nothing.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "TaskSpec": "umda_fast.model",
    "UMDA": "umda_fast.model",
    "UMDAConfig": "umda_fast.model",
    "UMDAOutput": "umda_fast.model",
    "ViewSpec": "umda_fast.model",
    "SelfGuided": "umda_fast.sgl",
    "set_backend": "umda_fast.ops",
    "use_backend": "umda_fast.ops",
}

if TYPE_CHECKING:
    from umda_fast.model import UMDA, TaskSpec, UMDAConfig, UMDAOutput, ViewSpec
    from umda_fast.ops import set_backend, use_backend
    from umda_fast.sgl import SelfGuided

__all__ = [
    "UMDA",
    "SelfGuided",
    "TaskSpec",
    "UMDAConfig",
    "UMDAOutput",
    "ViewSpec",
    "__version__",
    "set_backend",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'umda_fast' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
