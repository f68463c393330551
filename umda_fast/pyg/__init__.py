"""Modules for users of torch_geometric: message passing, pooling and graphs on the operations of `umda_fast.ops`.

Needs the extra ``graph``.
"""

# ruff: noqa: E402 - what is missing is named before anything is imported

from umda_fast.extras import require

require("umda_fast.pyg", "torch_geometric")

from umda_fast.pyg.aggregation import MultiTaskAttentionAggregation
from umda_fast.pyg.convolution import NeighborAttentionConv
from umda_fast.pyg.knn import knn_edge_index

__all__ = ["MultiTaskAttentionAggregation", "NeighborAttentionConv", "knn_edge_index"]
