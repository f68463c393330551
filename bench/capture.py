"""Every operation, forward and backward, recorded into a CUDA graph and replayed; on a stream of its own; watched for
waits.

On a CPU the same code runs with nothing to record: a replay is then a second call.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from umda_fast import ops
from umda_fast.ops._dispatch import reasons_against
from umda_fast.parity.case import Case, Inputs, Outputs
from umda_fast.parity.cases import all_cases

from .measure import explain

Results = dict[str, Tensor]


class Recorder:
    """What a device can do with a call that reads and writes the same tensors every time."""

    def record(self, run: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
        """A function that repeats the call, and the tensors its results appear in."""
        results = run()

        def replay() -> None:
            for name, value in run().items():
                results[name].copy_(value)

        return replay, results

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, work goes to a stream that is not the default one."""
        yield

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Inside, waiting for the device raises."""
        yield


class CudaRecorder(Recorder):
    """CUDA graphs, streams, and PyTorch's watch on synchronisations."""

    def record(self, run: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
        with self.aside():
            for _ in range(2):
                run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run()
        return graph.replay, results

    @contextmanager
    def aside(self) -> Iterator[None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def repeatable(case: Case, inputs: Inputs, backend: str) -> Callable[[], Results]:
    """The case as a call without anything from the host: outputs, and gradients for fixed cotangents."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in case.gradients}
    arguments = {**inputs, **leaves}
    run = _knn(case) if case.op == "knn" else case.run
    used = {name: y for name, y in run(arguments, backend).items() if y.requires_grad}
    cotangents = [torch.ones_like(y) for y in used.values()]

    def call() -> Results:
        outputs: Outputs = run(arguments, backend)
        results = {name: y.detach() for name, y in outputs.items()}
        if used:
            wanted = [outputs[name] for name in used]
            found = torch.autograd.grad(
                wanted, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True
            )
            results |= {f"d_{name}": gradient for name, gradient in zip(leaves, found, strict=True)}
        return results

    return call


def _knn(case: Case) -> Callable[[Inputs, str], Outputs]:
    """The operation alone: the case itself looks at the neighbours on the host."""
    metric = case.shape.rsplit(", ", 1)[1]

    def run(x: Inputs, backend: str) -> Outputs:
        graph = ops.knn_graph(x["x"], x["ptr"], 4, metric=metric, backend=backend)
        assert graph.similarity is not None
        return {"neighbors": graph.neighbors, "similarity": graph.similarity}

    return run


def same_bits(a: Results, b: Results) -> list[str]:
    """Names of the results that differ in a bit."""
    return [name for name in a if not torch.equal(_bits(a[name]), _bits(b[name]))]


def _bits(x: Tensor) -> Tensor:
    return x.reshape(-1).contiguous().view(torch.uint8)


def check(case: Case, backend: str, device: torch.device, recorder: Recorder) -> dict[str, Any]:
    """One row: what of the case can be captured, replayed, run aside and without waiting.

    ``verdict`` is ``pass`` or what went wrong first.
    """
    row = {"op": case.op, "backend": backend, "shape": case.shape, "verdict": "pass"}
    inputs = case.rounded(torch.float32, str(device))
    stage = "the first call"
    try:
        run = repeatable(case, inputs, backend)
        expected = _copied(run())
        stage = "a second call"
        wrong = same_bits(expected, run())
        if not wrong:
            stage = "a stream of its own"
            with recorder.aside():
                found = run()
            wrong = same_bits(expected, found)
        if not wrong:
            stage = "waiting"
            with recorder.no_waiting():
                run()
            stage = "capture"
            replay, results = recorder.record(run)
            for value in results.values():
                value.zero_()
            stage = "replay"
            replay()
            wrong = same_bits(expected, results)
        if not wrong:
            stage = "replay of other values"
            for name in case.storage:
                inputs[name].mul_(-0.5)
            replay()
            replayed = _copied(results)
            wrong = same_bits(_copied(run()), replayed)
        if wrong:
            row["verdict"] = f"{stage}: {', '.join(wrong)} differ"
    except Exception as error:
        row["verdict"] = f"{stage}: {': '.join(explain(error))}"
    return row


def _copied(results: Results) -> Results:
    return {name: value.clone() for name, value in results.items()}


def check_all(device: torch.device, backends: tuple[str, ...], only: set[str]) -> list[dict[str, Any]]:
    """`check` of the first shape of every operation on every native backend that serves it."""
    recorder = CudaRecorder() if device.type == "cuda" else Recorder()
    first: dict[str, Case] = {}
    for case in all_cases():
        first.setdefault(case.op, case)
    return [
        check(case, backend, device, recorder)
        for op, case in first.items()
        if op in only
        for backend in backends
        if not reasons_against(op, backend, device.type, torch.float32)
    ]
