"""Self-guided learning: per-task gradient statistics, balancers, telemetry. Usable with any PyTorch model."""

from umda_fast.sgl.balancers import Balancer, Equal, FunctionBalancer, SGLBalancer, StatefulBalancer
from umda_fast.sgl.batch import SGLStep
from umda_fast.sgl.gram_balancers import (
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    ConFIG,
    ConicGrad,
    DualProj,
    FairGrad,
    GradVac,
    NashMTL,
    PCGrad,
    Rotation,
    UPGrad,
)
from umda_fast.sgl.loss_balancers import DWA, FAMO, IMTLL, LDCMTL, PBI, RLW, STCH, GeometricMean, Uncertainty
from umda_fast.sgl.norm_balancers import DBMTL, ExcessMTL, GradNorm
from umda_fast.sgl.registry import BALANCERS, make_balancer
from umda_fast.sgl.scopes import Scope
from umda_fast.sgl.self_guided import SelfGuided
from umda_fast.sgl.sharpness import ascended
from umda_fast.sgl.torchjd_adapter import TorchJDBalancer

__all__ = [
    "BALANCERS",
    "DBMTL",
    "DWA",
    "FAMO",
    "IMTLG",
    "IMTLL",
    "LDCMTL",
    "MGDA",
    "PBI",
    "RLW",
    "STCH",
    "AlignedMTL",
    "Balancer",
    "CAGrad",
    "ConFIG",
    "ConicGrad",
    "DualProj",
    "Equal",
    "ExcessMTL",
    "FairGrad",
    "FunctionBalancer",
    "GeometricMean",
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
