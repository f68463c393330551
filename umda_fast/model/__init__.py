"""The model and its blocks, each usable alone: nn.Modules over the operations of `umda_fast.ops`."""

from umda_fast.model.atsb import ATSB, ATSBOutput, TaskNorm, cohesion_penalty, divergence_penalty
from umda_fast.model.config import UMDAConfig
from umda_fast.model.encoders import FeatureEncoder, QuantileBins, ViewEncoders
from umda_fast.model.ensemble import Ensemble, EnsembleOutput
from umda_fast.model.experts import ExpertGates, Experts
from umda_fast.model.film import FiLM
from umda_fast.model.fusion import ViewConsistency, ViewFusion, dispersion_penalty
from umda_fast.model.gmip import (
    GMIP,
    BagPooling,
    BagPoolingOutput,
    GMIPOutput,
    MessagePassing,
    diversity_penalty,
)
from umda_fast.model.hcva import HCVA, HCVABlock, HCVAOutput, concentration_penalty
from umda_fast.model.losses import decode, penalty_loss, task_losses, view_losses
from umda_fast.model.mixture import Mixture, with_members
from umda_fast.model.output import UMDAOutput
from umda_fast.model.pooled import PooledInstances
from umda_fast.model.specs import TASK_KINDS, MetadataSpec, TaskKind, TaskSpec, ViewSpec
from umda_fast.model.umda import UMDA
from umda_fast.model.view_heads import ViewHeads, ViewLogits

__all__ = [
    "ATSB",
    "GMIP",
    "HCVA",
    "TASK_KINDS",
    "UMDA",
    "ATSBOutput",
    "BagPooling",
    "BagPoolingOutput",
    "Ensemble",
    "EnsembleOutput",
    "ExpertGates",
    "Experts",
    "FeatureEncoder",
    "FiLM",
    "GMIPOutput",
    "HCVABlock",
    "HCVAOutput",
    "MessagePassing",
    "MetadataSpec",
    "Mixture",
    "PooledInstances",
    "QuantileBins",
    "TaskKind",
    "TaskNorm",
    "TaskSpec",
    "UMDAConfig",
    "UMDAOutput",
    "ViewConsistency",
    "ViewEncoders",
    "ViewFusion",
    "ViewHeads",
    "ViewLogits",
    "ViewSpec",
    "cohesion_penalty",
    "concentration_penalty",
    "decode",
    "dispersion_penalty",
    "divergence_penalty",
    "diversity_penalty",
    "penalty_loss",
    "task_losses",
    "view_losses",
    "with_members",
]
