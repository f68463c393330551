"""Self-attention between the instances of a bag."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from umda_fast.model.baselines.base import BaselineConfig, OneEncoder, Pooled
from umda_fast.model.gmip import bag_index

__all__ = ["TransMIL", "TransMILConfig"]


@dataclass(frozen=True)
class TransMILConfig(BaselineConfig):
    """`heads`, `layers`: of the transformer."""

    heads: int = 4
    layers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise ValueError(f"heads: expected a divisor of width = {self.width}, got {self.heads}")

    def _counts(self) -> tuple[str, ...]:
        return ("width", "heads", "layers")


class TransMIL(OneEncoder):
    """Self-attention between the instances of a bag and a class token, which is the bag's vector.

    After Shao et al., "TransMIL: Transformer based correlated multiple instance learning", NeurIPS 2021; with exact
    softmax attention in place of the Nyström approximation and without its convolutions over positions. Memory grows
    with the square of the largest bag.
    """

    architecture = "transmil"
    config_class = TransMILConfig

    def __init__(self, config: TransMILConfig) -> None:
        super().__init__(config)
        width = config.width
        self.token_embedding = nn.Parameter(torch.zeros(width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, config.heads, 2 * width, config.dropout, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(config.layers - 1)
        )
        self.norm = nn.LayerNorm(width)
        self.read = nn.MultiheadAttention(width, config.heads, batch_first=True)

    def pool(self, z: Tensor, ptr: Tensor) -> Pooled:
        bag, sizes = bag_index(ptr, len(z)), ptr.diff()
        longest = int(sizes.max()) if len(sizes) else 0
        place = torch.arange(len(z), device=z.device) - ptr[bag] + 1
        x = z.new_zeros(len(sizes), longest + 1, z.shape[1]).index_put((bag, place), z)
        x = torch.cat([self.token_embedding.to(z.dtype).expand(len(x), 1, -1), x[:, 1:]], dim=1)
        absent = torch.arange(longest + 1, device=z.device) > sizes[:, None]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=absent)
        x = self.norm(x)
        read, weights = self.read(x[:, :1], x, x, key_padding_mask=absent)
        seen = weights[:, 0, 1:]
        seen = seen / seen.sum(1, keepdim=True).clamp_min(torch.finfo(seen.dtype).tiny)
        entropy = -torch.xlogy(seen, seen).sum(1, keepdim=True)
        return Pooled(read + x[:, :1], seen[bag, place - 1][:, None], entropy)
