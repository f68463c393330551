"""A whole training step, model and self-guided learning, on one bag; ours beside what PyTorch alone does.

The step is that of the trainer: forward, losses and penalties, `SelfGuided.backward` in its exact scope, clipping,
AdamW. On a GPU it runs under autocast in bfloat16, for every contender.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from umda_fast.model import UMDA, TaskSpec, UMDAConfig, ViewSpec, gmip
from umda_fast.model.losses import penalty_loss, task_losses
from umda_fast.ops import NeighborGraph, use_backend
from umda_fast.sgl import SelfGuided

from .measure import Contender, Timer, tensor_bytes
from .workloads import OURS, chunked_topk, stored_masks, untiled

EXACT = "eager reference"
COMPOSED = "eager, chunked matmul + topk graph, no tiles"
COMPOSED_COMPILED = "torch.compile of it"
OURS_COMPILED = "umda_fast under torch.compile"

#: Instances of the bag: quick, on a CPU, on a GPU.
SIZES = {"quick": (32, 64), "cpu": (1_000, 10_000), "cuda": (1_000, 10_000, 100_000, 1_000_000)}
#: The size that is compiled for.
COMPILED_SIZES = {"quick": 64, "cpu": 1_000, "cuda": 100_000}
#: One bag that has to fit, ours alone, once.
LARGEST = 2_000_000
#: The exact reference searches neighbours in float64 and in small tiles: beyond this it only takes time.
EXACT_LIMIT = 10_000

TASKS = (TaskSpec("grade", "multiclass", 5), TaskSpec("response", "binary"), TaskSpec("age", "regression"))


@dataclass
class Trainee:
    """One contender's own model, optimiser and statistics."""

    model: nn.Module
    forward: Callable[..., Any]
    sgl: SelfGuided
    optimizer: torch.optim.Optimizer
    context: Callable[[], Any]  #: what its steps run in

    def step(self, batch: dict[str, Any]) -> None:
        """One update."""
        labels, mask, inputs, device = batch["labels"], batch["label_mask"], batch["inputs"], batch["device"]
        with self.context():
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                out = self.forward(**inputs)
                losses = task_losses(TASKS, out.logits, labels, mask)
                penalty = penalty_loss(out.penalties, dict.fromkeys(out.penalties, 0.01))
            self.optimizer.zero_grad(set_to_none=True)
            self.sgl.backward(losses, penalty=penalty)
            nn.utils.clip_grads_with_norm_(
                self.model.parameters(),
                1.0,
                nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]),
            )
            self.optimizer.step()


def input_width(quick: bool) -> int:
    """Columns of each view."""
    return 8 if quick else 512


def contenders_at(n: int) -> list[str]:
    """Who steps on a bag of ``n`` without being compiled, ours first."""
    return [OURS, EXACT, COMPOSED] if n <= EXACT_LIMIT else [OURS, COMPOSED]


def make_batch(n: int, device: torch.device, width: int) -> dict[str, Any]:
    """One bag of n instances in three views, and a label for every task."""
    generator = torch.Generator(device).manual_seed(0)

    def features() -> Tensor:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return torch.randn(n, width, generator=generator, device=device).to(dtype)

    return {
        "device": device,
        "inputs": {"views": {name: features() for name in "abc"}, "ptr": torch.tensor([0, n], device=device)},
        "labels": {
            "grade": torch.tensor([2], device=device),
            "response": torch.tensor([1.0], device=device),
            "age": torch.tensor([0.5], device=device),
        },
        "label_mask": {task.name: torch.ones(1, dtype=torch.bool, device=device) for task in TASKS},
    }


def make_model(device: torch.device, width: int, quick: bool) -> UMDA:
    """The default configuration; a small one where only the script itself is tested."""
    torch.manual_seed(0)
    small: dict[str, Any] = {"width": 16, "heads": 2, "layers": 1, "graph_layers": 1, "graph_k": 4} if quick else {}
    views = tuple(ViewSpec(name, width) for name in "abc")
    return UMDA(UMDAConfig(views=views, tasks=TASKS, **small)).to(device)


def chunked_graph(x: Tensor, ptr: Tensor, k: int, **options: Any) -> NeighborGraph:
    """`knn_graph` by matrix products and topk."""
    return NeighborGraph(*chunked_topk(x, ptr, k, **options), trusted=True)


@contextmanager
def exact() -> Iterator[None]:
    """Every operation on the reference; dropout is PyTorch's."""
    with use_backend("reference"), stored_masks():
        yield


@contextmanager
def composed() -> Iterator[None]:
    """Every operation on the reference, the graph by `chunked_graph`; faster, in more memory, than with tiles."""
    with exact(), untiled(), mock.patch.object(gmip, "knn_graph", _untraced_graph):
        yield


_untraced_graph = torch.compiler.disable(chunked_graph)


def trainees(model: UMDA, mode: str | None) -> dict[str, Callable[[], Trainee]]:
    """Makers of the contenders; ``mode``: backend of torch.compile, None for its default."""

    def make(compiled: bool, context: Callable[[], Any]) -> Trainee:
        own = copy.deepcopy(model).train()
        options: dict[str, Any] = {} if mode is None else {"backend": mode}
        shared = own.shared_parameters()
        return Trainee(
            own,
            torch.compile(own, dynamic=False, **options) if compiled else own,
            SelfGuided(shared, [task.name for task in TASKS], task_parameters=own.task_parameters()),
            torch.optim.AdamW(own.parameters(), lr=1e-4),
            context,
        )

    return {
        OURS: lambda: make(False, ExitStack),
        OURS_COMPILED: lambda: make(True, ExitStack),
        EXACT: lambda: make(False, exact),
        COMPOSED: lambda: make(False, composed),
        COMPOSED_COMPILED: lambda: make(True, composed),
    }


def allow_several_backwards() -> None:
    """Compiled code may otherwise reuse what is saved for backward, which one pass per task reads again."""
    import torch._functorch.config as config

    config.donated_buffer = False


def contender(name: str, make: Callable[[], Trainee], batch: dict[str, Any]) -> Contender:
    """Its trainee is made when it takes its first turn, and kept."""
    kept: list[Trainee] = []

    def prepare() -> Trainee:
        if not kept:
            kept.append(make())
        return kept[0]

    return Contender(name, lambda trainee: trainee.step(batch), prepare)


def resident(model: UMDA, batch: dict[str, Any]) -> int:
    """Bytes of the inputs, the parameters, AdamW's averages, and the task gradients with theirs."""
    parameters = tensor_bytes(list(model.parameters()))
    shared = tensor_bytes(model.shared_parameters())
    return tensor_bytes(batch) + 3 * parameters + 2 * len(TASKS) * shared


def finite_step(model: UMDA, batch: dict[str, Any], timer: Timer) -> dict[str, Any]:
    """One step of ours: seconds, peak bytes, and whether every parameter is finite after it."""
    trainee = trainees(model, None)[OURS]()
    before = timer.memory()
    timer.reset_peak()
    seconds = timer(lambda _: trainee.step(batch), None)
    peak = timer.peak()
    finite = all(bool(p.isfinite().all()) for p in trainee.model.parameters())
    grown = None if peak is None or before is None else peak - before
    return {"seconds": seconds, "peak_bytes": grown, "finite": finite and math.isfinite(seconds)}
