"""How much the update direction fluctuates; nothing here changes a gradient."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from umda_fast.sgl.buffers import FlatLayout, as_numbers, write_row
from umda_fast.sgl.telemetry import inverse_norms


class DirectionVariance:
    """Variance of the update direction d over windows of W updates, in running form: two buffers [P].

    Two figures, both from sums only:

    - `variance`: `V = tr Var(d) / ||mean d||^2` with the unbiased `tr Var(d) = (Q - ||S||^2 / k) / (k - 1)`,
      `S = sum d`, `Q = sum ||d||^2` over the k updates of the window;
    - `matched`: the same with every d scaled to norm 1 first. Two methods whose updates have different or
      drifting lengths can be compared by it: it sees the fluctuation of the direction alone.

    An update that is not finite has its place in the window, and no part in the figures.

    Windows follow each other without overlap. The figures are those of the last full window, or of the
    running one while there is no full window and it holds at least two updates. The sums are float32
    (float64 for float64 parameters), so a V below about 1e-6 cannot be told from 0.
    """

    def __init__(self, layout: FlatLayout, window: int) -> None:
        self._layout = layout
        self._window = window
        self._sum = layout.zeros()
        self._unit_sum = layout.zeros()
        self._square = torch.zeros((), dtype=torch.float64, device=layout.device)
        self._units = torch.zeros((), dtype=torch.float64, device=layout.device)
        self._taken = torch.zeros((), dtype=torch.float64, device=layout.device)
        self._count = 0
        self._last = torch.full((2,), math.nan, dtype=torch.float64, device=layout.device)

    def update(self, direction: Tensor, scale: Tensor | None = None) -> None:
        """Takes one update direction [P], which is `scale` times too long; no wait for the device."""
        norm = torch.linalg.vector_norm(direction)
        sound = norm < math.inf  # NaN is not
        norm = norm.nan_to_num(0.0, 0.0)
        inverse = inverse_norms(norm)
        kept = sound.to(norm.dtype) if scale is None else sound / scale
        numbers = torch.nan_to_num(direction, 0.0, 0.0, 0.0)  # for 0 times inf would be NaN
        self._sum.addcmul_(numbers, kept)
        self._unit_sum.addcmul_(numbers, inverse)
        if scale is not None:
            norm = norm / scale
        self._square.add_(norm.double().square())
        self._units.add_(norm > 0)
        self._taken.add_(sound)
        self._count += 1
        if self._count >= self._window:
            self._last = self._figures()
            self._sum.zero_()
            self._unit_sum.zero_()
            self._square.zero_()
            self._units.zero_()
            self._taken.zero_()
            self._count = 0

    def _figures(self) -> Tensor:
        """[2]: variance and matched variance of the running window."""
        count = self._taken
        figures = []
        for total, square in ((self._sum, self._square), (self._unit_sum, self._units)):
            squared_sum = torch.linalg.vector_norm(total).double().square()
            variance = ((square - squared_sum / count) / (count - 1)).clamp_min(0)
            figures.append(variance / (squared_sum / count**2))
        return torch.stack(figures)

    def figures(self) -> tuple[float, float]:
        """(variance, matched variance), nan before two updates were seen (waits for the device)."""
        current = self._last
        if self._count >= 2:
            current = torch.where(current.isnan(), self._figures(), current)
        variance, matched = current.tolist()
        return variance, matched

    def state_dict(self) -> dict[str, Tensor | int]:
        """Sums, count and the last window's figures."""
        return {
            "sum": self._sum.clone(),
            "unit_sum": self._unit_sum.clone(),
            "square": self._square.clone(),
            "units": self._units.clone(),
            "taken": self._taken.clone(),
            "last": self._last.clone(),
            "count": self._count,
        }

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        """Puts back what `state_dict` gave; before version 0.2 every update was finite."""
        state = {"taken": torch.tensor(state["count"]), **state}
        for name, target in (
            ("sum", self._sum),
            ("unit_sum", self._unit_sum),
            ("square", self._square),
            ("units", self._units),
            ("taken", self._taken),
            ("last", self._last),
        ):
            value = state[name]
            assert isinstance(value, Tensor)
            target.copy_(value)
        count = state["count"]
        assert isinstance(count, int)
        self._count = count


class UpdateTelemetry:
    """Variance of the updates, and on demand of those that equal weights would have made.

    An update is what a call added to `.grad` of the shared parameters, penalty included.

    Args:
        parameters: the shared parameters.
        layout: theirs.
        window: updates per window; 0 for no telemetry at all.
        control: whether there is a second direction.
    """

    def __init__(self, parameters: Sequence[Tensor], layout: FlatLayout, window: int, control: bool) -> None:
        self._parameters = parameters
        self._layout = layout
        names = ["gradient_variance"] if window else []
        if control:
            names.append("control_gradient_variance")
        self.variances = {name: DirectionVariance(layout, window) for name in names}
        self._observed: Tensor | None = None
        self._before: list[Tensor | None] | None = None

    def begin(self) -> None:
        """Remembers `.grad` as it is before a call that will not tell what it adds."""
        self._before = None
        if not self.variances:
            return
        if any(parameter.grad is not None for parameter in self._parameters):
            self._before = [None if p.grad is None else p.grad.clone() for p in self._parameters]

    def end(self, added: Tensor | None, control: Tensor | None, scale: Tensor | None = None) -> None:
        """Takes what the call has added.

        Args:
            added: [P], where it is at hand.
            control: [P] what equal weights would have added, less that; is increased by it.
            scale: by which both are too long.
        """
        if not self.variances:
            return
        direction = self._added() if added is None else added
        self._before = None
        self.variances["gradient_variance"].update(direction, scale)
        if control is not None:
            self.variances["control_gradient_variance"].update(control.add_(direction), scale)

    def _added(self) -> Tensor:
        if self._observed is None:
            self._observed = self._layout.zeros()
        views = self._layout.views(self._observed)
        write_row(views, [parameter.grad for parameter in self._parameters])
        for view, old in zip(views, self._before or [], strict=False):
            if old is not None:
                view.sub_(as_numbers(old))
        return self._observed

    def figures(self) -> dict[str, float]:
        """Variance and matched variance of each direction (waits for the device)."""
        result = {}
        for name, variance in self.variances.items():
            result[name], result[f"{name}_matched"] = variance.figures()
        return result

    def state_dict(self) -> dict[str, dict[str, Tensor | int]]:
        """Of every variance."""
        return {name: variance.state_dict() for name, variance in self.variances.items()}

    def load_state_dict(self, state: Mapping[str, dict[str, Tensor | int]]) -> None:
        """Puts back what `state_dict` gave.

        Raises:
            ValueError: it is of other variances.
        """
        if set(state) != set(self.variances):
            raise ValueError(f"state_dict: expected variances {sorted(self.variances)}, got {sorted(state)}")
        for name, value in state.items():
            self.variances[name].load_state_dict(value)
