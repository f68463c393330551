"""Conditioning on what is known of a bag beside its instances.

Source: Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer", AAAI 2018.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from umda_fast.model._numerics import Constants
from umda_fast.model.specs import MetadataSpec

__all__ = ["FiLM"]


class FiLM(Constants):
    """`x[b] <- (1 + scale_b) x[b] + shift_b`, scale and shift from the bag's metadata through one hidden layer.

    The last layer starts at zero: an untrained FiLM changes nothing. Metadata are standardised by the means and
    deviations of their specs; a missing value (NaN) counts as the mean, and one more input per value says whether
    it is there.

    Args:
        metadata: the M values of a bag. width: D. hidden: units of the hidden layer.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, metadata: Sequence[MetadataSpec], width: int, hidden: int = 32) -> None:
        super().__init__()
        self.register_constant("mean", [value.mean for value in metadata])
        self.register_constant("std", [value.std for value in metadata])
        self.hidden = nn.Linear(2 * len(metadata), hidden)
        self.output = nn.Linear(hidden, 2 * width)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor, metadata: Tensor) -> Tensor:
        """x [B, ..., D]; metadata floating [B, M], NaN where missing. Returns the shape of x.

        Raises:
            ValueError: metadata of another shape.
        """
        if metadata.shape != (x.shape[0], len(self.mean)):
            raise ValueError(
                f"metadata must have shape [{x.shape[0]}, {len(self.mean)}], got {list(metadata.shape)}"
            )
        there = ~metadata.isnan()
        values = ((metadata.to(self.mean.dtype) - self.mean) / self.std).masked_fill(~there, 0.0)
        inputs = torch.cat([values, there.to(values.dtype)], dim=1).to(self.hidden.weight.dtype)
        scale, shift = self.output(nn.functional.gelu(self.hidden(inputs))).chunk(2, dim=1)
        shape = (x.shape[0], *[1] * (x.dim() - 2), x.shape[-1])
        out: Tensor = (x * (1 + scale.view(shape)) + shift.view(shape)).to(x.dtype)
        return out
