"""umda_fast: unified multitask, multiview deep learning on bags of instances."""

__version__ = "0.1.0"

from umda_fast.model import UMDA, TaskSpec, UMDAConfig, ViewSpec
from umda_fast.ops import set_backend, use_backend

__all__ = ["UMDA", "TaskSpec", "UMDAConfig", "ViewSpec", "__version__", "set_backend", "use_backend"]
