"""What CUDA graphs, ``torch.compile``, ``torch.export`` and autocast ask of every public operation, without a GPU.

A CUDA graph cannot be captured while somebody reads a tensor back to the host, nor where a shape depends on values.
Fake tensors have no values: what runs on them reads none.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.export import Dim

from tests.ops.checks import DTYPES
from tests.served import Predict, bags
from umda_fast import ops
from umda_fast.model import UMDA, TaskSpec, UMDAConfig, ViewSpec
from umda_fast.ops import _library
from umda_fast.ops._dispatch import reasons_against
from umda_fast.parity.case import Case, Inputs, Outputs
from umda_fast.parity.cases import all_cases

pytestmark = pytest.mark.skipif(_library.cpp_status is not None, reason=str(_library.cpp_status))

CASES: dict[str, Case] = {}
for _case in all_cases():
    CASES.setdefault(_case.op, _case)
NATIVE = sorted(op for op in CASES if not reasons_against(op, "cpp", "cpu", torch.float32))
#: Linear layers: under autocast they do as `F.linear` does.
CAST = {"norm_linear", "linear_residual"}


Run = Callable[[Inputs, str | None], Outputs]


def run_of(case: Case) -> Run:
    """The operation; that of knn alone, for its case looks at the neighbours on the host."""
    if case.op != "knn":
        return case.run  # type: ignore[return-value]  # None goes through to the operation

    def knn(x: Inputs, backend: str | None) -> Outputs:
        graph = ops.knn_graph(x["x"], x["ptr"], 4, backend=backend)
        assert graph.similarity is not None
        return {"neighbors": graph.neighbors, "similarity": graph.similarity}

    return knn


def forward_backward(case: Case, x: Inputs, backend: str | None) -> Outputs:
    """Outputs, and the gradients of their sum; the names of gradients begin with ``d_``."""
    leaves = {name: x[name].detach().requires_grad_() for name in case.gradients}
    outputs = run_of(case)({**x, **leaves}, backend)
    used = [y for y in outputs.values() if y.requires_grad]
    results = {name: y.detach() for name, y in outputs.items()}
    if used:
        found = torch.autograd.grad(used, list(leaves.values()), [torch.ones_like(y) for y in used])
        results |= {f"d_{name}": gradient for name, gradient in zip(leaves, found, strict=True)}
    return results


def test_every_public_function_is_here() -> None:
    functions = {name for name in ops.__all__ if name[0].islower()}
    backends = {"backend_status", "backends_used", "get_backend", "prefer_backend", "set_backend", "use_backend"}
    helpers = {*backends, "check_batch", "dropout_seed", "share_checks"}
    called = set()
    for case in CASES.values():
        names = {*run_of(case).__code__.co_names}
        called |= names & functions
    assert functions - called - helpers == set()


@pytest.mark.parametrize("op", sorted(CASES))
def test_nothing_is_read_back(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward on tensors without values, on every native backend; the shapes are those of real ones."""
    case = CASES[op]
    monkeypatch.setattr(_library, "TRITON_INTERPRETED", True)  # fake tensors of the CPU may go to Triton
    backends = [*(["triton"] if _library.has_triton(op) else []), *(["cpp"] if op in NATIVE else [])]
    for dtype in DTYPES if case.storage else [torch.float32]:
        real = case.rounded(dtype, "cpu")
        expected = forward_backward(case, real, "reference" if op not in NATIVE else "cpp")
        for backend in backends:
            with FakeTensorMode() as mode:
                fake = {name: mode.from_tensor(x) for name, x in real.items()}
                found = forward_backward(case, fake, backend)
            assert ops.backends_used()[op] == backend
            for name, value in expected.items():
                assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype), (backend, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("op", sorted(CASES))
def test_tensors_without_values(op: str, dtype: torch.dtype) -> None:
    """On meta, and fake, with no backend named: shapes and dtypes of every result and gradient."""
    case = CASES[op]
    if dtype not in (torch.float32, torch.float64) and not case.storage:
        return
    real = case.rounded(dtype, "cpu")
    expected = forward_backward(case, real, None)
    with FakeTensorMode() as mode:
        fake = forward_backward(case, {name: mode.from_tensor(x) for name, x in real.items()}, None)
    meta = forward_backward(case, {name: x.to("meta") for name, x in real.items()}, None)
    assert fake.keys() == meta.keys() == expected.keys()
    for name, value in expected.items():
        assert meta[name].is_meta
        for found in (fake, meta):
            assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype), name


def test_what_meta_tensors_cannot_do() -> None:
    graph = ops.NeighborGraph(torch.zeros(4, 2, dtype=torch.int32, device="meta"))
    for call in (graph.to_edge_index, graph.symmetrize, lambda: graph.union(graph), graph.reorder):
        with pytest.raises(ValueError, match=r"neighbors must have values, .*; got meta tensors"):
            call()  # type: ignore[operator]


def test_fake_tensors_see_what_reads() -> None:
    with FakeTensorMode() as mode, pytest.raises(DataDependentOutputException):
        int(mode.from_tensor(torch.ones(3)).sum())


