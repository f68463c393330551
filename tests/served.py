"""A model as another program is given it, for tests of export and of ahead-of-time compilation."""

import torch
from torch import Tensor, nn

from umda_fast.model import UMDA


class Predict(nn.Module):
    """`UMDAOutput` holds a graph, which no exported program returns."""

    def __init__(self, model: UMDA) -> None:
        super().__init__()
        self.model = model

    def forward(self, views: dict[str, Tensor], ptr: Tensor, mask: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        out = self.model(views, ptr, mask)
        return out.logits, out.attention


def bags(*sizes: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Two views of bags of these sizes, some missing."""
    generator = torch.Generator().manual_seed(len(sizes))
    n = sum(sizes)
    mask = torch.rand(n, 2, generator=generator) > 0.3
    mask[:, 0] = True
    views = {"a": torch.randn(n, 6, generator=generator), "b": torch.randn(n, 4, generator=generator)}
    return views, torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()]), mask
