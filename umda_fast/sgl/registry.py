"""Balancers by name."""

from collections.abc import Callable
from typing import Any

from umda_fast.sgl import gram_balancers as of_gram
from umda_fast.sgl import loss_balancers as of_losses
from umda_fast.sgl import norm_balancers as of_norms
from umda_fast.sgl.balancers import Balancer, Equal, FunctionBalancer, SGLBalancer
from umda_fast.sgl.torchjd_adapter import TorchJDBalancer

BALANCERS: dict[str, Callable[..., Balancer]] = {
    "sgl": SGLBalancer,
    "equal": Equal,
    "uncertainty": of_losses.Uncertainty,
    "dwa": of_losses.DWA,
    "rlw": of_losses.RLW,
    "stch": of_losses.STCH,
    "famo": of_losses.FAMO,
    "geometric_mean": of_losses.GeometricMean,
    "imtl_l": of_losses.IMTLL,
    "ldc_mtl": of_losses.LDCMTL,
    "pbi": of_losses.PBI,
    "gradnorm": of_norms.GradNorm,
    "db_mtl": of_norms.DBMTL,
    "excess_mtl": of_norms.ExcessMTL,
    "mgda": of_gram.MGDA,
    "pcgrad": of_gram.PCGrad,
    "gradvac": of_gram.GradVac,
    "rotation": of_gram.Rotation,
    "cagrad": of_gram.CAGrad,
    "conicgrad": of_gram.ConicGrad,
    "imtl_g": of_gram.IMTLG,
    "config": of_gram.ConFIG,
    "nash_mtl": of_gram.NashMTL,
    "fairgrad": of_gram.FairGrad,
    "aligned_mtl": of_gram.AlignedMTL,
    "upgrad": of_gram.UPGrad,
    "dualproj": of_gram.DualProj,
}


def make_balancer(name: str, **options: Any) -> Balancer:
    """A balancer by its name in `BALANCERS`, with the options of its class.

    Raises:
        ValueError: no such name.
    """
    if name not in BALANCERS:
        raise ValueError(f"balancer: expected one of {', '.join(BALANCERS)}, got {name!r}")
    return BALANCERS[name](**options)


def as_balancer(balancer: object) -> Balancer:
    """The balancer itself, one by name, or a function or torchjd object made into one.

    Raises:
        TypeError: it is none of these.
        ValueError: no balancer has this name.
    """
    if isinstance(balancer, Balancer):
        return balancer
    if isinstance(balancer, str):
        return make_balancer(balancer)
    if type(balancer).__module__.partition(".")[0] == "torchjd":
        return TorchJDBalancer(balancer)
    if callable(balancer):
        return FunctionBalancer(balancer)
    got = type(balancer).__name__
    raise TypeError(f"balancer: expected a Balancer, a name or a function of the Gram matrix, got {got}")
