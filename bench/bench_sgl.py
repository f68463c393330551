"""What self-guided learning adds to a training step: ``python -m bench.bench_sgl [--part NAME] [--peaks]``.

`mlp`: a trunk of 512-1024-1024-256 units (P = 1.84 million), T linear heads of ten classes, a batch of 256. A step is
forward, losses and gradients, no optimizer. Every contender that smooths does so with the same beta and asks the same
balancer, so that what differs is how the gradients of the tasks are found, kept, multiplied and combined.

`statistics`: smoothing, Gram matrix and combination alone at T = 8 and P = 1.84 million.

`umda`: a training step of the UMDA model on 20,000 instances with 8 tasks, with the gradients on the representation
found by the fused operation and by one backward pass per task; time and peak memory.
"""

import argparse
import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umda_fast import UMDA, TaskSpec, UMDAConfig, ViewSpec
from umda_fast.model import UMDAOutput, penalty_loss, task_losses
from umda_fast.ops import combine_task_gradients, task_gradient_statistics
from umda_fast.sgl import Scope, SelfGuided, SGLBalancer

from .harness import (
    Contender,
    Seconds,
    medians,
    parser,
    peak_growth,
    print_peak_growth,
    report,
    require_parity,
    start,
)

BETA = 0.9
TASKS = (2, 4, 8, 16)
WIDTHS = (512, 1024, 1024, 256)
BATCH, CLASSES = 256, 10


class Network(nn.Module):
    """The trunk and its heads; `step` builds the graph of one batch."""

    def __init__(self, tasks: int, batch: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for before, after in pairwise(WIDTHS):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(WIDTHS[-1], CLASSES) for _ in range(tasks))
        self.names = [f"task {t}" for t in range(tasks)]
        self.x = torch.randn(batch, WIDTHS[0])
        self.labels = torch.randint(CLASSES, (tasks, batch))

    def shared(self) -> list[nn.Parameter]:
        return list(self.trunk.parameters())

    def own(self) -> list[nn.Parameter]:
        return list(self.heads.parameters())

    def forward(self) -> tuple[Tensor, list[Tensor]]:
        """The features [batch, 256] and one loss per task."""
        for parameter in self.parameters():
            parameter.grad = None
        features = self.trunk(self.x)
        pairs = zip(self.heads, self.labels, strict=True)
        return features, [F.cross_entropy(head(features), label) for head, label in pairs]


def plain(network: Network) -> Contender:
    def step() -> None:
        _, losses = network()
        torch.stack(losses).sum().backward()

    return step


def guided(network: Network, scope: Scope, **options: Any) -> Contender:
    """`SelfGuided` with its balancer."""
    last = list(network.trunk[-2].parameters()) if scope == "last_shared_layer" else []
    sgl = SelfGuided(
        network.shared(),
        network.names,
        task_parameters=network.own(),
        last_shared_layer=last,
        scope=scope,
        beta=BETA,
        **options,
    )

    def step() -> None:
        features, losses = network()
        named = dict(zip(network.names, losses, strict=True))
        sgl.backward(named, representation=features if scope == "representation" else None)

    return step


def loop(network: Network) -> Contender:
    """What one writes without a library: a backward pass per task, concatenated, averaged, multiplied, combined."""
    tasks, balancer = len(network.names), SGLBalancer()
    shared = network.shared()
    ema = torch.zeros(tasks, sum(p.numel() for p in shared))
    weights = torch.ones(tasks)
    count = 0

    def step() -> None:
        nonlocal count, weights
        _, losses = network()
        rows = []
        for t, (head, loss) in enumerate(zip(network.heads, losses, strict=True)):
            own = list(head.parameters())
            grads = torch.autograd.grad(loss, [*shared, *own], retain_graph=t + 1 < tasks)
            rows.append(torch.cat([g.flatten() for g in grads[: len(shared)]]))
            for p, g in zip(own, grads[len(shared) :], strict=True):
                p.grad = g
        count += 1
        ema.mul_(BETA).add_(torch.stack(rows), alpha=1 - BETA)
        mean = ema / (1 - BETA**count)
        gram = mean @ mean.T
        new = balancer.weights(gram, torch.stack([loss.detach() for loss in losses]))
        weights = BETA * weights + (1 - BETA) * new
        direction = mean.T @ weights
        for p, piece in zip(shared, direction.split([p.numel() for p in shared]), strict=True):
            p.grad = piece.view_as(p)
        for t, head in enumerate(network.heads):
            for p in head.parameters():
                assert p.grad is not None
                p.grad.mul_(weights[t])

    return step


