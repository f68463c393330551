"""Self-guided learning: one backward call that balances the tasks of a multi-task model.

    sgl = SelfGuided(model.shared_parameters(), tasks=["a", "b"])
    sgl.backward({"a": loss_a, "b": loss_b})
    optimizer.step()  # without momentum of its own for the shared parameters, see below

The total loss is `sum_t w_t L_t + penalty`; penalties are never re-weighted. The weights come from a balancer that
sees the losses and the Gram matrix of the task gradients, of the tasks present. Where these gradients are taken is the
scope:

- `shared_parameters`, the exact one: T backward passes; to `.grad` of the shared parameters are added the weighted
  running averages of the tasks' gradients. They take the place of an optimiser's momentum: give it none for these
  parameters, as in `AdamW([{"params": shared, "betas": (0.0, 0.999)}, {"params": rest}])`. With
  `direction="gradient"`, in the other scopes and on steps without statistics, `.grad` is an ordinary gradient, and the
  usual momentum is right.
- `last_shared_layer`: T passes down to that layer, then one backward pass for everything.
- `representation`: T passes down to a tensor, then one backward pass for everything.

A task absent from `losses` keeps all its statistics and contributes nothing; a step without any applies the penalty
alone and does not count. A balancer of losses only (`Equal` too) makes every step a plain one, unless
`statistics=True`; so are the steps between two statistics steps with `every=m`: weights held, one backward pass.

Gradients are added to `.grad` by autograd itself, as `Tensor.backward` does, for every leaf that the losses reach:
hooks of leaves, memory formats, sparse and complex gradients and parameters frozen midway are as in plain PyTorch;
the caller zeroes `.grad`. A shared parameter that no task has reached so far keeps its `.grad` as it was. In the
exact scope micro-batches are steps of the average. What cannot be served (a re-entrant checkpoint, parameters
replaced since) is an error that names it, before anything is changed. Hooks between the leaves and the losses see
every pass by itself. A step reads nothing back from the device, unless the balancer says so
(`Balancer.synchronizes`). What is not finite enters no average and no weight. float16 parameters and losses are
refused; float16 autocast goes with `scaler=`.

Formulas are in docs/model.md, section 4, and at the head of each file of `scopes`; several processes
(`process_group=`) and FSDP2 in docs/distributed.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from umda_fast.sgl.balancers import Balancer, StatefulBalancer
from umda_fast.sgl.batch import Scaler, SGLStep, check_losses, loss_scale
from umda_fast.sgl.buffers import FlatLayout
from umda_fast.sgl.distributed import Processes, is_sharded
from umda_fast.sgl.exchange import Alone, Exchange, Together
from umda_fast.sgl.graph import Look
from umda_fast.sgl.parameters import ParameterLists
from umda_fast.sgl.registry import as_balancer
from umda_fast.sgl.running import Running
from umda_fast.sgl.scopes import SCOPES, Direction, Representation, Scope, Setting, Unmeasured
from umda_fast.sgl.statistics import GramStatistics, TaskWeights
from umda_fast.sgl.variance import UpdateTelemetry

__all__ = ["Direction", "Representation", "SGLStep", "Scope", "SelfGuided"]


class SelfGuided:
    """Balances the tasks of a multi-task model; see the module docstring for what is computed.

    Args:
        shared_parameters: parameters that several tasks train, or other leaves that require grad; frozen ones are left
            out. One device.
        tasks: names of the T tasks, in the order of all [T] results.
        task_parameters: all other trainable parameters that the losses reach (heads, branches). Needed by the
            exact scope only, and in all scopes by several processes. Empty: they are found in the autograd graph.
            Given, they are checked against it. Leaves that are no Parameters are found in any case.
        balancer: a `Balancer`, the name of one (`registry.BALANCERS`), a weighting, aggregator or scalariser
            of torchjd, or any function gram [T, T] -> weights [T].
        scope: where task gradients are taken.
        last_shared_layer: its parameters; for that scope only.
        every: statistics and new weights on one step of this many. With more than 1 the exact scope goes best with
            `direction="gradient"`, which makes all steps alike.
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
            all of them), see docs/distributed.md; None, or a group of one: no communication.

    Raises:
        TypeError: `shared_parameters` or another list holds something that is neither a Parameter nor a leaf that
            requires grad.
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
        self.balancer = as_balancer(balancer)
        self.scope: Scope = scope
        self.direction: Direction = direction
        self.every = every
        self.beta = beta
        self.weight_beta = self.balancer.weight_beta if weight_beta is None else weight_beta
        self.statistics = self.balancer.needs_gram if statistics is None else statistics
        self.variance_window = variance_window
        self.control = control
        self.backend = backend
        self._check_options()
        self._parameters = ParameterLists(shared_parameters, task_parameters, last_shared_layer)
        self._kind = SCOPES[scope]
        self._check_parameters(process_group)
        processes = None if process_group is None else Processes(process_group)
        self._processes = None if processes is None or processes.size == 1 else processes
        self._calls = 0
        self._running: Running | None = None

    def _check_options(self) -> None:
        """ValueError for an argument out of range."""
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks: expected one or more different names, got {list(self.tasks)}")
        for name, value, kinds in (("scope", self.scope, Scope), ("direction", self.direction, Direction)):
            if value not in get_args(kinds):
                raise ValueError(f"{name}: expected one of {', '.join(get_args(kinds))}, got {value!r}")
        if self.every < 1:
            raise ValueError(f"every: expected at least 1, got {self.every}")
        for name, decay in (("beta", self.beta), ("weight_beta", self.weight_beta)):
            if not 0 <= decay < 1:
                raise ValueError(f"{name}: expected 0 <= {name} < 1, got {decay}")
        if self.variance_window < 0 or self.variance_window == 1:
            raise ValueError(f"variance_window: expected 0 or at least 2, got {self.variance_window}")
        if self.balancer.needs_gram and not self.statistics:
            name = type(self.balancer).__name__
            raise ValueError(f"statistics: {name} reads the Gram matrix, expected True or None, got False")
        if self.control and (self.scope != "shared_parameters" or not self.statistics or not self.variance_window):
            raise ValueError(
                "control: expected the scope shared_parameters with statistics and a variance window, got "
                f"scope={self.scope!r}, statistics={self.statistics}, variance_window={self.variance_window}"
            )

    def _check_parameters(self, process_group: ProcessGroup | None) -> None:
        """ValueError for parameters that the scope cannot work with."""
        layer = self._parameters.layer
        if self._kind.needs_layer and not layer:
            raise ValueError("last_shared_layer: expected parameters for the scope of that name, got none")
        if self._parameters.sharded and (
            self.scope == "shared_parameters"
            or self.variance_window
            or any(map(is_sharded, layer))
            or process_group is None
        ):
            raise ValueError(
                "shared_parameters: some are sharded (DTensor); expected a process_group, variance_window=0 and the "
                "scope representation, or last_shared_layer with a layer that is not sharded, got "
                f"scope={self.scope!r}, variance_window={self.variance_window}"
            )

    # -- state ---------------------------------------------------------------------------------------------

    def _setup(self) -> Running:
        """Allocates everything. At the first call and not before, so that the model may still be moved."""
        if self._running is not None:
            return self._running
        lists = self._parameters
        scoped = self._kind.parameters(lists)
        devices = {p.device for p in (*lists.shared, *scoped)}
        if len(devices) != 1:
            raise ValueError(f"shared_parameters: expected one device, got {sorted(map(str, devices))}")
        count = len(self.tasks)
        layout = FlatLayout(lists.shared)
        device, dtype = layout.device, layout.dtype
        weights = TaskWeights(count, self.weight_beta, self.balancer.normalized, device, dtype)
        statistics = GramStatistics(count, self.beta, device, dtype)
        if isinstance(self.balancer, StatefulBalancer):
            self.balancer.setup(count, device, dtype)
        exchange: Exchange = Alone(lists, self.tasks, device)
        if self._processes is not None:
            exchange = Together(lists, self.tasks, device, self._processes)
        kind = self._kind if self.statistics else Unmeasured
        setting = Setting(
            count, lists, layout, scoped, exchange, statistics, self.direction, self.control, self.backend
        )
        telemetry = UpdateTelemetry(lists.shared, layout, self.variance_window, self.control)
        self._running = Running(self.balancer, exchange, statistics, weights, kind(setting), telemetry)
        return self._running

    @property
    def cosine_ema(self) -> Tensor:
        """Running mean [T, T] of the cosines; 0 for pairs never seen together, diagonal 1."""
        return self._setup().statistics.cosine_mean()

    def state_dict(self, *, keep: bool = True) -> dict[str, Any]:
        """Everything a resumed run needs to continue bit for bit; clones, in the scope's full size [T, P].

        With a process group every process calls it, and what comes out fits any number of processes.
        `keep=False` is for those that do not save it: they help to gather it, and get nothing.
        """
        state = self._setup().state(keep=keep)
        if not keep:
            return {}
        return {"tasks": list(self.tasks), "scope": self.scope, "calls": self._calls, **state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state_dict` gave.

        Raises:
            ValueError: the state is of other tasks, another scope, or parameters of another size.
        """
        running = self._setup()
        for name, here in (("tasks", list(self.tasks)), ("scope", self.scope)):
            if state[name] != here:
                raise ValueError(f"state_dict: expected {name} {here}, got {state[name]}")
        running.load(state)
        self._calls = state["calls"]

    # -- the step ------------------------------------------------------------------------------------------

    def backward(
        self,
        losses: Mapping[str, Tensor],
        *,
        counts: Mapping[str, float] | None = None,
        penalty: Tensor | None = None,
        representation: Tensor | Representation | None = None,
        scaler: Scaler | None = None,
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
            scaler: a `torch.amp.GradScaler`, with losses that it has not scaled. What is added to `.grad` is scaled, as
                `scaler.step` expects it; weights, averages and figures are of what is not.

        Raises:
            TypeError: a loss or the penalty is not a Tensor, the scaler not a scaler.
            ValueError: an unknown task, a loss that is not a scalar, is float16 or has no gradient, a count
                that is missing or not positive, a missing or constant representation or one that no loss reaches, a
                loss that reaches a parameter in neither list (exact scope, or several processes), losses that reach
                none of the scope's parameters, a re-entrant checkpoint in the way, a sparse gradient to be averaged.
                Nothing is changed then.
            ProcessLostError: another process ended, or did not answer in time.
        """
        check_losses(self.tasks, losses, counts, penalty)
        device = self._parameters.shared[0].device.type
        # It may be called with grad off, as `Tensor.backward`, or under autocast, which would take our own matrix
        # products in half precision.
        autocast = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
        with torch.enable_grad(), autocast:
            return self._backward(losses, counts, penalty, representation, scaler)

    def _backward(
        self,
        losses: Mapping[str, Tensor],
        counts: Mapping[str, float] | None,
        penalty: Tensor | None,
        representation: Tensor | Representation | None,
        scaler: Scaler | None,
    ) -> SGLStep:
        missing = self._kind.missing(representation) if losses else ""
        if missing:
            raise ValueError(missing)
        running = self._setup()
        scope = running.scope
        scale = loss_scale(scaler, running.weights.running.device)
        learned = penalty if penalty is None or penalty.requires_grad else None
        measured_step = self._calls % self.every == 0
        rows = {self.tasks.index(name): loss for name, loss in losses.items()}
        look = scope.look(rows, learned) if measured_step else Look()
        batch = running.exchange.batch(losses, counts, learned, scale, look)
        present = batch.present
        if not present.rows:
            running.exchange.backward(batch.total(running.weights.running))
            return running.step(torch.zeros_like(running.weights.running), present)

        self._calls += 1
        if not measured_step:
            weights, everyone = running.weights.of_step(present)
            running.exchange.backward(batch.total(weights))
            return running.step(everyone, present)
        if not scope.tells_added:
            running.telemetry.begin()
        measured = scope.measure(batch, look, representation)
        running.balance(measured, present)
        weights, everyone = running.weights.of_step(present)
        scope.apply(measured, batch, weights, everyone)
        running.telemetry.end(scope.added(), scope.control, batch.scale)
        return running.step(everyone, present)

    # -- telemetry -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Figures for a log, of the last statistics step and the last window of updates (waits for the
        device).

        Keys: `weight/<task>`; `skipped/<task>`, the statistics steps on which its loss or gradient was not finite;
        `weights_held`, those on which no weight moved, because new ones were not finite or a task never was; with a
        variance window `gradient_variance` and `gradient_variance_matched` (see `variance.DirectionVariance`), with
        `control` the same two with the prefix `control_`; with task gradients `gradient_norm/<task>`,
        `cosine/<task>/<task>` for every pair, and the figures of `telemetry.gram_metrics`, all over the tasks seen so
        far. A figure that has no value yet is nan.
        """
        return self._setup().metrics(self.tasks)
