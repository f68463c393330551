"""What one training step calls and moves, operation by operation: ours beside plain PyTorch, exact on any machine.

    python -m bench.step_ledger [--instances N] [--precision 32-true|bf16-mixed] [--operations N]

The step is the trainer's (`umda_fast.train.TrainStep`), in the configuration that stands in full below, on one bag with
a label for every task. Counted are the operations that PyTorch dispatches, by block of the step, with the bytes of what
they read and write (`umda_fast.profiling.traffic`) and their floating-point operations; on a GPU as many are launched,
so no GPU is needed to count them. Beside it the same step as a user would compose it: every operation in plain PyTorch,
dropout PyTorch's own, neighbours by chunks of a matrix product and `topk`.

Seconds are **predicted**, never measured: of every operation the longer of its bytes at the rate at which a machine
copies and its floating-point operations at that of its matrix products, added up; or, where that is longer, all calls
at what it costs to launch one. Caches are left out and every kernel is taken to be perfect.

Floating-point operations are two for every multiply-add of a matrix product, and of our operations as in `_PRODUCTS`;
of all others one for every element that they read or write, whichever are more.
"""

import argparse
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from umda_fast.blocks import BlockRecord, Place, block, recording
from umda_fast.data import BagBatch
from umda_fast.extras import TRAINING, require
from umda_fast.model import UMDA, UMDAConfig, ViewSpec
from umda_fast.profiling.traffic import Traffic

from .training_step import TASKS, composed
from .workloads import OURS

EAGER = "eager, PyTorch's own dropout"
#: The block of what is in no other.
REST = "rest"
#: Precisions of a run that are counted.
PRECISIONS = ("32-true", "bf16-mixed")
#: Instances of the bag: quick, else.
SIZES = {"quick": 64, "cpu": 2_000, "cuda": 2_000}
#: Views and their features.
VIEWS = (ViewSpec("a", 1024), ViewSpec("b", 768))

#: The default `UMDAConfig` in full, so that a change of a default shows here.
MODEL: dict[str, Any] = {
    "width": 128,
    "heads": 4,
    "layers": 2,
    "ffn": 2,
    "layer_scale": 0.0,
    "dropout": 0.25,
    "encoder_hidden": None,
    "input_dropout": 0.0,
    "scale_wide": True,
    "whole_inputs": True,
    "bins": 0,
    "linear_path": False,
    "graph_k": 8,
    "graph_width": 64,
    "graph_tau": 0.5,
    "graph_layers": 2,
    "message": "attention",
    "message_norm": "pre",
    "message_ffn": 0,
    "symmetrize": False,
    "coords_k": 0,
    "bag_statistics": True,
    "view_heads": False,
    "pool_hidden": None,
    "private_rank": None,
    "task_embedding": 16,
    "kappa": 1.0,
    "kappa_g": 0.0,
    "hierarchy": None,
    "branching": "dual",
    "experts": 4,
    "private_experts": 1,
    "delta": 1.0,
    "gamma": 0.5,
    "chunk": 0,
    "hcva": "auto",
    "graph": True,
    "private": True,
}
#: What else of a run's configuration decides what a step does, as it is by default.
RUN: dict[str, Any] = {
    "sgl": {
        "balancer": "sgl",
        "scope": "representation",
        "every": 1,
        "beta": 0.9,
        "direction": "gradient",
        "weight_beta": None,
        "statistics": None,
        "variance_window": 100,
        "control": False,
    },
    "penalties": {
        "entropy": 0.01,
        "consistency": 0.01,
        "dispersion": 0.01,
        "smoothness": 0.01,
        "diversity": 0.01,
        "divergence": 0.01,
        "cohesion": 0.01,
        "linear": 0.001,
    },
    "train": {"weight_decay": 0.05, "clip": 1.0, "view_loss": 1.0, "ema": "auto"},
}

Record = dict[str, Any]


@dataclass(frozen=True)
class Hardware:
    """What a prediction is for.

    Attributes:
        name: as it is shown.
        copy: bytes per second, read and written together.
        products: FLOP per second of matrix products, by precision of `PRECISIONS`.
        launch: seconds of the host for one call; 0 where nobody knows.
    """

    name: str
    copy: float
    products: Mapping[str, float]
    launch: float


#: Seconds that PyTorch's host code takes to dispatch and launch one operation: the order of magnitude, no measurement.
LAUNCH = 5e-6
#: Rates of the data sheets (SXM, dense; float32 without TF32), which no program reaches.
GPUS = (
    Hardware("H200", 4.8e12, {"32-true": 67e12, "bf16-mixed": 989e12}, LAUNCH),
    Hardware("A100 80 GB", 2.039e12, {"32-true": 19.5e12, "bf16-mixed": 312e12}, LAUNCH),
)


def this_machine(name: str, rates: Mapping[str, float]) -> Hardware:
    """By the rates that a suite measured (`bench.machine.measure_rates`); what a call costs is left out."""
    return Hardware(name, rates["copy"], {"32-true": rates["float32"], "bf16-mixed": rates["bfloat16"]}, 0.0)