def torchjd_contenders(network: Network) -> dict[str, Contender]:
    """UPGrad of torchjd (no averages): through Jacobians, and through its autogram engine; none without torchjd."""
    try:
        from torchjd.aggregation import UPGrad, UPGradWeighting
        from torchjd.autogram import Engine
        from torchjd.autojac import jac_to_grad, mtl_backward
    except ImportError:
        return {}
    aggregator, weighting = UPGrad(), UPGradWeighting()
    hooked = Network(len(network.names), len(network.x))  # the engine's hooks must see no other contender's passes
    engine = Engine(hooked.trunk, batch_dim=None)

    def jacobians(chunk: int | None) -> Contender:
        def step() -> None:
            features, losses = network()
            tasks_params = [list(head.parameters()) for head in network.heads]
            mtl_backward(
                losses, features, tasks_params=tasks_params, shared_params=network.shared(), parallel_chunk_size=chunk
            )
            jac_to_grad(network.shared(), aggregator)

        return step

    def autogram() -> None:
        _, losses = hooked()
        stacked = torch.stack(losses)
        stacked.backward(weighting(engine.compute_gramian(stacked)))

    return {
        "torchjd UPGrad, batched": jacobians(None),
        "torchjd UPGrad, one by one": jacobians(1),
        "torchjd UPGrad, autogram": autogram,
    }


def per_call(seconds: Seconds, calls: int) -> Seconds:
    """Of a contender that makes several calls."""
    result = Seconds([seconds / calls])
    result.least = seconds.least / calls
    return result


def repeated(step: Contender, calls: int) -> Contender:
    def many() -> None:
        for _ in range(calls):
            step()

    return many


def check_mlp(network: Network) -> None:
    """The first exact step: what reaches the shared parameters is as near to float64 as the loop's."""

    def gradient(network: Network, make: Callable[[Network], Contender]) -> list[Tensor]:
        make(network)()
        return [p.grad.detach().clone() for p in network.shared() if p.grad is not None]

    exact = copy.deepcopy(network).double()
    exact.x = exact.x.double()
    wide = [g.double() for g in gradient(exact, lambda n: guided(n, "shared_parameters"))]
    ours, theirs = (gradient(network, make) for make in (lambda n: guided(n, "shared_parameters"), loop))
    require_parity("exact step", ours, wide, theirs)


EVERY = 10


def mlp(options: argparse.Namespace) -> None:
    batch = max(1, int(BATCH * options.size))
    for tasks in options.tasks:
        network = Network(tasks, batch)
        check_mlp(network)
        every = f"umda_fast, exact, every={EVERY}"
        contenders = {
            "plain summed step": plain(network),
            "umda_fast, exact": guided(network, "shared_parameters", variance_window=0),
            "umda_fast, exact, with its metrics": guided(network, "shared_parameters"),
            every: repeated(guided(network, "shared_parameters", every=EVERY, direction="gradient"), EVERY),
            "umda_fast, last_shared_layer": guided(network, "last_shared_layer", variance_window=0),
            "umda_fast, representation": guided(network, "representation", variance_window=0),
            "umda_fast, representation, with metrics": guided(network, "representation"),
            "loop of autograd.grad, eager": loop(network),
            **torchjd_contenders(network),
        }
        seconds = medians(contenders, options.repeats)
        seconds[every] = per_call(seconds[every], EVERY)
        size = sum(p.numel() for p in network.shared())
        ours = seconds["umda_fast, exact"]
        notes = {
            name: f"{value / ours:5.2f} of exact (least {value.least / ours.least:5.2f})"
            for name, value in seconds.items()
            if name.startswith(("loop", "torchjd"))
        }
        report(f"T = {tasks}, P = {size:,}, batch {batch}", seconds, notes)


