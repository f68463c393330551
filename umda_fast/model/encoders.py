"""View encoders (docs/model.md, section 0): features of every view to vectors of one width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umda_fast.model.specs import ViewSpec
from umda_fast.ops import _validate

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


class FeatureEncoder(nn.Sequential):
    """The default encoder, [n, features] -> [n, width]: (x - shift) / scale, LayerNorm, Dropout of features, Linear,
    GELU, Dropout, Linear. With `bins`, as many hidden units again read the features by `QuantileBins`.

    `shift` and `scale` (buffers [features], 0 and 1 at first) are set by `set_scaling`: without it LayerNorm leaves
    of features in different units only the largest. Features are cast to the dtype of the parameters.

    Args:
        features, width, hidden: widths in, out and between; hidden None takes `width`.
        dropout: between the linear layers. input_dropout: of the features.
        scale_wide: the LayerNorm of more features than `hidden` begins with the gain sqrt(hidden / features), not 1.
            A step of Adam moves a sum over many features further than one over few, by their number; with this gain
            wide inputs learn as fast as others and are less quickly learnt by heart. (The learning rate of an input
            layer by its fan-in: Yang and Hu, "Feature Learning in Infinite-Width Neural Networks", 2021.)
        bins: of every feature, set by `bins.set_edges`; 0 has none.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        features: int,
        width: int,
        hidden: int | None = None,
        dropout: float = 0.1,
        input_dropout: float = 0.0,
        scale_wide: bool = False,
        bins: int = 0,
    ) -> None:
        hidden = width if hidden is None else hidden
        super().__init__(
            nn.LayerNorm(features),
            nn.Linear(features, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * hidden if bins else hidden, width),
        )
        if bins:
            self.add_module("bins", QuantileBins(features, bins))
            self.add_module("binned", nn.Linear(features * bins, hidden))
        self.input_dropout = input_dropout
        if scale_wide and features > hidden:
            nn.init.constant_(self.get_parameter("0.weight"), (hidden / features) ** 0.5)
        self.register_buffer("shift", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))

    def set_scaling(self, mean: Tensor, std: Tensor) -> None:
        """Standardise by `mean` and `std`, both [features], of the training instances; a feature with std 0 is
        constant there and is centred only."""
        self.shift.copy_(mean)
        self.scale.copy_(torch.where(std > 0, std, torch.ones_like(std)))

    def forward(self, features: Tensor) -> Tensor:
        # Subtracted before the cast: in half precision the difference of large features would be lost.
        dtype = self.get_parameter("0.weight").dtype
        x = ((features - self.shift) / self.scale).to(dtype)
        norm, linear, gelu, dropout, out, *binned = self
        h = linear(F.dropout(norm(x), self.input_dropout, self.training))
        if binned:
            bins, own = binned
            steps = F.dropout(bins(features).to(dtype), self.input_dropout, self.training)
            h = torch.cat([h, own(steps)], -1)
        result: Tensor = out(dropout(gelu(h)))
        return result


class ViewEncoders(nn.Module):
    """One encoder per view and a learned embedding per view: `x[i,v] = Encoder_v(f[i,v]) + e_v`.

    Args:
        views: names and widths of the views.
        width: D.
        hidden, dropout, input_dropout, scale_wide, bins: of the default encoders, see `FeatureEncoder`.
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
            or FeatureEncoder(view.width, width, hidden, dropout, input_dropout, scale_wide, bins)
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
            vector = encoder(features)
            if vector.shape != (count, self.width):
                raise ValueError(
                    f"encoder of view {view.name!r}: expected an output of shape [{count}, {self.width}], "
                    f"got {list(vector.shape)}"
                )
            encoded.append(vector + self.embedding[position])
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
