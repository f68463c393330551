"""Multi-task attention pooling with torch_geometric's interface."""

import torch
from torch import Tensor, nn
from torch_geometric.nn.aggr import Aggregation
from torch_geometric.nn.inits import reset

from umda_fast.ops import bag_attention_pool
from umda_fast.pyg._index import to_ptr


class GatedAttention(nn.Module):
    """Scores of T tasks, ``w_t (tanh(V x) * sigmoid(U x))`` (Ilse et al. 2018, equation 9), V and U shared.

    Args:
        in_channels: width of x.
        hidden_channels: width between.
        num_tasks: T.
    """

    def __init__(self, in_channels: int, hidden_channels: int, num_tasks: int) -> None:
        super().__init__()
        self.value = nn.Linear(in_channels, hidden_channels)
        self.gate = nn.Linear(in_channels, hidden_channels)
        # A bias would cancel in the softmax.
        self.score = nn.Linear(hidden_channels, num_tasks, bias=False)

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        for linear in (self.value, self.gate, self.score):
            linear.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_channels] to [..., T]."""
        out: Tensor = self.score(torch.tanh(self.value(x)) * torch.sigmoid(self.gate(x)))
        return out


class MultiTaskAttentionAggregation(Aggregation):
    """Pool every group once per task, weighted by a softmax of gated attention scores, in one pass over x.

    ``out[b,t] = sum_i softmax_{i in b}(score_t(x_i)) x_i`` (Ilse et al. 2018, with T scores): for T = 1 what
    ``torch_geometric.nn.aggr.AttentionalAggregation`` computes. Usable as global pooling, and as ``aggr`` of a
    ``MessagePassing`` layer whose edges are sorted by target.

    Args:
        in_channels: D, width of x.
        num_tasks: T.
        hidden_channels: width of the gated attention.
        concat: whether the tasks are concatenated, [B, T * D] (task-major), as the next layer or an ``aggr``
            wants it; or kept apart, [B, T, D].
        gate_nn: a module from [N, D] to scores [N, T] in place of gated attention.
        backend: see `umda_fast.set_backend`.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        in_channels: int,
        num_tasks: int = 1,
        hidden_channels: int = 128,
        *,
        concat: bool = True,
        gate_nn: nn.Module | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in_channels": in_channels, "num_tasks": num_tasks, "hidden_channels": hidden_channels}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.in_channels = in_channels
        self.num_tasks = num_tasks
        self.concat = concat
        self.gate_nn = GatedAttention(in_channels, hidden_channels, num_tasks) if gate_nn is None else gate_nn
        self.backend = backend

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        reset(self.gate_nn)

    def forward(
        self,
        x: Tensor,
        index: Tensor | None = None,
        ptr: Tensor | None = None,
        dim_size: int | None = None,
        dim: int = -2,
        max_num_elements: int | None = None,
    ) -> Tensor:
        """Pool.

        Args:
            x: [N, D], float32, bfloat16 or float16 (float64 on the reference).
            index: int64 [N], sorted: the group of every row. Neither this nor ``ptr``: one group.
            ptr: int64 [B+1], offsets of the groups; used where both are given.
            dim_size: B, where ``index`` may lack the last groups. A group without rows gives 0.
            dim: the dimension of N: -2 or 0.
            max_num_elements: part of the interface; any size is pooled, so nothing depends on it.

        Returns:
            [B, T * D], or [B, T, D] with ``concat=False``.

        Raises:
            TypeError, ValueError: an argument of another dtype or shape; ``index`` not sorted or not in
                0..dim_size-1.
        """
        self.assert_two_dimensional_input(x, dim)
        if ptr is None:
            if index is None:
                index = x.new_zeros(x.shape[0], dtype=torch.int64)
            ptr = to_ptr(index, "index", x.shape[0], dim_size, "dim_size")
        pooled = bag_attention_pool(x, self.gate_nn(x), ptr, backend=self.backend).pooled
        return pooled.flatten(1) if self.concat else pooled

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, num_tasks={self.num_tasks}, concat={self.concat})"
