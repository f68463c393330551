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
preallocated [T, P] buffer (those of linear layers' weights are made there, see `linear`). `.grad` of the
shared parameters is increased by `sum_t w_t mhat_t` (with
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
to it; an object that knows a shorter way, such as `UMDAOutput.instances`, may stand for it). Its rows are
other instances at every step, so gradients of different steps must not be averaged; the Gram matrix is:
`G_st <- beta G_st + (1 - beta) <g_s, g_t>`, bias-corrected by the number of steps on which both tasks were
present. Then ONE backward pass of `sum_t w_t L_t + penalty`: the trunk is traversed once, what lies between the
representation and the losses T + 1 times. With labels missing on some steps the entries of G average over
different steps, and G may be slightly indefinite.

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

**Several processes** (`process_group`). Every process calls `backward` with the losses of its own share of the
batch; what comes out is, in all of them and within rounding, what one process makes of the whole batch. The
loss of the whole batch is `L_t = sum_r (c_rt / sum_q c_qt) L_rt` over the processes r, `c_rt` being `counts`:
the labels that the mean `L_rt` is over. Penalties are summed as they are: divide one that every process
computes in full by their number, weigh one that is a mean by the share of what it is a mean of.

- Exact scope: as soon as a task's gradients are there they are on their way, summed over the processes,
  to the process that keeps these columns, while the next task's backward pass runs. Each process keeps,
  averages, multiplies and combines P/W columns (2 T P/W numbers, and 3 to 5 P for rows on their way and the
  result); the partial Gram matrices are added up, the combined columns gathered. Gradients of the other
  parameters are weighted, then summed.
- The other scopes: the Gram matrices of the processes are added up (representation: each has instances of
  its own; last layer: each has columns of its own), then ONE weighted backward pass, whose gradients are summed
  in buckets while it goes on. So are those of the steps between two statistics.
- Weights are those of process 0, bit for bit. A process may lack a task, or all of them.
- `task_parameters` has to name every other parameter, in every scope, in the same order everywhere.
- The model is the bare module: `DistributedDataParallel` would sum gradients a second time, and cannot be
  asked for the gradients of single tasks.
- Parameters that FSDP2 (`fully_shard`) holds in shards are left to it: it sums their gradients itself, in the
  scope `representation` (or `last_shared_layer`, if that is not sharded), with `variance_window=0`. Let it add
  and not average (`set_gradient_divide_factor(1.0)`, on gloo also
  `set_force_sum_reduction_for_comms(True)`), give every process a loss in every step, and let the heads read, and
  `representation` be, a view of what the trunk returns (`z = z.view_as(z)`): a pass that ends at its very output
  makes FSDP2 gather its parameters, once for every task.
- One wait for the device a step: which tasks are present has to be known. None if the group has a backend for the
  CPU beside that of the device (`backend="cpu:gloo,cuda:nccl"`).

**Half precision.** bfloat16 needs nothing. float16 parameters or losses are refused: float16 gradients need a
loss scale that changes from step to step, averages over steps would mix the scales, and an overflow, which
scaling provokes on purpose now and then, would stay in the averages.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from umda_fast.sgl import _gradients
from umda_fast.sgl.balancers import Balancer, StatefulBalancer
from umda_fast.sgl.buffers import FlatLayout, accumulate, write_row
from umda_fast.sgl.distributed import GradientReducer, Processes, ShardedRows, is_sharded
from umda_fast.sgl.graph import reached_leaves
from umda_fast.sgl.linear import LinearUse, linear_uses, write_gradients
from umda_fast.sgl.registry import as_balancer
from umda_fast.sgl.telemetry import DirectionVariance, cosine_matrix, gram_metrics

_NO_FLOAT16 = (
    "its gradients need a loss scale, which running averages would keep from one step to the next; use bfloat16"
)

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


class Representation(Protocol):
    """What can stand for the representation: it finds the Gram matrix of the gradients on it by itself."""

    @property
    def requires_grad(self) -> bool:
        """Whether there are gradients at all."""

    def gradient_gram(self, losses: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
        """Inner products [S, S] of the gradients of S losses; keeps the graph."""


@dataclass(frozen=True)
class _Batch:
    """The batch of all processes.

    Attributes:
        present: its tasks.
        losses: for each of them this process's part of its loss, None where it has none.
        penalty: this process's part of the penalty.
        penalized: whether some process has a penalty.
    """

    present: _Present
    losses: list[Tensor | None]
    penalty: Tensor | None
    penalized: bool

    @property
    def own(self) -> list[tuple[int, Tensor]]:
        """(position among the present tasks, loss) of what this process has."""
        return [(position, loss) for position, loss in enumerate(self.losses) if loss is not None]


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
        process_group: processes that each hold a share of every batch (`torch.distributed.group.WORLD` for
            all of them), see above; None, or a group of one: no communication.

    Raises:
        TypeError: `shared_parameters` or another list holds something that is not a Parameter.
        ValueError: an argument out of range, repeated task names, no trainable shared parameter, parameters
            on several devices, float16 parameters, a parameter that is both shared and a task's.
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
        process_group: ProcessGroup | None = None,
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
        if any(p.dtype == torch.float16 for p in (*self._shared, *self._task_parameters, *layer)):
            raise ValueError(f"shared_parameters: expected no float16 parameters: {_NO_FLOAT16}")
        self._scoped = layer if scope == "last_shared_layer" else self._shared
        self._left_to_fsdp = any(map(is_sharded, self._shared))
        if self._left_to_fsdp and (
            scope == "shared_parameters" or variance_window or any(map(is_sharded, layer)) or process_group is None
        ):
            raise ValueError(
                "shared_parameters: some are sharded (DTensor); expected a process_group, variance_window=0 and the "
                "scope representation, or last_shared_layer with a layer that is not sharded, got "
                f"scope={scope!r}, variance_window={variance_window}"
            )
        processes = None if process_group is None else Processes(process_group)
        self._processes = None if processes is None or processes.size == 1 else processes
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
        # Which parameters a task has reached so far, and which the penalty of this step does. Over several
        # processes: in any of them, from the exchange of the step on; once all are, nobody asks any more.
        self._reached = [False] * len(self._scoped)
        self._penalized = [False] * len(self._scoped)
        self._all_reached = False
        self._present: dict[tuple[int, ...], _Present] = {}
        if isinstance(self.balancer, StatefulBalancer):
            self.balancer.setup(count, device, dtype)

        self._held: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        exact = self.statistics and self.scope == "shared_parameters"
        if self._processes is not None:
            # FSDP2's own collectives run in the same pass, in an order that ours must not disturb.
            overlap = not self._left_to_fsdp
            self._reducer = GradientReducer(self._reduced_groups(), self._processes, overlap=overlap)
        if self.statistics and self.scope != "representation":
            scoped = FlatLayout(self._scoped)
            if self._processes is None:
                self._gradients = scoped.zeros(count)
                self._rows = [scoped.views(row) for row in self._gradients]
            else:
                # One row more in the exact scope, for the penalty.
                self._sharded = ShardedRows(scoped, count + exact, self._processes)
                self._gradients = self._sharded.rows[:count]
            self._ema = torch.zeros_like(self._gradients)
        if self.statistics and self.scope == "representation":
            self._gram_ema = torch.zeros(count, count, device=device, dtype=dtype)
        if exact:
            self._gathered = self._layout.zeros() if self._processes is None else self._sharded.padded()
            self._direction = self._gathered[: self._layout.numel]
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

    def _reduced_groups(self) -> list[list[Parameter]]:
        """The parameters whose gradients are summed over the processes: shared ones, then all others."""
        known = {id(p) for p in self._shared}
        others = {id(p): p for p in (*self._scoped, *self._task_parameters) if id(p) not in known}
        groups = [self._shared, list(others.values())]
        return [[p for p in group if not is_sharded(p)] for group in groups]

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

    def state_dict(self, *, keep: bool = True) -> dict[str, Any]:
        """Everything a resumed run needs to continue bit for bit; clones, in the scope's full size [T, P].

        With a process group every process calls it, and what comes out fits any number of processes.
        `keep=False` is for those that do not save it: they help to gather it, and get nothing.
        """
        self._setup()
        tensors = dict(self._state_tensors())
        if self._processes is not None and "ema" in tensors:
            tensors["ema"] = self._sharded.whole(self._ema, keep=keep)
        if not keep:
            return {}
        return {
            "tasks": list(self.tasks),
            "scope": self.scope,
            "calls": self._calls,
            "reached": list(self._reached),
            "tensors": {name: value.clone() for name, value in tensors.items()},
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
        if "ema" in tensors:
            expected["ema"] = (len(self.tasks), sum(p.numel() for p in self._scoped))
        found = {name: tuple(value.shape) for name, value in state["tensors"].items()}
        if expected != found:
            raise ValueError(f"state_dict: expected tensors of shapes {expected}, got {found}")
        if set(state["variance"]) != set(self._variance):
            raise ValueError(
                f"state_dict: expected variances {sorted(self._variance)}, got {sorted(state['variance'])}"
            )
        for name, value in state["tensors"].items():
            sharded = name == "ema" and self._processes is not None
            tensors[name].copy_(self._sharded.own(value) if sharded else value)
        self._held.clear()
        self._norms, self._cosine = cosine_matrix(self._gram)
        for name, value in state["variance"].items():
            self._variance[name].load_state_dict(value)
        if isinstance(self.balancer, StatefulBalancer):
            self.balancer.load_state_dict(state["balancer"])
        self._calls = state["calls"]
        self._reached = list(state["reached"])
        self._all_reached = all(self._reached)

    # -- the step ------------------------------------------------------------------------------------------

    def backward(
        self,
        losses: Mapping[str, Tensor],
        *,
        counts: Mapping[str, float] | None = None,
        penalty: Tensor | None = None,
        representation: Tensor | Representation | None = None,
    ) -> SGLStep:
        """Adds the gradient of the balanced total loss to `.grad` of every parameter it reaches.

        Args:
            losses: one scalar per task present, by name.
            counts: for several processes: how many labels (or which sum of weights) each loss is a mean over,
                numbers on the host; None: every process that has a task counts alike. Without a process group they
                change nothing.
            penalty: scalar, added as it is.
            representation: the tensor, of any shape, through which the tasks reach the trunk, or an object
                that knows the gradients on it in a shorter way (`UMDAOutput.instances`); that scope
                only.

        Raises:
            TypeError: a loss or the penalty is not a Tensor.
            ValueError: an unknown task, a loss that is not a scalar, is float16 or has no gradient, a count
                that is missing or not positive, a missing or constant representation, a loss that reaches a parameter
                in neither list (exact scope, or several processes).
            ProcessLostError: another process ended, or did not answer in time.
        """
        self._check(losses, counts, penalty, representation)
        self._setup()
        batch = self._batch(losses, counts, penalty)
        present = batch.present
        if not present.rows:
            self._backward(batch.penalty)
            return self._step(torch.zeros_like(self._weights), present)

        update = self._calls % self.every == 0
        self._calls += 1
        exact = update and self.statistics and self.scope == "shared_parameters"

        before = self._snapshot() if update and self.variance_window else None
        gradients: list[tuple[Parameter, int, Tensor]] = []
        if update:
            gram: Tensor | None = None
            if self.statistics and self.scope == "representation":
                gram = self._instance_gram(batch, representation)
            elif self.statistics:
                gradients = self._scoped_gradients(batch, keep_graph=not exact)
                gram = self._smoothed_gram(present)
            values = self._values(batch)
            if self._processes is not None:
                gram, values = self._added_up(gram, values)
            if gram is not None:
                self._remember(self._smoothed_pairs(gram, present) if self.scope == "representation" else gram, present)
            self._balance(values, present)

        weights, everyone = self._step_weights(present)
        if exact:
            self._apply(gradients, weights, everyone, batch)
        else:
            self._backward(self._total(batch, weights))
        if update and self.variance_window:
            self._observe(before)
        return self._step(everyone, present)

    def _batch(
        self, losses: Mapping[str, Tensor], counts: Mapping[str, float] | None, penalty: Tensor | None
    ) -> _Batch:
        """What all processes have. Several: one exchange of T + 1 numbers."""
        if penalty is not None and not penalty.requires_grad:
            penalty = None
        if self._processes is None:
            rows = tuple(row for row, task in enumerate(self.tasks) if task in losses)
            parts: list[Tensor | None] = [losses[self.tasks[row]].reshape(()) for row in rows]
            return _Batch(self._present_tasks(rows), parts, penalty, penalty is not None)
        own = [0.0 if task not in losses else 1.0 if counts is None else float(counts[task]) for task in self.tasks]
        *totals, penalized = self._processes.total_on_host([*own, float(penalty is not None)])
        rows = tuple(row for row, total in enumerate(totals) if total > 0)
        parts = []
        for row in rows:
            loss = losses.get(self.tasks[row])
            parts.append(None if loss is None else loss.reshape(()) * (own[row] / totals[row]))
        self._check_reached(rows, parts, penalty)
        return _Batch(self._present_tasks(rows), parts, penalty, penalized > 0)

    def _values(self, batch: _Batch) -> Tensor:
        """This process's parts [A] of the losses of the tasks present, detached."""
        zero = self._weights.new_zeros(())
        return torch.stack([zero if loss is None else loss.detach().to(zero.dtype) for loss in batch.losses])

    def _added_up(self, gram: Tensor | None, values: Tensor) -> tuple[Tensor | None, Tensor]:
        """Gram matrix [T, T], losses [A] and, in the exact scope, which parameters are reached: one exchange."""
        assert self._processes is not None
        exact = gram is not None and self.scope == "shared_parameters"
        flags = [*self._reached, *self._penalized] if exact and not self._all_reached else []
        small = [values.double(), torch.tensor(flags, dtype=torch.float64, device=values.device)]
        if gram is not None:
            small.append(gram.double().reshape(-1))
        total = self._processes.total(torch.cat(small))
        tasks, reached, products = total.split([len(values), len(flags), len(total) - len(values) - len(flags)])
        if flags:
            both: list[bool] = (reached > 0).tolist()
            self._reached, self._penalized = both[: len(both) // 2], both[len(both) // 2 :]
            self._all_reached = all(self._reached)
        if gram is not None:
            gram = products.view_as(gram).to(gram.dtype)
        return gram, tasks.to(values.dtype)

    def _total(self, batch: _Batch, weights: Tensor) -> Tensor | None:
        """The weighted sum of this process's losses and its penalty; None where it has neither."""
        own = batch.own
        if not own:
            return batch.penalty
        losses = torch.stack([loss.to(weights.dtype) for _, loss in own])
        if len(own) < len(batch.losses):
            weights = torch.stack([weights[position] for position, _ in own])
        total = (losses * weights).sum()
        return total if batch.penalty is None else total + batch.penalty.reshape(()).to(total.dtype)

    def _backward(self, total: Tensor | None) -> None:
        """One backward pass, its gradients summed over the processes."""
        if self._processes is not None:
            self._reducer.backward(total)
        elif total is not None:
            torch.autograd.backward(total)

    def _check(
        self,
        losses: Mapping[str, Tensor],
        counts: Mapping[str, float] | None,
        penalty: Tensor | None,
        representation: Tensor | Representation | None,
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
            if value.dtype == torch.float16:
                raise ValueError(f"{name}: expected anything but float16: {_NO_FLOAT16}")
        for name, value in losses.items():
            if counts is not None and not 0 < counts.get(name, 0) < math.inf:
                raise ValueError(f"counts[{name!r}]: expected a positive number, got {counts.get(name)}")
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

    def _scoped_gradients(self, batch: _Batch, *, keep_graph: bool) -> list[tuple[Parameter, int, Tensor]]:
        """Fills the buffer rows of the tasks present, and in the exact scope over several processes that of the
        penalty.

        Returns:
            In the exact scope, the gradients of all other parameters: (parameter, position of the task,
                gradient), -1 for the penalty.
        """
        exact = self.scope == "shared_parameters"
        own = batch.own
        others = self._other_parameters([loss for _, loss in own], batch.present) if exact else []
        uses: list[LinearUse | None] = [None] * len(self._scoped)
        if self._processes is None:
            uses = linear_uses([loss for _, loss in own], self._scoped)
        asked = [p if use is None else use.edge for p, use in zip(self._scoped, uses, strict=True)]
        wanted: list[Any] = [*asked, *others]
        kept: list[tuple[Parameter, int, Tensor]] = []

        def gradients(output: Tensor | None, position: int, retain: bool) -> Sequence[Tensor | None]:
            if output is None:
                return [None] * len(self._scoped)
            found = torch.autograd.grad(output, wanted, retain_graph=retain, allow_unused=True)
            kept.extend(
                (parameter, position, grad)
                for parameter, grad in zip(others, found[len(self._scoped) :], strict=True)
                if grad is not None
            )
            return found[: len(self._scoped)]

        last = -1 if keep_graph or batch.penalty is not None or not own else own[-1][0]
        for position, (row, loss) in enumerate(zip(batch.present.rows, batch.losses, strict=True)):
            scoped = gradients(loss, position, position != last)
            if self._processes is None:
                write_gradients(self._rows[row], scoped, uses, self.backend)
            else:
                self._sharded.put(row, scoped)
            self._reached = [old or grad is not None for old, grad in zip(self._reached, scoped, strict=True)]
        if self._processes is None:
            return kept
        if exact:
            self._penalized = [False] * len(self._scoped)
            if batch.penalized:
                scoped = gradients(batch.penalty, -1, False)
                self._penalized = [grad is not None for grad in scoped]
                self._sharded.put(len(self.tasks), scoped)
        self._sharded.wait()
        return kept

    def _other_parameters(self, losses: Sequence[Tensor], present: _Present) -> list[Parameter]:
        """Parameters outside the shared ones that the losses reach."""
        if self._processes is not None or (
            self._task_parameters and self._checked.issuperset(present.rows)
        ):
            return self._reduced_groups()[1] if self._processes is not None else self._task_parameters
        known = {id(p) for p in self._shared}
        found = [leaf for leaf in reached_leaves(losses) if id(leaf) not in known]
        if not self._task_parameters:
            return found
        self._check_listed(found, self._task_parameters)
        self._checked.update(present.rows)
        return self._task_parameters

    def _check_reached(
        self, rows: tuple[int, ...], losses: Sequence[Tensor | None], penalty: Tensor | None
    ) -> None:
        """Several processes: once for each task and for the penalty, that all they reach is listed."""
        if self._left_to_fsdp:
            return  # the graph ends in parameters of its own
        outputs = {row: loss for row, loss in zip(rows, losses, strict=True) if loss is not None}
        if penalty is not None:
            outputs[-1] = penalty
        if self._checked.issuperset(outputs):
            return
        self._check_listed(reached_leaves(outputs.values()), [p for group in self._reduced_groups() for p in group])
        self._checked.update(outputs)

    def _check_listed(self, found: Sequence[Parameter], listed: Sequence[Parameter]) -> None:
        missing = {id(leaf) for leaf in found} - {id(p) for p in listed}
        if not missing:
            return
        shapes = [tuple(leaf.shape) for leaf in found if id(leaf) in missing]
        alone = ", or an empty list to find them" if self._processes is None else ""
        raise ValueError(
            f"task_parameters: the losses reach {len(missing)} parameters (shapes {shapes[:4]}) that are "
            f"neither here nor in shared_parameters; expected all of them{alone}"
        )

    def _smoothed_gram(self, present: _Present) -> Tensor:
        """Averages the buffer into the running gradients; Gram matrix [T, T] of these, bias-corrected, of this
        process's columns."""
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

    def _instance_gram(self, batch: _Batch, representation: Tensor | Representation | None) -> Tensor:
        """Gram matrix [T, T] of the gradients on this process's instances, zeros where it has none."""
        full = torch.zeros_like(self._gram_ema)
        own = batch.own
        if not own:
            return full
        assert representation is not None
        here = self._present_tasks(tuple(batch.present.rows[position] for position, _ in own))
        gram = self._representation_gram([loss for _, loss in own], representation)
        if len(here.rows) == len(self.tasks):
            return gram
        wide = torch.zeros_like(full[here.index]).index_copy(1, here.index, gram)
        return full.index_copy(0, here.index, wide)

    def _representation_gram(self, losses: Sequence[Tensor], representation: Tensor | Representation) -> Tensor:
        """Gram matrix [A, A] of the gradients of A losses on the representation."""
        if not isinstance(representation, Tensor):
            return representation.gradient_gram(losses, backend=self.backend).to(self._layout.dtype)
        gradients = []
        for loss in losses:
            (grad,) = torch.autograd.grad(loss, representation, retain_graph=True, allow_unused=True)
            gradients.append(torch.zeros_like(representation) if grad is None else grad)
        return _gradients.gram(gradients, self._layout.dtype, self.backend)

    def _smoothed_pairs(self, gram: Tensor, present: _Present) -> Tensor:
        """Averages `gram` [T, T] into the running one, which comes back bias-corrected."""
        self._counts += present.mask
        pairs = present.mask[:, None] & present.mask[None, :]
        mixed = self.beta * self._gram_ema + (1 - self.beta) * gram
        self._gram_ema.copy_(torch.where(pairs, mixed, self._gram_ema))
        counts = self._pair_counts + pairs
        return self._gram_ema * _gradients.bias_correction(counts, self.beta, gram.dtype)

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
        if self._processes is not None:
            # All processes have the same Gram matrix; their arithmetic, and a balancer that draws, may differ.
            new = self._processes.from_first(new.contiguous())
        self._held.clear()
        old = self._take(self._weights, present, 0)
        mixed = self.weight_beta * old + (1 - self.weight_beta) * new.to(old.dtype)
        self._weights = self._weights.index_copy(0, present.index, mixed)

    def _used_weights(self, present: _Present) -> Tensor:
        """Weights [A] of the tasks present; they sum to their number where the balancer's always do."""
        weights = self._take(self._weights, present, 0)
        # Needed with all tasks present too: after a step without some of them the running weights' sum
        # drifts.
        return weights * (len(present.rows) / weights.sum()) if self.balancer.normalized else weights

    def _step_weights(self, present: _Present) -> tuple[Tensor, Tensor]:
        """Weights of the tasks present, [A], and [T] with 0 for the others; made once between two updates."""
        if present.rows not in self._held:
            weights = self._used_weights(present)
            self._held[present.rows] = (
                weights,
                torch.zeros_like(self._weights).index_copy(0, present.index, weights),
            )
        return self._held[present.rows]

    def _apply(
        self,
        gradients: Sequence[tuple[Parameter, int, Tensor]],
        weights: Tensor,
        everyone: Tensor,
        batch: _Batch,
    ) -> None:
        """Exact scope: combines the running gradients and adds everything to `.grad`."""
        if self.direction == "average":
            rows, factor = self._ema, _gradients.bias_correction(self._counts, self.beta, weights.dtype)
        else:
            rows, factor = self._gradients, torch.ones_like(self._weights)
        own: list[tuple[list[Parameter], list[Tensor]]] = []
        for position in range(-1, len(batch.present.rows)):
            of = [(parameter, grad) for parameter, at, grad in gradients if at == position]
            if of:
                found = [grad for _, grad in of]
                scaled = found if position < 0 else list(torch._foreach_mul(found, weights[position]))
                own.append(([parameter for parameter, _ in of], scaled))
        if self._processes is not None:
            self._reducer.begin(1)
            for parameters, scaled in own:
                self._reducer.add(parameters, scaled)
            self._reducer.start()
        self._release_direction()
        self._combine(rows, everyone * factor, batch.present.mask.to(factor.dtype) * factor, batch.penalized)
        reached = self._reached
        if self._processes is not None and batch.penalized and not self._all_reached:
            reached = [task or penalty for task, penalty in zip(reached, self._penalized, strict=True)]
        parameters = [p for p, seen in zip(self._shared, reached, strict=True) if seen]
        accumulate(parameters, [view for view, seen in zip(self._direction_views, reached, strict=True) if seen])
        if self._processes is not None:
            self._reducer.finish()
            return
        for parameters, scaled in own:
            accumulate(parameters, scaled)
        if batch.penalty is not None:
            torch.autograd.backward(batch.penalty)

    def _combine(self, rows: Tensor, weights: Tensor, equal: Tensor, penalized: bool) -> None:
        """The direction [P], and with `control` the difference to it of the direction with equal weights."""
        processes = self._processes
        columns = rows.shape[1]
        control = None
        if self.control:
            # Only the difference is kept here; `_observe` adds the update, and with it the penalty's
            # gradient.
            control = self._control_direction if processes is None else rows.new_empty(columns)
            _gradients.combine(rows, equal, control, self.backend)
        out = self._direction if processes is None else rows.new_empty(columns)
        _gradients.combine(rows, weights, out, self.backend)
        if control is not None:
            control.sub_(out)
        if processes is None:
            return
        if control is not None:
            processes.gather(control, self._gathered)
            self._control_direction.copy_(self._direction)
        if penalized:
            out.add_(self._sharded.rows[len(self.tasks)])
        processes.gather(out, self._gathered)

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
