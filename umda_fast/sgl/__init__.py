"""Self-guided learning: per-task gradient statistics, balancers, telemetry. Usable with any PyTorch model."""

from umda_fast.sgl.balancers import Balancer, Equal, FunctionBalancer, SGLBalancer, StatefulBalancer
from umda_fast.sgl.self_guided import Scope, SelfGuided, SGLStep

__all__ = [
    "Balancer",
    "Equal",
    "FunctionBalancer",
    "SGLBalancer",
    "SGLStep",
    "Scope",
    "SelfGuided",
    "StatefulBalancer",
]