def statistics(options: argparse.Namespace) -> None:
    tasks, columns = 8, int(1_840_000 * options.size)
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(tasks, columns, generator=generator)
    weights, out = torch.rand(tasks, generator=generator), torch.empty(columns)
    correction = torch.full((tasks,), 1 / (1 - BETA**3))

    def fused(grads: Tensor, ema: Tensor, out: Tensor) -> Tensor:
        gram = task_gradient_statistics(grads, ema, beta=BETA, step=3)
        combine_task_gradients(ema, weights.to(ema.dtype) * correction.to(ema.dtype), out)
        return gram

    def corrected(grads: Tensor, ema: Tensor, out: Tensor) -> Tensor:
        ema.mul_(BETA).add_(grads, alpha=1 - BETA)
        mean = ema * correction[:, None].to(ema.dtype)
        torch.mv(mean.T, weights.to(ema.dtype), out=out)
        return mean @ mean.T

    def lean(grads: Tensor, ema: Tensor, out: Tensor) -> Tensor:
        """The fewest passes that eager operations need: the corrections go into [T, T] and [T]."""
        ema.lerp_(grads, 1 - BETA)
        c = correction.to(ema.dtype)
        torch.mv(ema.T, weights.to(ema.dtype) * c, out=out)
        return (ema @ ema.T) * c[:, None] * c[None, :]

    def results(function: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
        ema, found = torch.zeros(tasks, 10_000, dtype=dtype), torch.empty(10_000, dtype=dtype)
        return [function(grads[:, :10_000].to(dtype).contiguous(), ema, found), ema, found]

    exact = results(corrected, torch.float64)
    require_parity("statistics", results(fused, torch.float32), exact, results(lean, torch.float32))
    functions = {"umda_fast": fused, "eager, fewest passes": lean, "eager, corrected means": corrected}
    contenders = {}
    for name, function in functions.items():
        ema = torch.zeros(tasks, columns)
        contenders[name] = lambda function=function, ema=ema: function(grads, ema, out)
    title = f"smoothing, Gram matrix and combination, T = {tasks}, P = {columns:,}"
    report(title, medians(contenders, options.repeats))


class Umda:
    """The whole model on N instances in 64 bags, and in bags of about twelve."""

    def __init__(self, instances: int, bags: int) -> None:
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        views = (ViewSpec("a", 64), ViewSpec("b", 96))
        self.tasks = tuple(TaskSpec(f"task {t}", "binary") for t in range(8))
        self.model = UMDA(UMDAConfig(views=views, tasks=self.tasks))
        cuts = torch.randint(0, instances + 1, (bags - 1,), generator=generator).sort().values
        self.ptr = torch.cat([torch.zeros(1, dtype=torch.int64), cuts, torch.tensor([instances])])
        self.views = {v.name: torch.randn(instances, v.width, generator=generator) for v in views}
        self.labels = {t.name: torch.randint(2, (bags,), generator=generator).float() for t in self.tasks}
        self.sgl = SelfGuided(
            self.model.shared_parameters(),
            [task.name for task in self.tasks],
            task_parameters=self.model.task_parameters(),
            scope="representation",
            variance_window=0,
        )

    def forward(self) -> tuple[UMDAOutput, dict[str, Tensor], Tensor]:
        for parameter in self.model.parameters():
            parameter.grad = None
        out = self.model(self.views, self.ptr)
        penalty = penalty_loss(out.penalties, dict.fromkeys(out.penalties, 0.01))
        return out, task_losses(self.tasks, out.logits, self.labels), penalty

    def plain(self) -> None:
        _, losses, penalty = self.forward()
        (torch.stack(list(losses.values())).sum() + penalty).backward()

    def fused(self) -> None:
        out, losses, penalty = self.forward()
        self.sgl.backward(losses, penalty=penalty, representation=out.instances)

    def passes(self) -> None:
        out, losses, penalty = self.forward()
        self.sgl.backward(losses, penalty=penalty, representation=out.representation)

    def check(self) -> None:
        """The fused Gram matrix against that of the backward passes, in float64 and in float32."""
        rows = []
        for model in (copy.deepcopy(self.model).double(), self.model):
            dtype = next(model.parameters()).dtype
            out = model.eval()({name: x.to(dtype) for name, x in self.views.items()}, self.ptr)
            labels = {name: x.to(dtype) for name, x in self.labels.items()}
            losses = list(task_losses(self.tasks, out.logits, labels).values())
            found = [torch.autograd.grad(loss, out.representation, retain_graph=True)[0] for loss in losses]
            rows.append(torch.stack([g.flatten() for g in found]))
        ours = out.instances.gradient_gram(losses)
        self.model.train()
        require_parity("representation", [ours], [rows[0] @ rows[0].T], [rows[1] @ rows[1].T])


UMDA_STEPS = ("plain", "fused", "passes")


def umda(options: argparse.Namespace) -> None:
    instances = int(20_000 * options.size)
    Umda(max(8, instances // 20), 8).check()
    for bags in (64, instances // 12):
        workload = Umda(instances, bags)
        contenders = {name: getattr(workload, name) for name in UMDA_STEPS}
        seconds = medians(contenders, options.repeats)
        notes = {}
        if options.peaks:
            grown = {name: peak_growth("bench.bench_sgl", f"{name} {bags}", options) for name in UMDA_STEPS}
            notes = {name: f"{value / 1e6:7.0f} MB at most" for name, value in grown.items()}
        named = {
            "plain summed step": seconds["plain"],
            "representation, one pass": seconds["fused"],
            "representation, a backward pass per task": seconds["passes"],
        }
        notes = {title: notes.get(name, "") for title, name in zip(named, UMDA_STEPS, strict=True)}
        report(f"UMDA, {instances:,} instances in {bags:,} bags, T = 8", named, notes)


PARTS = {"mlp": mlp, "statistics": statistics, "umda": umda}


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--part", choices=[*PARTS, "all"], default="all")
    arguments.add_argument("--tasks", type=int, nargs="+", default=list(TASKS), help="numbers of tasks of the MLP")
    arguments.add_argument("--peaks", action="store_true", help="measure peak memory of the UMDA steps, too")
    arguments.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.peak_of is not None:
        name, bags = options.peak_of.split()
        print_peak_growth(getattr(Umda(int(20_000 * options.size), int(bags)), name))
        return
    start(options)
    for name, part in PARTS.items():
        if options.part in (name, "all"):
            part(options)


if __name__ == "__main__":
    main()
