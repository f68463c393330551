"""Self-guided learning: one backward call that balances the tasks of a multi-task model.

    sgl = SelfGuided(model.shared_parameters(), tasks=["a", "b"])
    sgl.backward({"a": loss_a, "b": loss_b})
    optimizer.step()  # without momentum of its own for the shared parameters, see below

The total loss is `sum_t w_t L_t + penalty`; penalties are never re-weighted. With `g_t` the gradient of `L_t`
on the scope, a statistics step does

    m_t  <- beta m_t + (1 - beta) g_t          mhat_t = m_t / (1 - beta^k_t)        k_t: updates of task t
    G    =  Mhat Mhat^T                        [T, T]
    C_st =  G_st / (n_s n_t),  n_t = sqrt(G_tt);   cosine_ema: its running mean, decay beta, bias-corrected
    v    =  balancer.weights(G, losses)        over the tasks present
    w    <- weight_beta w + (1 - weight_beta) v                                      starts at 1

**Scope `shared_parameters`** (exact). T backward passes give all g_t on the shared parameters, written into a
preallocated [T, P] buffer. `.grad` of the shared parameters is increased by `sum_t w_t mhat_t` (with
`direction="gradient"` by `sum_t w_t g_t`), that of every other parameter by `sum_t w_t dL_t` with this step's
weights, and a last backward pass adds the penalty's gradient to all of them. Memory beyond the model: the
gradients and their averages, 2 T P numbers, and P for the result.

The average takes the place of an optimiser's momentum: give it none for the shared parameters, as in
`AdamW([{"params": shared, "betas": (0.0, 0.999)}, {"params": rest}])`. Averaged twice, updates lag behind and
swing. The average is also shorter than the gradients, so Adam's steps, which do not depend on the length, are
longer at the same learning rate. With `direction="gradient"`, in the other scopes and without statistics
`.grad` is an ordinary gradient, and the usual momentum is right.

**Scope `last_shared_layer`**. g_t is taken on the parameters of that layer alone (T short backward passes,
from the losses down to it); then ONE backward pass of `sum_t w_t L_t + penalty` gives every parameter its
gradient.

**Scope `representation`**. g_t is taken on the tensor `representation` (T short passes, from the losses down
to it). Its rows are other instances at every step, so gradients of different steps must not be averaged; the
Gram matrix is: `G_st <- beta G_st + (1 - beta) <g_s, g_t>`, bias-corrected by the number of steps on which
both tasks were present. Then ONE backward pass of `sum_t w_t L_t + penalty`: the trunk is traversed once,
what lies between the representation and the losses T + 1 times. With labels missing on some steps the entries
of G average over different steps, and G may be slightly indefinite.

In the two cheap scopes the update is made of this step's gradients, not of averages: only the weights are
smoothed.

**Every m steps** (`every=m`): the first call and every m-th after it is a statistics step. On the others the
weights are held and one backward pass of `sum_t w_t L_t + penalty` is made, at the cost of a plain step: of
this step's gradients, in every scope. With m > 1 the exact scope therefore goes best with
`direction="gradient"`, which makes all steps alike.

**A balancer that does not read the Gram matrix** (`Equal` and those made of losses only) makes every step
such a plain one, with new weights each m steps, unless `statistics=True`.

**Missing tasks.** A task absent from `losses` keeps all its statistics and contributes nothing. The balancer
sees the tasks present only; where its weights sum to their number by definition, so do those used in the
step. A step without any task applies the penalty alone and does not count.

**Accumulation.** Gradients are added to `.grad`, as `Tensor.backward` does; the caller zeroes it. A shared
parameter that no task has reached so far keeps its `.grad` as it was. In the exact scope a missing `.grad`
becomes a view of a buffer that the next call reuses (keep a clone, not the tensor). After a statistics step
in the exact scope the average, not the gradient, is what is added: with micro-batches, each call is one step
of the average.

**No wait for the device.** A step reads nothing back, unless the balancer says so (`Balancer.synchronizes`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import Parameter

from umda_fast.sgl import _gradients
from umda_fast.sgl.balancers import Balancer, StatefulBalancer
from umda_fast.sgl.buffers import FlatLayout, accumulate, write_row
from umda_fast.sgl.graph import reached_leaves
from umda_fast.sgl.registry import as_balancer
from umda_fast.sgl.telemetry import DirectionVariance, cosine_matrix, gram_metrics

Scope = Literal["shared_parameters", "last_shared_layer", "representation"]
Direction = Literal["average", "gradient"]


@dataclass(frozen=True)
class SGLStep:
    """What one backward call used; tensors on the device, detached.

    Attributes:
        weights: [T] the weight of every task's loss, 0 for an absent task.
        gram: [T, T] Gram matrix of the last statistics step; rows of tasks never seen are 0.
        cosine: [T, T] its cosines.
        norms: [T] square roots of its diagonal.
        active: bool [T], the tasks present.
    """

    weights: Tensor
    gram: Tensor
    cosine: Tensor
    norms: Tensor
    active: Tensor


@dataclass(frozen=True)
class _Present:
    """Tasks present in a batch; the tensors are made once for each combination that occurs."""

    rows: tuple[int, ...]
    index: Tensor
    mask: Tensor


class SelfGuided:
    """Balances the tasks of a multi-task model; see the module docstring for what is computed.

    Args:
        shared_parameters: parameters that several tasks train; frozen ones are left out. One device.
        tasks: names of the T tasks, in the order of all [T] results.
        task_parameters: all other trainable parameters that the losses reach (heads, branches). Needed by the
            exact scope only. Empty: they are found by a walk through the autograd graph at every statistics
            step, which takes some microseconds per node. Given, they are checked against the graph the first
            time a task appears.
        balancer: a `Balancer`, the name of one (`registry.BALANCERS`), a weighting, aggregator or scalariser
            of torchjd, or any function gram [T, T] -> weights [T].
        scope: where task gradients are taken.
        last_shared_layer: its parameters; for that scope only.
        every: statistics and new weights on one step of this many.
        beta: decay of the averages of gradients, Gram matrix and cosines; 0 for none.
        direction: what the exact scope adds up, the running `average` mhat_t or this step's `gradient` g_t.
        weight_beta: decay of the weights; None leaves it to the balancer.
        statistics: whether to compute task gradients; None leaves it to the balancer.
        variance_window: updates per window of the gradient variance; 0 leaves it out. It costs two buffers
            [P] and seven passes over P numbers at each statistics step.
        control: also report the variance of an equal-weight control, `sum_t mhat_t` of the same averages on
            the same batches, without ever applying it. Exact scope only; two more buffers [P].
        backend: of the operation `task_gradients`; None is the process default.

    Raises:
        TypeError: `shared_parameters` or another list holds something that is not a Parameter.
        ValueError: an argument out of range, repeated task names, no trainable shared parameter, parameters
            on several devices, a parameter that is both shared and a task's.
    """

    def __init__(
        self,
        shared_parameters: Iterable[Parameter],
        tasks: Sequence[str],
        *,
        task_parameters: Iterable[Parameter] = (),
        balancer: Balancer | str | Callable[[Tensor], Tensor] = "sgl",
        scope: Scope = "shared_parameters",
        last_shared_layer: Iterable[Parameter] = (),
        every: int = 1,
        beta: float = 0.9,
        direction: Direction = "average",
        weight_beta: float | None = None,
        statistics: bool | None = None,
        variance_window: int = 100,
        control: bool = False,
        backend: str | None = None,
    ) -> None:
        self.tasks = tuple(tasks)
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks: expected one or more different names, got {list(self.tasks)}")
        if scope not in get_args(Scope):
            raise ValueError(f"scope: expected one of {', '.join(get_args(Scope))}, got {scope!r}")
        if direction not in get_args(Direction):
            raise ValueError(
                f"direction: expected one of {', '.join(get_args(Direction))}, got {direction!r}"
            )
        if every < 1:
            raise ValueError(f"every: expected at least 1, got {every}")
        if not 0 <= beta < 1:
            raise ValueError(f"beta: expected 0 <= beta < 1, got {beta}")
        if variance_window < 0 or variance_window == 1:
            raise ValueError(f"variance_window: expected 0 or at least 2, got {variance_window}")
        self.balancer = as_balancer(balancer)
        self.scope: Scope = scope
        self.direction: Direction = direction
        self.every = every
        self.beta = beta
        self.weight_beta = self.balancer.weight_beta if weight_beta is None else weight_beta
        if not 0 <= self.weight_beta < 1:
            raise ValueError(f"weight_beta: expected 0 <= weight_beta < 1, got {self.weight_beta}")
        self.statistics = self.balancer.needs_gram if statistics is None else statistics
        if self.balancer.needs_gram and not self.statistics:
            name = type(self.balancer).__name__
            raise ValueError(f"statistics: {name} reads the Gram matrix, expected True or None, got False")
        self.variance_window = variance_window
        self.control = control
        if control and (scope != "shared_parameters" or not self.statistics or not variance_window):
            raise ValueError(
                "control: expected the scope shared_parameters with statistics and a variance window, got "
                f"scope={scope!r}, statistics={self.statistics}, variance_window={variance_window}"
            )
        self.backend = backend

        self._shared = _trainable("shared_parameters", shared_parameters)
        self._task_parameters = _trainable("task_parameters", task_parameters)
        layer = _trainable("last_shared_layer", last_shared_layer)
        if not self._shared:
            raise ValueError("shared_parameters: expected a parameter with requires_grad, got none")
        if scope == "last_shared_layer" and not layer:
            raise ValueError("last_shared_layer: expected parameters for the scope of that name, got none")
        both = {id(p) for p in self._shared} & {id(p) for p in self._task_parameters}
        if both:
            raise ValueError(f"task_parameters: expected none of shared_parameters, got {len(both)} of them")
        self._scoped = layer if scope == "last_shared_layer" else self._shared
        self._calls = 0
        self._checked: set[int] = set()
        self._ready = False

    # -- state ---------------------------------------------------------------------------------------------

    def _setup(self) -> None:
        """Allocates everything. At the first call and not before, so that the model may still be moved."""
        if self._ready:
            return
        devices = {p.device for p in (*self._shared, *self._scoped)}
        if len(devices) != 1:
            raise ValueError(f"shared_parameters: expected one device, got {sorted(map(str, devices))}")
        count = len(self.tasks)
        self._layout = FlatLayout(self._shared)
        device, dtype = self._layout.device, self._layout.dtype
        self._weights = torch.ones(count, device=device, dtype=dtype)
        self._gram = torch.zeros(count, count, device=device, dtype=dtype)
        self._norms, self._cosine = cosine_matrix(self._gram)
        self._cosine_ema = torch.zeros(count, count, device=device, dtype=dtype)
        self._counts = torch.zeros(count, device=device, dtype=torch.int64)
        self._pair_counts = torch.zeros(count, count, device=device, dtype=torch.int64)
        self._reached = [False] * len(self._scoped)
        self._present: dict[tuple[int, ...], _Present] = {}
        if isinstance(self.balancer, StatefulBalancer):
            self.balancer.setup(count, device, dtype)

        if self.statistics and self.scope != "representation":
            scoped = FlatLayout(self._scoped)
            self._gradients = scoped.zeros(count)
            self._rows = [scoped.views(row) for row in self._gradients]
            self._ema = scoped.zeros(count)
        if self.statistics and self.scope == "representation":
            self._gram_ema = torch.zeros(count, count, device=device, dtype=dtype)
        if self.statistics and self.scope == "shared_parameters":
            self._direction = self._layout.zeros()
            self._direction_views = self._layout.views(self._direction)
        self._observed: Tensor | None = None
        self._variance: dict[str, DirectionVariance] = {}
        names = ["gradient_variance"] if self.variance_window else []
        if self.control:
            names.append("control_gradient_variance")
            self._control_direction = self._layout.zeros()
        for name in names:
            self._variance[name] = DirectionVariance(self._layout, self.variance_window)
        self._ready = True

    @property
    def cosine_ema(self) -> Tensor:
        """Running mean [T, T] of the cosines; 0 for pairs never seen together, diagonal 1."""
        self._setup()
        corrected = self._cosine_ema * _gradients.bias_correction(
            self._pair_counts, self.beta, self._cosine_ema.dtype
        )
        identity = torch.eye(len(self.tasks), device=corrected.device, dtype=corrected.dtype)
        return torch.where(identity.bool(), identity, corrected)

    def _state_tensors(self) -> dict[str, Tensor]:
        names = ["weights", "gram", "cosine_ema", "counts", "pair_counts", "ema", "gram_ema"]
        return {name: getattr(self, f"_{name}") for name in names if hasattr(self, f"_{name}")}

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to continue bit for bit; clones, in the scope's full size [T, P]."""
        self._setup()
        return {
            "tasks": list(self.tasks),
            "scope": self.scope,
            "calls": self._calls,
            "reached": list(self._reached),
            "tensors": {name: value.clone() for name, value in self._state_tensors().items()},
            "variance": {name: value.state_dict() for name, value in self._variance.items()},
            "balancer": self.balancer.state_dict() if isinstance(self.balancer, StatefulBalancer) else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state_dict` gave.

        Raises:
            ValueError: the state is of other tasks, another scope, or parameters of another size.
        """
        self._setup()
        for name, here in (("tasks", list(self.tasks)), ("scope", self.scope)):
            if state[name] != here:
                raise ValueError(f"state_dict: expected {name} {here}, got {state[name]}")
        tensors = self._state_tensors()
        expected = {name: tuple(value.shape) for name, value in tensors.items()}
        found = {name: tuple(value.shape) for name, value in state["tensors"].items()}
        if expected != found:
            raise ValueError(f"state_dict: expected tensors of shapes {expected}, got {found}")
        if set(state["variance"]) != set(self._variance):
            raise ValueError(
                f"state_dict: expected variances {sorted(self._variance)}, got {sorted(state['variance'])}"
            )
        for name, value in state["tensors"].items():
            tensors[name].copy_(value)
        self._norms, self._cosine = cosine_matrix(self._gram)
        for name, value in state["variance"].items():
            self._variance[name].load_state_dict(value)
        if isinstance(self.balancer, StatefulBalancer):
            self.balancer.load_state_dict(state["balancer"])
        self._calls = state["calls"]
        self._reached = list(state["reached"])

    # -- the step ------------------------------------------------------------------------------------------

    def backward(
        self,
        losses: Mapping[str, Tensor],
        *,
        penalty: Tensor | None = None,
        representation: Tensor | None = None,
    ) -> SGLStep:
        """Adds the gradient of the balanced total loss to `.grad` of every parameter it reaches.

        Args:
            losses: one scalar per task present, by name.
            penalty: scalar, added as it is.
            representation: the tensor, of any shape, through which the tasks reach the trunk; that scope
                only.

        Raises:
            TypeError: a loss or the penalty is not a Tensor.
            ValueError: an unknown task, a loss that is not a scalar or has no gradient, a missing or constant
                representation, a loss that reaches a parameter in neither list (exact scope).
        """
        self._check(losses, penalty, representation)
        self._setup()
        rows = tuple(row for row, task in enumerate(self.tasks) if task in losses)
        present = self._present_tasks(rows)
        if penalty is not None and not penalty.requires_grad:
            penalty = None
        if not rows:
            if penalty is not None:
                torch.autograd.backward(penalty)
            return self._step(torch.zeros_like(self._weights), present)

        ordered = [losses[self.tasks[row]].reshape(()) for row in rows]
        values = torch.stack([loss.detach().to(self._layout.dtype) for loss in ordered])
        update = self._calls % self.every == 0
        self._calls += 1
        exact = update and self.statistics and self.scope == "shared_parameters"

        before = self._snapshot() if update and self.variance_window else None
        gradients: list[tuple[Parameter, int, Tensor]] = []
        if update:
            if self.statistics:
                if self.scope == "representation":
                    assert representation is not None
                    gram = self._representation_gram(ordered, representation, present)
                else:
                    again = not exact or penalty is not None
                    gradients = self._scoped_gradients(ordered, present, keep_graph=again)
                    gram = self._smoothed_gram(present)
                self._remember(gram, present)
            self._balance(values, present)

        weights = self._used_weights(present)
        if exact:
            self._apply(gradients, weights, present, penalty)
        else:
            total = (torch.stack([loss.to(weights.dtype) for loss in ordered]) * weights).sum()
            torch.autograd.backward(total if penalty is None else total + penalty.reshape(()).to(total.dtype))
        if update and self.variance_window:
            self._observe(before)
        everyone = torch.zeros_like(self._weights).index_copy(0, present.index, weights)
        return self._step(everyone, present)

    def _check(
        self, losses: Mapping[str, Tensor], penalty: Tensor | None, representation: Tensor | None
    ) -> None:
        unknown = [name for name in losses if name not in self.tasks]
        if unknown:
            raise ValueError(f"losses: expected tasks among {list(self.tasks)}, got {unknown}")
        scalars: list[tuple[str, Any]] = [(f"losses[{name!r}]", loss) for name, loss in losses.items()]
        if penalty is not None:
            scalars.append(("penalty", penalty))
        for name, value in scalars:
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
            if value.numel() != 1:
                raise ValueError(f"{name}: expected a scalar, got shape {tuple(value.shape)}")
        for name, value in losses.items():
            if not value.requires_grad:
                raise ValueError(f"losses[{name!r}]: expected a loss that requires grad, got a constant")
        wanted = self.scope == "representation" and bool(losses)
        if wanted and (representation is None or not representation.requires_grad):
            got = "None" if representation is None else "a constant"
            raise ValueError(f"representation: expected a Tensor that requires grad, got {got}")

    def _present_tasks(self, rows: tuple[int, ...]) -> _Present:
        """Index and mask of the tasks present; copied to the device once per combination."""
        if rows not in self._present:
            index = torch.tensor(rows, dtype=torch.int64)
            mask = torch.zeros(len(self.tasks), dtype=torch.bool)
            mask[index] = True
            device = self._layout.device
            self._present[rows] = _Present(rows, index.to(device), mask.to(device))
        return self._present[rows]

    def _take(self, values: Tensor, present: _Present, *dims: int) -> Tensor:
        """The present tasks' part of a [T] or [T, T] tensor."""
        if len(present.rows) == len(self.tasks):
            return values
        for dim in dims:
            values = values.index_select(dim, present.index)
        return values

    def _scoped_gradients(
        self, losses: Sequence[Tensor], present: _Present, *, keep_graph: bool
    ) -> list[tuple[Parameter, int, Tensor]]:
        """Fills the buffer rows of the tasks present.

        Returns:
            In the exact scope, the gradients of all other parameters: (parameter, position of the task,
                gradient).
        """
        others: list[Parameter] = []
        if self.scope == "shared_parameters":
            others = self._other_parameters(losses, present)
        wanted = [*self._scoped, *others]
        kept: list[tuple[Parameter, int, Tensor]] = []
        for position, (row, loss) in enumerate(zip(present.rows, losses, strict=True)):
            found = torch.autograd.grad(
                loss, wanted, retain_graph=keep_graph or position + 1 < len(losses), allow_unused=True
            )
            scoped = found[: len(self._scoped)]
            write_row(self._rows[row], scoped)
            self._reached = [old or grad is not None for old, grad in zip(self._reached, scoped, strict=True)]
            kept.extend(
                (parameter, position, grad)
                for parameter, grad in zip(others, found[len(self._scoped) :], strict=True)
                if grad is not None
            )
        return kept

    def _other_parameters(self, losses: Sequence[Tensor], present: _Present) -> list[Parameter]:
        """Parameters outside the shared ones that the losses reach."""
        if self._task_parameters and self._checked.issuperset(present.rows):
            return self._task_parameters
        known = {id(p) for p in self._shared}
        found = [leaf for leaf in reached_leaves(losses) if id(leaf) not in known]
        if not self._task_parameters:
            return found
        missing = {id(leaf) for leaf in found} - {id(p) for p in self._task_parameters}
        if missing:
            shapes = [tuple(leaf.shape) for leaf in found if id(leaf) in missing]
            raise ValueError(
                f"task_parameters: the losses reach {len(missing)} parameters (shapes {shapes[:4]}) that are "
                "neither here nor in shared_parameters; expected all of them, or an empty list to find them"
            )
        self._checked.update(present.rows)
        return self._task_parameters

    def _smoothed_gram(self, present: _Present) -> Tensor:
        """Averages the buffer into the running gradients; Gram matrix [T, T] of these, bias-corrected."""
        everyone = len(present.rows) == len(self.tasks)
        self._counts += present.mask
        return _gradients.smooth(
            [self._gradients],
            self._ema,
            self._counts,
            None if everyone else present.mask,
            self.beta,
            self.backend,
        )

    def _representation_gram(
        self, losses: Sequence[Tensor], representation: Tensor, present: _Present
    ) -> Tensor:
        """Running Gram matrix [T, T] of the gradients on the representation."""
        gradients = []
        for loss in losses:
            (grad,) = torch.autograd.grad(loss, representation, retain_graph=True, allow_unused=True)
            gradients.append(torch.zeros_like(representation) if grad is None else grad)
        gram = _gradients.gram(gradients, self._layout.dtype, self.backend)
        self._counts += present.mask
        pairs = present.mask[:, None] & present.mask[None, :]
        wide = torch.zeros_like(self._gram_ema[present.index]).index_copy(1, present.index, gram)
        full = torch.zeros_like(self._gram_ema).index_copy(0, present.index, wide)
        mixed = self.beta * self._gram_ema + (1 - self.beta) * full
        self._gram_ema.copy_(torch.where(pairs, mixed, self._gram_ema))
        counts = self._pair_counts + pairs
        return self._gram_ema * _gradients.bias_correction(counts, self.beta, full.dtype)

    def _remember(self, gram: Tensor, present: _Present) -> None:
        """Keeps the Gram matrix and takes its cosines into their running mean."""
        self._gram = gram
        self._norms, self._cosine = cosine_matrix(gram)
        pairs = present.mask[:, None] & present.mask[None, :]
        self._pair_counts += pairs
        mixed = self.beta * self._cosine_ema + (1 - self.beta) * self._cosine
        self._cosine_ema.copy_(torch.where(pairs, mixed, self._cosine_ema))

    def _balance(self, losses: Tensor, present: _Present) -> None:
        """New weights of the tasks present, smoothed into the running ones."""
        gram = self._take(self._gram, present, 0, 1)
        if isinstance(self.balancer, StatefulBalancer):
            everyone = len(present.rows) == len(self.tasks)
            new = self.balancer.weights(gram, losses, None if everyone else present.index)
        else:
            new = self.balancer.weights(gram, losses)
        if new.shape != losses.shape:
            name = type(self.balancer).__name__
            got = tuple(new.shape)
            raise ValueError(f"balancer: expected {losses.shape[0]} weights of {name}, got shape {got}")
        old = self._take(self._weights, present, 0)
        mixed = self.weight_beta * old + (1 - self.weight_beta) * new.to(old.dtype)
        self._weights = self._weights.index_copy(0, present.index, mixed)

    def _used_weights(self, present: _Present) -> Tensor:
        """Weights [A] of the tasks present; they sum to their number where the balancer's always do."""
        weights = self._take(self._weights, present, 0)
        # Needed with all tasks present too: after a step without some of them the running weights' sum
        # drifts.
        return weights * (len(present.rows) / weights.sum()) if self.balancer.normalized else weights

    def _everyone(self, weights: Tensor, present: _Present) -> Tensor:
        """Weights [A] of the tasks present, as [T] with 0 for the others."""
        return torch.zeros_like(self._weights).index_copy(0, present.index, weights)

    def _apply(
        self,
        gradients: Sequence[tuple[Parameter, int, Tensor]],
        weights: Tensor,
        present: _Present,
        penalty: Tensor | None,
    ) -> None:
        """Exact scope: combines the running gradients and adds everything to `.grad`."""
        if self.direction == "average":
            rows, factor = self._ema, _gradients.bias_correction(self._counts, self.beta, weights.dtype)
        else:
            rows, factor = self._gradients, torch.ones_like(self._weights)
        self._release_direction()
        _gradients.combine(rows, self._everyone(weights, present) * factor, self._direction, self.backend)
        if self.control:
            # Only the difference is kept here; `_observe` adds the update, and with it the penalty's
            # gradient.
            ones = present.mask.to(weights.dtype)
            _gradients.combine(rows, ones * factor, self._control_direction, self.backend)
            self._control_direction.sub_(self._direction)
        parameters = [p for p, seen in zip(self._shared, self._reached, strict=True) if seen]
        views = [view for view, seen in zip(self._direction_views, self._reached, strict=True) if seen]
        accumulate(parameters, views)
        for position in range(len(present.rows)):
            own = [(parameter, grad) for parameter, at, grad in gradients if at == position]
            if own:
                scaled = torch._foreach_mul([grad for _, grad in own], weights[position])
                accumulate([parameter for parameter, _ in own], list(scaled))
        if penalty is not None:
            torch.autograd.backward(penalty)

    def _release_direction(self) -> None:
        """Gives every `.grad` that is still a view of the direction buffer its own memory."""
        start = self._direction.untyped_storage().data_ptr()
        for parameter in self._shared:
            grad = parameter.grad
            if grad is not None and grad.untyped_storage().data_ptr() == start:
                parameter.grad = grad.clone()

    # -- telemetry -----------------------------------------------------------------------------------------

    def _snapshot(self) -> list[Tensor | None] | None:
        """What `.grad` of the shared parameters holds before the call; None when it is empty."""
        if all(parameter.grad is None for parameter in self._shared):
            return None
        return [None if p.grad is None else p.grad.clone() for p in self._shared]

    def _observe(self, before: Sequence[Tensor | None] | None) -> None:
        """Takes what this call added to `.grad` of the shared parameters, penalty included, as the update."""
        direction = self._added(before)
        self._variance["gradient_variance"].update(direction)
        if self.control:
            self._variance["control_gradient_variance"].update(self._control_direction.add_(direction))

    def _added(self, before: Sequence[Tensor | None] | None) -> Tensor:
        exact = self.statistics and self.scope == "shared_parameters"
        if exact and all(
            parameter.grad is None or parameter.grad.data_ptr() == view.data_ptr()
            for parameter, view in zip(self._shared, self._direction_views, strict=True)
        ):
            return self._direction
        if self._observed is None:
            self._observed = self._layout.zeros()
        views = self._layout.views(self._observed)
        write_row(views, [parameter.grad for parameter in self._shared])
        for view, old in zip(views, before or [], strict=False):
            if old is not None:
                view.sub_(old)
        return self._observed

    def _step(self, weights: Tensor, present: _Present) -> SGLStep:
        return SGLStep(weights, self._gram, self._cosine, self._norms, present.mask)

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Figures for a log, of the last statistics step and the last window of updates (waits for the
        device).

        Keys: `weight/<task>`; with a variance window `gradient_variance` and `gradient_variance_matched` (see
        `telemetry.DirectionVariance`), with `control` the same two with the prefix `control_`; with task
        gradients `gradient_norm/<task>`, `cosine/<task>/<task>` for every pair, and the figures of
        `telemetry.gram_metrics`, all over the tasks seen so far. A figure that has no value yet is nan.
        """
        self._setup()
        weights = self._used_weights(self._present_tasks(tuple(range(len(self.tasks))))).tolist()
        result = {f"weight/{task}": weight for task, weight in zip(self.tasks, weights, strict=True)}
        for name, variance in self._variance.items():
            result[name], result[f"{name}_matched"] = variance.figures()
        seen = self._counts.nonzero().flatten()
        if not len(seen):
            return result
        gram = self._gram[seen][:, seen]
        result.update(gram_metrics(gram, self._weights[seen]))
        names = [self.tasks[row] for row in seen.tolist()]
        norms, cosines = self._norms[seen].tolist(), self._cosine[seen][:, seen].tolist()
        for row, name in enumerate(names):
            result[f"gradient_norm/{name}"] = norms[row]
            for column in range(row + 1, len(names)):
                result[f"cosine/{name}/{names[column]}"] = cosines[row][column]
        return result


def _trainable(name: str, parameters: Iterable[Parameter]) -> list[Parameter]:
    """The parameters with requires_grad, each once."""
    found: dict[int, Parameter] = {}
    for parameter in parameters:
        if not isinstance(parameter, Parameter):
            raise TypeError(f"{name}: expected Parameters, got {type(parameter).__name__}")
        if parameter.requires_grad:
            found.setdefault(id(parameter), parameter)
    return list(found.values())
