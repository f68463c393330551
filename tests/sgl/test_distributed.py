"""One, two and four processes make the same of a batch, whatever share of it each of them has."""

import itertools
import math
import os
import signal
import time
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from tests.processes import run_together
from umda_fast.errors import ProcessLostError
from umda_fast.parity.rule import GRADIENT_FACTOR, allowed_error
from umda_fast.sgl import SelfGuided
from umda_fast.sgl.buffers import FlatLayout
from umda_fast.sgl.distributed import GradientReducer, Processes, ShardedRows
from umda_fast.sgl.scopes.averaged import AveragedScope

TASKS = ["a", "b", "c"]
ROWS = 12
# Rows of the batch that each process has, by number of processes; one has none.
SHARES = {1: [12], 2: [9, 3], 4: [4, 3, 0, 5]}
STEPS = 8
EPS = torch.finfo(torch.float32).eps


class Model(nn.Module):
    """A trunk with three heads; one parameter is never reached, one by the penalty alone, one by task b alone."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(5, 11), nn.Tanh(), nn.Linear(11, 7))
        self.unused = Parameter(torch.zeros(3))
        self.penalized = Parameter(torch.ones(2))
        self.only_b = Parameter(torch.ones(7))
        self.heads = nn.ModuleDict({name: nn.Linear(7, 2) for name in TASKS})
        self.to(dtype)

    def shared(self) -> list[Parameter]:
        return [*self.trunk.parameters(), self.unused, self.penalized, self.only_b]


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Inputs [12, 5] and which labels are there: `b` in the last rows only, at times none, once no task at all."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 5, generator=generator, dtype=torch.float64).to(dtype)
    row = torch.arange(ROWS)
    present = {"a": row % 3 != step % 3, "b": (row > 9) & (step % 3 != 1), "c": row < 10 - step}
    if step == 5:
        present = {name: torch.zeros(ROWS, dtype=torch.bool) for name in TASKS}
    return x, present


def share(size: int, rank: int) -> slice:
    ends = list(itertools.accumulate(SHARES[size], initial=0))
    return slice(ends[rank], ends[rank + 1])


def one_step(
    model: Model, sgl: SelfGuided, step: int, size: int, rank: int, dtype: torch.dtype
) -> dict[str, np.ndarray | None]:
    """A step of this process on its share; gradients and what the step tells, as arrays."""
    x, present = batch(step, dtype)
    rows = share(size, rank)
    mine = x[rows]
    losses, counts, penalty, hidden = {}, {}, None, None
    if len(mine):
        hidden = model.trunk(mine)
        for number, name in enumerate(TASKS):
            keep = present[name][rows]
            if keep.any():
                features = hidden * model.only_b if name == "b" else hidden
                target = torch.sin(mine[:, :2] * (number + 1)) * 3.0**number
                losses[name] = (model.heads[name](features) - target)[keep].square().mean()
                counts[name] = float(keep.sum())
        # A mean over instances, weighted by their share, and a part that is whole in one process only.
        penalty = 0.1 * hidden.square().mean() * (len(mine) / ROWS)
        if rank == 0:
            penalty = penalty + 0.3 * model.penalized.square().sum() + 0.2 * model.heads["a"].weight.square().sum()
    result = sgl.backward(
        losses, counts=counts, penalty=penalty, representation=hidden if sgl.scope == "representation" else None
    )
    found: dict[str, np.ndarray | None] = {
        f"grad/{name}": None if p.grad is None else p.grad.double().numpy().copy()
        for name, p in model.named_parameters()
    }
    for name in ("weights", "gram", "cosine", "norms", "active"):
        found[name] = getattr(result, name).double().numpy().copy()
    return found


def train(
    scope: str, dtype: torch.dtype, options: dict[str, Any], group: Any, start: Any = None, stop: int = STEPS
) -> tuple[list[dict[str, Any]], dict[str, float], Any]:
    """Steps up to `stop`, from the beginning or from a state; what each step gave, the figures, and the state."""
    size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    model = Model(dtype)
    sgl = SelfGuided(
        model.shared(),
        TASKS,
        task_parameters=model.heads.parameters(),
        scope=scope,  # type: ignore[arg-type]
        last_shared_layer=model.trunk[2].parameters() if scope == "last_shared_layer" else (),
        variance_window=3,
        process_group=group,
        **options,
    )
    first = 0
    if start is not None:
        first, weights, state = start
        model.load_state_dict(weights)
        sgl.load_state_dict(state)
    steps = []
    accumulated = options.get("every") == 2
    for step in range(first, stop):
        # Sometimes gradients of the call before are left standing, or zeroed in place.
        if not (accumulated and step % 4 == 3):
            model.zero_grad(set_to_none=step % 4 != 2)
        steps.append(one_step(model, sgl, step, size, rank, dtype))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad
    state = sgl.state_dict()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return steps, sgl.metrics(), (stop, weights, state)


CASES: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("shared_parameters", torch.float64, {"control": True}),
    ("shared_parameters", torch.float32, {}),
    ("shared_parameters", torch.float64, {"every": 2, "direction": "gradient"}),
    ("last_shared_layer", torch.float64, {}),
    ("representation", torch.float64, {"every": 2}),
    ("representation", torch.float32, {}),
    ("representation", torch.float64, {"balancer": "rlw"}),
    ("shared_parameters", torch.float64, {"balancer": "uncertainty"}),
]


def work(cases: list[Any], states: list[Any]) -> dict[str, Any]:
    """In each of four processes: every case by all four, by two of them, and continued from two to four."""
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    result: dict[str, Any] = {}
    for number, (scope, dtype, options) in enumerate(cases):
        result[f"4/{number}"] = train(scope, dtype, options, dist.group.WORLD)[:2]
        # The two pairs do the same work side by side.
        steps, figures, _ = train(scope, dtype, options, pairs[rank // 2])
        result[f"2/{number}"] = steps, figures
        *_, half = train(scope, dtype, options, pairs[rank // 2], stop=4)
        if rank == 0:
            result[f"half/{number}"] = half
        moved = train(scope, dtype, options, dist.group.WORLD, start=half)
        result[f"2 to 4/{number}"] = moved[:2]
        result[f"1 to 2/{number}"] = train(scope, dtype, options, pairs[rank // 2], start=states[number])[:2]
    result["parts"] = parts(rank)
    return result


def parts(rank: int) -> dict[str, Any]:
    """The pieces by themselves: rows over columns, buckets, and errors."""
    processes = Processes(dist.group.WORLD)
    found: dict[str, Any] = {}
    narrow = torch.zeros(4, dtype=torch.bfloat16)
    parameters = [Parameter(torch.zeros(3)), Parameter(torch.zeros(2, 2)), Parameter(narrow)]
    sharded = ShardedRows(FlatLayout(parameters), 3, processes)
    for row in range(3):
        sharded.put(row, [torch.full((3,), float(row + rank)), None, torch.full_like(narrow, 10.0 * rank)])
    sharded.wait()
    found["columns"] = sharded.columns
    found["rows"] = sharded.whole(sharded.rows).numpy()
    found["nothing kept"] = sharded.whole(sharded.rows, keep=False).shape
    found["own"] = torch.equal(sharded.own(sharded.whole(sharded.rows)), sharded.rows)
    # Three buckets: a dtype of its own, one that is full, one with what no process reaches in it.
    reducer = GradientReducer([parameters[:1], parameters[1:]], processes, bucket=4)
    sent: list[int] = []
    start = processes.start_sum
    processes.start_sum = lambda values: (sent.append(values.numel()), start(values))[1]  # type: ignore[method-assign]
    parameters[1].grad = torch.ones(2, 2)
    total = (parameters[1] * (rank + 1)).sum() if rank < 2 else None
    reducer.backward(total)
    found["sent"] = sent
    found["reached"] = [p.grad is not None for p in parameters]
    found["sum"] = parameters[1].grad.tolist()

    def fail(gradient: Tensor) -> None:
        raise KeyError("in the middle of a pass")

    handle = parameters[1].register_hook(fail)
    with pytest.raises(KeyError):
        reducer.backward(parameters[1].sum())
    handle.remove()
    found["restored"] = parameters[1].grad.tolist(), parameters[0].grad
    turned = torch.full((3, 2), float(rank + 5)).T
    found["from the first"] = processes.from_first(turned).tolist()
    sgl = SelfGuided(parameters[:1], ["a"], process_group=dist.group.WORLD, scope="representation")
    with pytest.raises(ValueError, match=r"task_parameters: the losses reach 1 parameters .*expected all of them$"):
        sgl.backward({"a": parameters[1].sum()}, representation=parameters[1])
    with pytest.raises(ValueError, match=r"counts\['a'\]: expected a positive number, got None"):
        sgl.backward({"a": parameters[0].sum()}, counts={}, representation=parameters[0])
    return found


@pytest.fixture(scope="module")
def alone() -> list[Any]:
    return [train(scope, dtype, options, None) for scope, dtype, options in CASES]


@pytest.fixture(scope="module")
def exact(alone: list[Any]) -> list[list[dict[str, Any]]]:
    """The steps of one process in float64."""
    return [
        alone[number][0] if dtype == torch.float64 else train(scope, torch.float64, options, None)[0]
        for number, (scope, dtype, options) in enumerate(CASES)
    ]


@pytest.fixture(scope="module")
def together() -> list[dict[str, Any]]:
    states = [train(scope, dtype, options, None, stop=4)[2] for scope, dtype, options in CASES]
    return run_together(work, 4, CASES, states)


def assert_same(found: dict[str, Any], alone: dict[str, Any], exact: dict[str, Any]) -> None:
    """One process's step `alone`, and the same in float64, `exact`. An error is at most three times that of one
    process, plus four float32 ulp of the largest value; where all is float64, only these are left."""
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        if value is None or found[name] is None:
            assert value is found[name] is alone[name], name
            continue
        true, one = torch.from_numpy(value), torch.from_numpy(alone[name])
        allowed = allowed_error(true, one, torch.float32, GRADIENT_FACTOR)
        assert np.abs(found[name] - value).max() <= allowed, name


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("way", ["2", "4", "2 to 4", "1 to 2"])
def test_the_same_for_any_number_of_processes(
    way: str, case: int, alone: list[Any], exact: list[Any], together: list[dict[str, Any]]
) -> None:
    steps, figures, _ = alone[case]
    for rank in range(4):
        found, numbers = together[rank][f"{way}/{case}"]
        for mine, one, true in zip(found, steps[-len(found) :], exact[case][-len(found) :], strict=True):
            assert_same(mine, one, true)
        assert numbers.keys() == figures.keys()
        if CASES[case][1] == torch.float64:  # ratios of sums, which amplify the rounding of float32
            for name, value in figures.items():
                assert numbers[name] == pytest.approx(value, rel=EPS, nan_ok=True), name
        # In all processes the same bits.
        first, _ = together[0][f"{way}/{case}"]
        for mine, theirs in zip(found, first, strict=True):
            for name, value in theirs.items():
                assert value is None if mine[name] is None else np.array_equal(mine[name], value), name


@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_state_of_two_processes_continues_in_one(
    case: int, alone: list[Any], exact: list[Any], together: list[dict[str, Any]]
) -> None:
    scope, dtype, options = CASES[case]
    steps, _, _ = train(scope, dtype, options, None, start=together[0][f"half/{case}"])
    for mine, one, true in zip(steps, alone[case][0][4:], exact[case][4:], strict=True):
        assert_same(mine, one, true)


def test_rows_buckets_and_errors(together: list[dict[str, Any]]) -> None:
    for rank in range(4):
        found = together[rank]["parts"]
        assert found["columns"] == 3  # of 11
        expected = [[4.0 * row + 6] * 3 + [0.0] * 4 + [60.0] * 4 for row in range(3)]
        assert found["rows"].tolist() == expected
        assert found["nothing kept"] == (3, 0)
        assert found["own"]
        # Last parameters first, each dtype by itself, then which of the three are reached; two of them nowhere.
        assert found["sent"] == [4, 4, 3, 3]
        assert found["reached"] == [False, True, False]
        assert found["sum"] == [[4.0, 4.0], [4.0, 4.0]]
        assert found["from the first"] == [[5.0] * 3] * 2
        assert found["restored"] == ([[4.0, 4.0], [4.0, 4.0]], None)


def sharded_trunk() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Two steps with a trunk held in shards by FSDP2; gradients of the whole batch, and one process's."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    size, rank = dist.get_world_size(), dist.get_rank()
    whole, model = Model(torch.float64), Model(torch.float64)
    fully_shard(model.trunk, mesh=init_device_mesh("cpu", (size,)))
    model.trunk.set_gradient_divide_factor(1.0)
    model.trunk.set_force_sum_reduction_for_comms(True)
    options = {"tasks": TASKS, "scope": "representation", "variance_window": 0}
    alone = SelfGuided(whole.trunk.parameters(), task_parameters=whole.heads.parameters(), **options)
    sgl = SelfGuided(
        model.trunk.parameters(), task_parameters=model.heads.parameters(), process_group=dist.group.WORLD, **options
    )
    found: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    for step in range(3):
        x, present = batch(step, torch.float64)
        for number, (net, guided, rows) in enumerate(
            ((whole, alone, slice(None)), (model, sgl, slice(9) if rank == 0 else slice(9, None)))
        ):
            net.zero_grad()
            hidden = net.trunk(x[rows])
            hidden = hidden.view_as(hidden)
            losses, counts = {}, {}
            for name in TASKS:
                keep = present[name][rows]
                if keep.any():
                    losses[name] = (net.heads[name](hidden) - x[rows, :2])[keep].square().mean()
                    counts[name] = float(keep.sum())
            guided.backward(losses, counts=counts, representation=hidden)
            for parameter in [*net.trunk.parameters(), *net.heads.parameters()]:
                grad = parameter.grad
                if grad is not None:
                    grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
                    found[number].append(grad.numpy().copy())
    with pytest.raises(ValueError, match=r"shared_parameters: some are sharded .*scope='shared_parameters'"):
        SelfGuided(model.trunk.parameters(), TASKS, process_group=dist.group.WORLD)
    return found


def memory(columns: int) -> tuple[int, int]:
    """Numbers in the running gradients of this process, and of all parameters."""
    parameter = Parameter(torch.zeros(columns))
    sgl = SelfGuided([parameter], ["a", "b"], variance_window=0, process_group=dist.group.WORLD)
    sgl.backward({"a": parameter.sum(), "b": (2 * parameter).sum()})
    scope = sgl._setup().scope
    assert isinstance(scope, AveragedScope)
    return scope.ema.numel(), scope.gradients.numel()


def vanish(doomed: int, how: str) -> tuple[str, float]:
    """One process is killed or stops answering in mid-run; what the others get, and after how long."""
    parameter = Parameter(torch.zeros(1000))
    group = dist.new_group(timeout=timedelta(seconds=30 if how == "killed" else 2))
    sgl = SelfGuided([parameter], ["a", "b"], process_group=group)
    for step in range(4):
        if step == 2 and dist.get_rank() == doomed:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(30)
        began = time.monotonic()
        try:
            sgl.backward({"a": (parameter - 1).square().sum(), "b": parameter.square().sum()})
        except ProcessLostError as error:
            return str(error), time.monotonic() - began
    return "", math.nan


def test_a_trunk_in_shards_of_fsdp2() -> None:
    for alone, found in run_together(sharded_trunk, 2):
        assert len(alone) == len(found)
        for one, mine in zip(alone, found, strict=True):
            assert np.abs(one - mine).max() <= EPS * np.abs(one).max()


def test_running_gradients_are_shared_out() -> None:
    for ema, gradients in run_together(memory, 2, 10):
        assert ema == 2 * 5
        assert gradients == 2 * 5


@pytest.mark.parametrize("how", ["killed", "silent"])
def test_a_lost_process_is_an_error_in_the_others(how: str) -> None:
    message, seconds = run_together(vanish, 2, 1, how, lost=(1,))[0]
    assert message.startswith("process 0 of 2: another process of this group ended or did not answer in time (")
    assert seconds < 15


def test_half_precision_is_refused() -> None:
    parameter = Parameter(torch.ones(2, dtype=torch.float16))
    with pytest.raises(ValueError, match="expected no float16 parameters"):
        SelfGuided([parameter], ["a"])
    wide = Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"losses\['a'\]: expected anything but float16"):
        SelfGuided([wide], ["a"]).backward({"a": wide.half().sum()})
