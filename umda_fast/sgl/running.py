"""What a `SelfGuided` makes at its first call, and keeps from step to step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from umda_fast.sgl.balancers import Balancer, StatefulBalancer
from umda_fast.sgl.batch import Present, SGLStep
from umda_fast.sgl.buffers import finite
from umda_fast.sgl.exchange import Exchange
from umda_fast.sgl.scopes.base import GradientScope, Measured
from umda_fast.sgl.statistics import GramStatistics, TaskWeights
from umda_fast.sgl.telemetry import gram_metrics
from umda_fast.sgl.variance import UpdateTelemetry


@dataclass(frozen=True)
class Running:
    """All of it, on the device of the parameters."""

    balancer: Balancer
    exchange: Exchange
    statistics: GramStatistics
    weights: TaskWeights
    scope: GradientScope
    telemetry: UpdateTelemetry

    def tensors(self) -> dict[str, Tensor]:
        """What a state holds beside the averages of the scope."""
        statistics = self.statistics
        return {
            "weights": self.weights.running,
            "gram": statistics.gram,
            "cosine_ema": statistics.cosine_ema,
            "counts": statistics.counts,
            "pair_counts": statistics.pair_counts,
            **self.later(),
        }

    def later(self) -> dict[str, Tensor]:
        """Those that a state of before version 0.2 lacks; then they stay as they are."""
        statistics = self.statistics
        return {
            "skipped": statistics.skipped,
            "last_loss": statistics.last_loss,
            "known": statistics.known,
            "held": self.weights.held,
        }

    def state(self, *, keep: bool) -> dict[str, Any]:
        """Clones of everything; every process calls it, without `keep` for nothing."""
        averages = self.scope.state(keep=keep)
        if not keep:
            return {}
        return {
            "reached": list(self.scope.reached),
            "tensors": {name: value.clone() for name, value in {**self.tensors(), **averages}.items()},
            "variance": self.telemetry.state_dict(),
            "balancer": self.balancer.state_dict() if isinstance(self.balancer, StatefulBalancer) else {},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state` gave.

        Raises:
            ValueError: it is of parameters of another size.
        """
        tensors = self.tensors()
        expected = {name: tuple(value.shape) for name, value in tensors.items()} | self.scope.shapes()
        found = {name: tuple(value.shape) for name, value in state["tensors"].items()}
        for name in set(self.later()).difference(found):
            del expected[name]
        if expected != found:
            raise ValueError(f"state_dict: expected tensors of shapes {expected}, got {found}")
        self.telemetry.load_state_dict(state["variance"])
        for name, value in state["tensors"].items():
            if name in tensors:
                tensors[name].copy_(value)
            else:
                self.scope.load(name, value)
        self.weights.forget()
        self.statistics.derive()
        self.scope.restore(state["reached"])
        if isinstance(self.balancer, StatefulBalancer):
            self.balancer.load_state_dict(state["balancer"])

    def balance(self, measured: Measured, present: Present) -> None:
        """New weights of the tasks present, from the balancer, which never sees what is not finite.

        A task whose loss or gradient is not finite is shown to it as it was last; its weight, and what the balancer
        remembers of it, stay. Those of all tasks do where it was never finite, or where the new weights are not.
        """
        statistics, balancer, sound = self.statistics, self.balancer, measured.sound
        if measured.gram is not None:
            statistics.remember(measured.gram, sound)
        losses, ready = statistics.finite_losses(measured.losses, sound, present)
        gram = present.take(statistics.gram, 0, 1)
        before: dict[str, Tensor] = {}
        if isinstance(balancer, StatefulBalancer):
            before = balancer.remembered()
            new = balancer.weights(gram, losses, None if present.everyone else present.index)
        else:
            new = balancer.weights(gram, losses)
        if new.shape != losses.shape:
            name = type(balancer).__name__
            got = tuple(new.shape)
            raise ValueError(f"balancer: expected {losses.shape[0]} weights of {name}, got shape {got}")
        new = self.exchange.agreed(new)
        ready = ready & finite(new).all()
        taken = sound & ready
        if isinstance(balancer, StatefulBalancer):
            balancer.forget(before, ~taken if present.everyone else present.mask & ~sound | ~ready)
        self.weights.held += ~ready
        self.weights.update(new, present, taken)

    def step(self, weights: Tensor, present: Present) -> SGLStep:
        """What a call with these weights [T] hands back."""
        statistics = self.statistics
        return SGLStep(weights, statistics.gram, statistics.cosine, statistics.norms, present.mask)

    def metrics(self, tasks: Sequence[str]) -> dict[str, float]:
        """See `SelfGuided.metrics`."""
        statistics = self.statistics
        weights = self.weights.used(self.exchange.sets(tuple(range(len(tasks))))).tolist()
        result = {f"weight/{task}": weight for task, weight in zip(tasks, weights, strict=True)}
        skipped = statistics.skipped.tolist()
        result.update((f"skipped/{task}", float(count)) for task, count in zip(tasks, skipped, strict=True))
        result["weights_held"] = float(self.weights.held)
        result.update(self.telemetry.figures())
        seen = statistics.counts.nonzero().flatten()
        if not len(seen):
            return result
        gram = statistics.gram[seen][:, seen]
        result.update(gram_metrics(gram, self.weights.running[seen]))
        names = [tasks[row] for row in seen.tolist()]
        norms, cosines = statistics.norms[seen].tolist(), statistics.cosine[seen][:, seen].tolist()
        for row, name in enumerate(names):
            result[f"gradient_norm/{name}"] = norms[row]
            for column in range(row + 1, len(names)):
                result[f"cosine/{name}/{names[column]}"] = cosines[row][column]
        return result