@dataclass
class Figures:
    """Of some operations together."""

    calls: int = 0
    bytes: int = 0
    flops: int = 0


class StepTraffic(Traffic):
    """`Traffic` that also counts floating-point operations, in `flops` by the same keys as `counts`."""

    def __init__(self, record: BlockRecord) -> None:
        super().__init__(record)
        self.flops: dict[tuple[Place, str], int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        place = self.record.here()
        if place is not None and isinstance(func, torch._ops.OpOverload):
            key = place, func._schema.name
            if key in self.counts:
                self.flops[key] = self.flops.get(key, 0) + flops_of(func, args, kwargs or {}, result)
        return result


def flops_of(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int:
    """Floating-point operations of a call, see the head of this file; none of a view."""
    packet = func._overloadpacket
    if packet in flop_registry:
        count: int = flop_registry[packet](*args, **kwargs, out_val=result)
        return count
    name = func._schema.name
    if name in _PRODUCTS:
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        return _PRODUCTS[name]({**given, **kwargs})
    if func.is_view:
        return 0
    return max(_elements((args, kwargs)), _elements(result))


def _elements(tree: Any) -> int:
    """Of the largest tensor, as it is asked for: what is expanded is computed with as often."""
    return max((leaf.numel() for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)), default=0)


def _edges(given: Mapping[str, Any]) -> int:
    return int(given["neighbors"].numel())


def _pairs(ptr: Tensor) -> int:
    return int(ptr.diff().square().sum())


def _gram(given: Mapping[str, Any]) -> int:
    """docs/performance.md, `representation_gram`."""
    losses, tasks = len(given["d_pooled"]), given["attention"].shape[1]
    n, width = given["z"].shape
    products = losses * 2 * given["value"].shape[1] * width + 2 * losses * tasks * width + losses**2 * width // 2
    return int(2 * n * products)


#: FLOP of our operations that multiply more than they move, by their arguments: two for a multiply-add.
_PRODUCTS: dict[str, Callable[[Mapping[str, Any]], int]] = {
    # Scores and sums; backward the scores again and the gradients of scores, q, k and v.
    "umda_fast::cross_view": lambda x: 4 * x["q"].numel() * x["q"].shape[1],
    "umda_fast::cross_view_backward": lambda x: 10 * x["q"].numel() * x["q"].shape[1],
    # A bag with itself is symmetric.
    "umda_fast::knn": lambda x: _pairs(x["ptr"]) * x["x"].shape[1],
    "umda_fast::edge_cosine": lambda x: 2 * _edges(x) * x["r"].shape[1],
    "umda_fast::edge_cosine_backward": lambda x: 4 * _edges(x) * x["r"].shape[1],
    "umda_fast::neighbor_attention": lambda x: 4 * _edges(x) * x["q"][0].numel(),
    "umda_fast::neighbor_attention_backward": lambda x: 10 * _edges(x) * x["q"][0].numel(),
    "umda_fast::neighbor_sum": lambda x: 2 * _edges(x) * x["x"].shape[1],
    "umda_fast::neighbor_sum_backward": lambda x: 4 * _edges(x) * x["x"].shape[1],
    "umda_fast::smoothness_energy": lambda x: 3 * _edges(x) * x["z"].shape[1],
    "umda_fast::smoothness_energy_backward": lambda x: 5 * _edges(x) * x["z"].shape[1],
    "umda_fast::bag_pool": lambda x: 2 * x["z"].numel() * x["scores"].shape[1],
    "umda_fast::bag_pool_backward": lambda x: 4 * x["z"].numel() * x["scores"].shape[1],
    "umda_fast::representation_gram": _gram,
}


def make_batch(instances: int) -> BagBatch:
    """One bag of both views on the host, and a label for every task."""
    generator = torch.Generator().manual_seed(0)
    batch = BagBatch(
        views={view.name: torch.randn(instances, view.width, generator=generator) for view in VIEWS},
        mask=torch.ones(instances, len(VIEWS), dtype=torch.bool),
        ptr=torch.tensor([0, instances]),
        labels={"grade": torch.tensor([2]), "response": torch.tensor([1.0]), "age": torch.tensor([0.5])},
        label_mask={task.name: torch.ones(1, dtype=torch.bool) for task in TASKS},
        names=["bag"],
    )
    batch.complete = True
    return batch


def count_step(
    instances: int, precision: str, contender: str = OURS, device: str = "cpu"
) -> dict[tuple[Place, str], Figures]:
    """(block and pass, operation) -> what one step does, the second one: the first makes the optimiser's averages.

    Args:
        instances: of the bag.
        precision: of `PRECISIONS`.
        contender: `OURS` or `EAGER`.
        device: `cpu` or `cuda`.

    Raises:
        MissingExtraError: the extra `train` is not installed. ValueError: another precision or contender.
    """
    require("a ledger of the training step", *TRAINING)
    from umda_fast.runtime.config import make_config
    from umda_fast.runtime.fabric import make_fabric
    from umda_fast.train.step import TrainStep

    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if contender not in (OURS, EAGER):
        raise ValueError(f"contender: expected {OURS!r} or {EAGER!r}, got {contender!r}")
    config = make_config({**RUN, "model": MODEL, "precision": precision, "device": device})
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it says the precision of every Fabric
    fabric = make_fabric(config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UMDA(UMDAConfig(views=VIEWS, tasks=TASKS, **MODEL)).train()
        step = TrainStep(config, model, TASKS, fabric)
        batch = make_batch(instances)
        around: AbstractContextManager[Any] = nullcontext() if contender == OURS else composed()
        record = BlockRecord()
        traffic = StepTraffic(record)
        with around:
            step(batch, 0.5, 0)
            with recording(record):
                record.inside = traffic
                with block(REST):
                    step(batch, 0.5, 1)
    return {key: Figures(found.calls, found.bytes, traffic.flops[key]) for key, found in traffic.counts.items()}


def total(figures: Iterable[Figures]) -> Figures:
    """The sum of some figures."""
    sums = Figures()
    for one in figures:
        sums.calls += one.calls
        sums.bytes += one.bytes
        sums.flops += one.flops
    return sums


def summed(counts: Mapping[tuple[Place, str], Figures], name: Callable[[Place, str], str]) -> dict[str, Figures]:
    """Figures by a name, those of the most bytes first."""
    groups: dict[str, list[Figures]] = {}
    for (place, operation), figures in counts.items():
        groups.setdefault(name(place, operation), []).append(figures)
    sums = {group: total(members) for group, members in groups.items()}
    return dict(sorted(sums.items(), key=lambda item: -item[1].bytes))


def predicted(operations: Mapping[str, Figures], hardware: Hardware, precision: str) -> Record:
    """Predicted seconds of a step, see the head of this file: `bytes` and `products`, were that all; `launches`;
    `step`, the bound."""
    rate = hardware.products[precision]
    device = sum(max(one.bytes / hardware.copy, one.flops / rate) for one in operations.values())
    launches = sum(one.calls for one in operations.values()) * hardware.launch
    return {
        "hardware": hardware.name,
        "bytes": sum(one.bytes for one in operations.values()) / hardware.copy,
        "products": sum(one.flops for one in operations.values()) / rate,
        "launches": launches,
        "step": max(device, launches),
    }


def ledger(
    instances: int, precision: str, contender: str, device: str = "cpu", hardware: Sequence[Hardware] = GPUS
) -> Record:
    """What the schema `bench` has of one step: totals, by block and by operation, predicted seconds for `hardware`."""
    counts = count_step(instances, precision, contender, device)
    operations = summed(counts, lambda place, operation: operation)
    blocks = summed(counts, lambda place, operation: place.block + (", backward" if place.backward else ""))
    return {
        "contender": contender,
        "precision": precision,
        "instances": instances,
        "device": device,
        "total": asdict(total(counts.values())),
        "blocks": [{"block": name, **asdict(figures)} for name, figures in blocks.items()],
        "operations": [{"operation": name, **asdict(figures)} for name, figures in operations.items()],
        "predicted": [predicted(operations, one, precision) for one in hardware],
        "hardware": [asdict(one) for one in hardware],
    }


def lines(ledgers: Sequence[Record], operations: int = 0) -> list[str]:
    """Ledgers for a terminal: totals, blocks and the largest `operations` of each, predicted seconds."""
    found = []
    for one in ledgers:
        n, sums = one["instances"], one["total"]
        found.append(
            f"a step on {n:,} instances, {one['precision']}, {one['contender']}: {sums['calls']:,} calls, "
            f"{sums['bytes'] / n / 1e3:.1f} KB and {sums['flops'] / n / 1e6:.2f} MFLOP an instance"
        )
        parts = [("block", row) for row in one["blocks"] if operations]
        parts += [("operation", row) for row in one["operations"][:operations]]
        found += [
            f"    {row[kind]:<42} {row['calls']:6,} calls {row['bytes'] / n / 1e3:9.2f} KB "
            f"{row['flops'] / n / 1e6:9.3f} MFLOP"
            for kind, row in parts
        ]
        found += [
            f"    predicted on {row['hardware']}: {row['step'] * 1e3:.3g} ms (bytes alone {row['bytes'] * 1e3:.3g}, "
            f"products alone {row['products'] * 1e3:.3g}, launches {row['launches'] * 1e3:.3g})"
            for row in one["predicted"]
        ]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(prog="python -m bench.step_ledger", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--instances", type=int, default=SIZES["cpu"], help="of the bag (default: %(default)s)")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: both")
    parser.add_argument("--operations", type=int, default=25, help="of each to show, with all blocks; 0: totals only")
    options = parser.parse_args(arguments)
    if options.instances < 2:
        parser.error(f"--instances: expected at least 2, got {options.instances}")
    for precision in (options.precision,) if options.precision else PRECISIONS:
        for contender in (OURS, EAGER):
            print("\n".join(lines([ledger(options.instances, precision, contender)], options.operations)), flush=True)


if __name__ == "__main__":
    main()
