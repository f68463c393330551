"""View encoders (docs/model.md, section 0): features of every view to vectors of one width."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umda_fast.model.residual import rate
from umda_fast.model.specs import ViewSpec
from umda_fast.ops import _validate, gelu_dropout

__all__ = ["FeatureEncoder", "QuantileBins", "ViewEncoders"]


class QuantileBins(nn.Module):
    """How far a value is through each bin of its feature, [n, features] -> [n, features * bins]: -1 before the bin, 1
    after it, linear inside.

    A linear map of it is any piecewise linear function of each feature with its kinks at the bins' edges: what trees
    do well with few examples and a network does not (effects that rise and fall along one feature, features whose
    ranks matter and not their sizes). `lower` and `size` (buffers [features, bins]) are set by `set_edges`.

    Method: piecewise linear encoding of Gorishniy, Rubachev and Babenko, "On Embeddings for Numerical Features in
    Tabular Deep Learning", NeurIPS 2022, with every bin clipped at both ends.
    """

    lower: Tensor
    size: Tensor

    def __init__(self, features: int, bins: int) -> None:
        super().__init__()
        self.register_buffer("lower", torch.zeros(features, bins))
        self.register_buffer("size", torch.ones(features, bins))

    @property
    def bins(self) -> int:
        return self.lower.shape[1]

    def set_edges(self, edges: Tensor, least: Tensor) -> None:
        """Edges [features, bins + 1], ascending; a bin is at least as wide as `least` [features], all positive: one
        between equal edges is a step."""
        self.lower.copy_(edges[:, :-1])
        self.size.copy_(torch.maximum(edges.diff(dim=1), least[:, None]))

    def forward(self, features: Tensor) -> Tensor:
        through = (features[..., None] - self.lower) / self.size
        return through.clamp(0.0, 1.0).flatten(-2) * 2.0 - 1.0


def squash(x: Tensor, limit: float) -> Tensor:
    """x between -limit and limit; beyond them, the distance d to the nearer as `asinh(d)`: d if it is small, about
    `log(2 d)` if it is large, so that an outlier stays one and does not outweigh all else."""
    return x.clamp(-limit, limit) + F.softshrink(x, limit).asinh()


class FeatureEncoder(nn.Sequential):
    """The default encoder, [n, features] -> [n, width]: (x - shift) / scale, LayerNorm, Dropout of features, Linear,
    GELU, Dropout, Linear. With `bins`, as many hidden units again read the features by `QuantileBins`.

    `shift` and `scale` (buffers [features], 0 and 1 at first) are set by `set_scaling`: without it LayerNorm leaves
    of features in different units only the largest. Features are cast to the dtype of the parameters.

    LayerNorm takes the mean and the size of a row of features away: of a view of one feature it leaves nothing, of a
    shift that all features share neither. With `whole`, standardised features are first squashed beyond `LIMIT`, and
    the linear layer reads two more inputs beside what LayerNorm gives: the mean and the root mean square of the row,
    each standardised as `set_row_scaling` says; and up to `FEW` features are read as they are, without LayerNorm.

    Args:
        features, width, hidden: widths in, out and between; hidden None takes `width`.
        dropout: between the linear layers. input_dropout: of the features.
        scale_wide: the LayerNorm of more features than `hidden` begins with the gain sqrt(hidden / features), not 1.
            A step of Adam moves a sum over many features further than one over few, by their number; with this gain
            wide inputs learn as fast as others and are less quickly learnt by heart. (The learning rate of an input
            layer by its fan-in: Yang and Hu, "Feature Learning in Infinite-Width Neural Networks", 2021.)
        bins: of every feature, set by `bins.set_edges`; 0 has none.
        whole: whether the mean and the size of a row of features are read too.
    """

    LIMIT = 4.0
    FEW = 8

    shift: Tensor
    scale: Tensor
    row_shift: Tensor
    row_scale: Tensor

    def __init__(
        self,
        features: int,
        width: int,
        hidden: int | None = None,
        dropout: float = 0.1,
        input_dropout: float = 0.0,
        scale_wide: bool = False,
        bins: int = 0,
        whole: bool = False,
    ) -> None:
        hidden = width if hidden is None else hidden
        few = whole and features <= self.FEW
        super().__init__(
            nn.Identity() if few else nn.LayerNorm(features),
            nn.Linear(features + 2 if whole and not few else features, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * hidden if bins else hidden, width),
        )
        if bins:
            self.add_module("bins", QuantileBins(features, bins))
            self.add_module("binned", nn.Linear(features * bins, hidden))
        self.input_dropout = input_dropout
        self.whole, self.few = whole, few
        if scale_wide and features > hidden and not few:
            nn.init.constant_(self.get_parameter("0.weight"), (hidden / features) ** 0.5)
        self.register_buffer("shift", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        if whole and not few:
            self.register_buffer("row_shift", torch.tensor([0.0, 1.0]))  # of independent features with mean 0, std 1
            self.register_buffer("row_scale", torch.tensor([features**-0.5, (2 * features) ** -0.5]))

    def set_scaling(self, mean: Tensor, std: Tensor) -> None:
        """Standardise by `mean` and `std`, both [features], of the training instances; a feature with std 0 is
        constant there and is centred only."""
        self.shift.copy_(mean)
        self.scale.copy_(torch.where(std > 0, std, torch.ones_like(std)))

    @torch.no_grad()
    def set_row_scaling(self, features: Tensor) -> None:
        """Standardise mean and root mean square of a row by their means and deviations over `features` [n, features],
        some training instances; without effect where they are not read. After `set_scaling`."""
        if not self.whole or self.few:
            return
        rows = self.row_statistics(self.standardized(features).double())
        mean = rows.mean(0)
        self.row_shift.copy_(mean)
        # Rows of one length differ by rounding only.
        self.row_scale.copy_(rows.std(0, correction=0).clamp_min(1e-3 * float(mean.abs().max())).clamp_min(1e-6))

    def standardized(self, features: Tensor) -> Tensor:
        """`(features - shift) / scale`, squashed with `whole`, in the dtype of the parameters."""
        # Subtracted before the cast: in half precision the difference of large features would be lost.
        x = (features - self.shift) / self.scale
        return (squash(x, self.LIMIT) if self.whole else x).to(self.get_parameter("1.bias").dtype)

    @staticmethod
    def row_statistics(x: Tensor) -> Tensor:
        """Mean and root mean square [n, 2] of rows of standardised features [n, features]."""
        length = torch.linalg.vector_norm(x, dim=1) / math.sqrt(x.shape[1])
        return torch.stack([x.mean(1), length], 1)

    def forward(self, features: Tensor, shift: Tensor | None = None) -> Tensor:
        """features [n, features] -> [n, width]; `shift` [width] is added to the result."""
        _, _, _, _, out, *binned = self
        out, dropout = cast(nn.Linear, out), cast(nn.Dropout, self[3])
        x = self.standardized(features)
        product, bias = self._first_layer(x)
        if binned:
            bins, own = binned
            steps = F.dropout(bins(features).to(product.dtype), self.input_dropout, self.training)
            h = gelu_dropout(torch.cat([product + bias, own(steps)], -1), p=rate(dropout))
        else:
            h = gelu_dropout(product, bias, p=rate(dropout))
        if shift is None:
            return F.linear(h, out.weight, out.bias)
        if h.dtype != shift.dtype:  # under autocast: in half precision the residual stream that begins here loses
            return F.linear(h, out.weight, out.bias) + shift  # what blocks with small gains add to it
        return F.linear(h, out.weight, out.bias + shift)

    def _first_layer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The linear layer of what it reads of x [n, features], standardised: a product [n, hidden], and what is still
        to be added [hidden].

        Gain and shift of the LayerNorm go into the weights, which are few, and not into the features: backward then
        needs no gradient of those, a product as large as that of the weights."""
        linear, count = cast(nn.Linear, self[1]), x.shape[1]
        whole: Tensor = linear.weight
        bias: Tensor = linear.bias
        if self.few:
            return F.linear(F.dropout(x, self.input_dropout, self.training), whole), bias
        norm, weight = cast(nn.LayerNorm, self[0]), whole[:, :count]
        if self.training and self.input_dropout > 0.0:  # what is dropped is shifted as well
            read = F.dropout(norm(x), self.input_dropout, True)
        else:
            read = F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
            bias = bias + (weight * norm.bias).sum(1)
            weight = weight * norm.weight
        if not self.whole:
            return F.linear(read, weight), bias
        rows = squash((self.row_statistics(x) - self.row_shift) / self.row_scale, self.LIMIT)
        # Beside one another they would be a copy of all features, in rows of a length that suits no matrix product.
        return torch.addmm(F.linear(rows, whole[:, count:]), read, weight.T), bias


