"""Public operations: validated, differentiable, dispatched to the fastest backend that serves the call."""

from umda_fast.ops._dispatch import (
    BACKENDS,
    backend_status,
    backends_used,
    get_backend,
    prefer_backend,
    set_backend,
    use_backend,
)
from umda_fast.ops._dropout import dropout_seed
from umda_fast.ops._validate import check_batch, share_checks
from umda_fast.ops.bag_pool import BagPoolOutput, bag_attention_pool
from umda_fast.ops.cross_view import CrossViewOutput, cross_view_attention
from umda_fast.ops.cross_view_tokens import CrossViewTokensOutput, cross_view_token_attention
from umda_fast.ops.dropout_add_norm import dropout_add_norm
from umda_fast.ops.gelu_dropout import gelu_dropout
from umda_fast.ops.graph import NeighborGraph
from umda_fast.ops.knn import knn_graph
from umda_fast.ops.neighbors import edge_cosine, neighbor_attention, neighbor_sum, smoothness_energy
from umda_fast.ops.projections import linear_residual, norm_linear
from umda_fast.ops.representation_gram import representation_gram
from umda_fast.ops.task_gradients import combine_task_gradients, linear_weight_gradient, task_gradient_statistics
from umda_fast.ops.view_fusion import ViewFusionOutput, fuse_views

# After every operation is defined: it registers their batching rules.
from umda_fast.ops import _batching  # noqa: F401  # isort: skip

__all__ = [
    "BACKENDS",
    "BagPoolOutput",
    "CrossViewOutput",
    "CrossViewTokensOutput",
    "NeighborGraph",
    "ViewFusionOutput",
    "backend_status",
    "backends_used",
    "bag_attention_pool",
    "check_batch",
    "combine_task_gradients",
    "cross_view_attention",
    "cross_view_token_attention",
    "dropout_add_norm",
    "dropout_seed",
    "edge_cosine",
    "fuse_views",
    "gelu_dropout",
    "get_backend",
    "knn_graph",
    "linear_residual",
    "linear_weight_gradient",
    "neighbor_attention",
    "neighbor_sum",
    "norm_linear",
    "prefer_backend",
    "representation_gram",
    "set_backend",
    "share_checks",
    "smoothness_energy",
    "task_gradient_statistics",
    "use_backend",
]
