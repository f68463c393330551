"""Self-guided learning: per-task gradient statistics, balancers, telemetry. Usable with any PyTorch model."""

from umda_fast.sgl.balancers import Balancer, Equal, FunctionBalancer, SGLBalancer, StatefulBalancer
from umda_fast.sgl.batch import SGLStep
from umda_fast.sgl.gram_balancers import (
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    FairGrad,
    GradVac,
    NashMTL,
    PCGrad,
    Rotation,
    UPGrad,
)
from umda_fast.sgl.loss_balancers import DWA, FAMO, RLW, STCH, GradNorm, Uncertainty
from umda_fast.sgl.registry import BALANCERS, make_balancer
from umda_fast.sgl.scopes import Scope
from umda_fast.sgl.self_guided import SelfGuided
from umda_fast.sgl.sharpness import ascended
from umda_fast.sgl.torchjd_adapter import TorchJDBalancer

__all__ = [
    "BALANCERS",
    "DWA",
    "FAMO",
    "IMTLG",
    "MGDA",
    "RLW",
    "STCH",
    "AlignedMTL",
    "Balancer",
    "CAGrad",
    "ConFIG",
    "DualProj",
    "Equal",
    "FairGrad",
    "FunctionBalancer",
    "GradNorm",
    "GradVac",
    "NashMTL",
    "PCGrad",
    "Rotation",
    "SGLBalancer",
    "SGLStep",
    "Scope",
    "SelfGuided",
    "StatefulBalancer",
    "TorchJDBalancer",
    "UPGrad",
    "Uncertainty",
    "ascended",
    "make_balancer",
]
