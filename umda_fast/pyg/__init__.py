"""Modules for users of torch_geometric: message passing, pooling and graphs on the operations of `umda_fast.ops`.

Needs the extra ``graph``.
"""

try:
    import torch_geometric  # noqa: F401
except ImportError as error:
    raise ImportError("umda_fast.pyg needs torch_geometric: pip install 'umda_fast[graph]'") from error

from umda_fast.pyg.aggregation import MultiTaskAttentionAggregation
from umda_fast.pyg.convolution import NeighborAttentionConv
from umda_fast.pyg.knn import knn_edge_index

__all__ = ["MultiTaskAttentionAggregation", "NeighborAttentionConv", "knn_edge_index"]