@pytest.mark.parametrize("op", NATIVE)
def test_compiles_forward_and_backward_in_one_graph(op: str) -> None:
    case = CASES[op]
    x = case.rounded(torch.float32, "cpu")
    run = run_of(case)
    wanted = forward_backward(case, x, "cpp")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: run(x, "cpp"), fullgraph=True, backend="aot_eager")
    leaves = {name: x[name].detach().requires_grad_() for name in case.gradients}
    outputs = compiled({**x, **leaves})
    found = {name: y.detach() for name, y in outputs.items()}
    used = [y for y in outputs.values() if y.requires_grad]
    if used:
        gradients = torch.autograd.grad(used, list(leaves.values()), [torch.ones_like(y) for y in used])
        found |= {f"d_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, equal_nan=True)


@pytest.mark.parametrize("op", NATIVE)
def test_exports(op: str) -> None:
    """The exported program holds the operation itself, and computes the same bits."""
    case = CASES[op]
    run = run_of(case)

    class Call(torch.nn.Module):
        def forward(self, x: Inputs) -> Outputs:
            return run(x, "cpp")

    x = case.rounded(torch.float32, "cpu")
    program = torch.export.export(Call(), (x,))
    targets = [str(node.target) for part in program.graph_module.modules() for node in part.graph.nodes]
    assert any(target.startswith(f"umda_fast.{op}.") for target in targets), targets
    found = program.module()(x)
    for name, value in run(x, "cpp").items():
        assert torch.equal(found[name].nan_to_num(0.5), value.nan_to_num(0.5)), name


def test_the_model_exports() -> None:
    """In evaluation mode, for any number of instances and of two bags or more."""
    tasks = (TaskSpec("grade", "multiclass", 3), TaskSpec("response", "binary"))
    views = (ViewSpec("a", 6), ViewSpec("b", 4))
    # Gains as of a trained model: nothing would be seen of what a gain of 0 scales.
    config = UMDAConfig(views, tasks, width=16, heads=2, layers=1, layer_scale=0.5, graph_layers=1, graph_k=3)
    model = UMDA(config).eval()
    n, offsets = Dim("n", min=2), Dim("offsets", min=3)
    sizes = ({"a": {0: n}, "b": {0: n}}, {0: offsets}, {0: n})
    with torch.no_grad():
        program = torch.export.export(Predict(model), bags(5, 9, 7), dynamic_shapes=sizes)
        for batch in (bags(5, 9, 7), bags(3, 1, 30, 8, 2), bags(1, 40)):
            (logits, attention), (wanted, wanted_attention) = program.module()(*batch), Predict(model)(*batch)
            torch.testing.assert_close(attention, wanted_attention)
            for name, value in wanted.items():
                torch.testing.assert_close(logits[name], value)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("op", sorted(set(CASES) - CAST))
def test_autocast_changes_nothing(op: str, backend: str) -> None:
    """Dtypes and bits are those that the inputs ask for, mixed ones included; nobody is cast in silence."""
    if backend == "cpp" and op not in NATIVE:
        backend = "reference"
    case = CASES[op]
    run = run_of(case)
    for dtype in (torch.float32, torch.bfloat16):  # in bfloat16 weights, biases and masks stay as they are: mixed
        x = case.rounded(dtype, "cpu")
        results = []
        for enabled in (False, True):
            leaves = {name: x[name].detach().requires_grad_() for name in case.gradients}
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                outputs = run({**x, **leaves}, backend)
            used = [y for y in outputs.values() if y.requires_grad]
            # Backward outside, as PyTorch asks for.
            weights = [torch.ones_like(y) for y in used]
            gradients = torch.autograd.grad(used, list(leaves.values()), weights) if used else ()
            results.append([*outputs.values(), *gradients])
        for plain, cast in zip(*results, strict=True):
            assert plain.dtype == cast.dtype
            assert torch.equal(plain.nan_to_num(0.5), cast.nan_to_num(0.5))


def test_mixed_dtypes_that_an_operation_does_not_take() -> None:
    """Under autocast as outside: it says so, and casts nothing."""
    half, full = torch.randn(6, 2, 1, 8).bfloat16(), torch.randn(6, 2, 1, 8)
    tokens = (torch.tensor([0, 3, 6]), torch.tensor([0, 2]), torch.tensor([0, 1], dtype=torch.int32), 2)
    graph = ops.knn_graph(torch.randn(6, 4), torch.tensor([0, 6]), 2)
    weight = torch.rand(6, 2)
    x, x_half = full[:, 0, 0], half[:, 0, 0]
    ema = torch.zeros(2, 5)
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("k must have the dtype of q", lambda: ops.cross_view_attention(half, full, half, half[..., 0])),
        ("gate_logits must have the dtype", lambda: ops.cross_view_attention(half, half, half, full[..., 0])),
        ("v must have the dtype of q", lambda: ops.cross_view_token_attention(half[:, 0], half[:, 0], full[:, 0],
                                                                               half[:, 0, :, 0], *tokens)),
        ("k must have the dtype of q", lambda: ops.neighbor_attention(half[:, 0], full[:, 0], half[:, 0], graph)),
        ("log_weight must be float32", lambda: ops.neighbor_attention(*(half[:, 0],) * 3, graph, weight.bfloat16())),
        ("weight must be float32", lambda: ops.neighbor_sum(x_half, graph, weight.bfloat16())),
        ("weight must be float32", lambda: ops.smoothness_energy(x, graph, weight.bfloat16())),
        ("ema must be float32", lambda: ops.task_gradient_statistics(ema, ema.bfloat16(), beta=0.9, step=1)),
        ("weights must have the dtype of ema", lambda: ops.combine_task_gradients(ema, ema[:, 0].bfloat16())),
    ]  # fmt: skip
    for enabled in (False, True):
        for message, call in calls:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled), pytest.raises(TypeError, match=message):
                call()