class ViewEncoders(nn.Module):
    """One encoder per view and a learned embedding per view: `x[i,v] = Encoder_v(f[i,v]) + e_v`.

    Args:
        views: names and widths of the views.
        width: D.
        hidden, dropout, input_dropout, scale_wide, bins, whole: of the default encoders, see `FeatureEncoder`.
        encoders: view -> module [n, ...] -> [n, D], used instead of the default encoder of that view. It is
            given features of every instance; where the view is missing they are zeros (for one that looks
            across instances, as batch normalisation does).

    Raises:
        ValueError: an encoder for a view that does not exist. TypeError: one that is no module.
    """

    def __init__(
        self,
        views: Sequence[ViewSpec],
        width: int,
        hidden: int | None = None,
        dropout: float = 0.1,
        encoders: Mapping[str, nn.Module] | None = None,
        input_dropout: float = 0.0,
        scale_wide: bool = False,
        bins: int = 0,
        whole: bool = False,
    ) -> None:
        super().__init__()
        self.views = tuple(views)
        self.width = width
        given = dict(encoders or {})
        names = [view.name for view in self.views]
        for name, encoder in given.items():
            if name not in names:
                raise ValueError(f"encoders: expected views among {', '.join(names)}, got {name!r}")
            if not isinstance(encoder, nn.Module):
                raise TypeError(f"encoders[{name!r}]: expected a torch.nn.Module, got {type(encoder).__name__}")
        self.custom = tuple(name for name in names if name in given)
        # By position: a view may have any name, a submodule may not.
        self.encoders = nn.ModuleList(
            given.get(view.name)
            or FeatureEncoder(view.width, width, hidden, dropout, input_dropout, scale_wide, bins, whole)
            for view in self.views
        )
        self.embedding = nn.Parameter(torch.empty(len(self.views), width))
        nn.init.normal_(self.embedding, std=0.1)

    def forward(self, views: Mapping[str, Tensor], mask: Tensor | None = None) -> Tensor:
        """Encode all views.

        Args:
            views: view -> features [N, width of the view], floating; what the encoder takes for a view with an
                encoder of its own. Further entries are not read.
            mask: bool [N, V], True where the view is present; None when all are. Features of missing views are
                never used (they may be NaN).

        Returns:
            [N, V, D], rows of missing views 0.

        Raises:
            TypeError, ValueError: naming the view, what was expected and what came.
        """
        encoded = []
        count: int | None = None
        for position, (view, encoder) in enumerate(zip(self.views, self.encoders, strict=True)):
            features = self._check(view, views, count)
            count = features.shape[0]
            if mask is not None:
                _validate.tensor(mask, "mask", [count, len(self.views)], dtype=torch.bool)
                absent = ~mask[:, position].reshape(-1, *[1] * (features.dim() - 1))
                # Before the encoder, or the gradient of its weights is 0 * NaN.
                features = features.masked_fill(absent, 0)
            own = isinstance(encoder, FeatureEncoder)
            vector = encoder(features, self.embedding[position]) if own else encoder(features)
            if vector.shape != (count, self.width):
                raise ValueError(
                    f"encoder of view {view.name!r}: expected an output of shape [{count}, {self.width}], "
                    f"got {list(vector.shape)}"
                )
            encoded.append(vector if own else vector + self.embedding[position])
        x = torch.stack(encoded, 1)
        return x if mask is None else x.masked_fill(~mask[..., None], 0.0)

    def _check(self, view: ViewSpec, views: Mapping[str, Tensor], count: int | None) -> Tensor:
        if view.name not in views:
            raise ValueError(f"views: expected features of view {view.name!r}, got {', '.join(views) or 'none'}")
        features, where = views[view.name], f"views[{view.name!r}]"
        if not isinstance(features, Tensor):
            raise TypeError(f"{where}: expected a torch.Tensor, got {type(features).__name__}")
        rows = "N" if count is None else count
        if view.name in self.custom:
            if features.dim() < 1 or (count is not None and features.shape[0] != count):
                raise ValueError(f"{where}: expected shape [{rows}, ...], got {list(features.shape)}")
            return features
        if features.dim() != 2 or features.shape[1] != view.width or (count is not None and features.shape[0] != count):
            raise ValueError(f"{where}: expected shape [{rows}, {view.width}], got {list(features.shape)}")
        if not features.is_floating_point():
            raise TypeError(f"{where}: expected floating features, got {features.dtype}")
        return features
