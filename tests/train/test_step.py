"""A step by itself, of one process and of two: what it does to the weights, what it reports, what it leaves alone."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.processes import run_together
from tests.small import small_config
from tests.train.bags import INEXACT, TASKS, datasets
from umda_fast.data import BagBatch
from umda_fast.model import penalty_loss, task_losses, view_losses
from umda_fast.parity.rule import GRADIENT_FACTOR, allowed_error
from umda_fast.runtime.config import RunConfig
from umda_fast.runtime.fabric import make_fabric
from umda_fast.train import NonFiniteError, build_model
from umda_fast.train.optim import make_optimizer, set_learning_rate
from umda_fast.train.step import TrainStep

DATA = datasets()["train"]
SCOPES = ("none", "shared_parameters", "last_shared_layer", "representation")


def batch(*bags: int) -> BagBatch:
    return DATA.collate([DATA[index] for index in bags])


def config(scope: str = "none", **train: Any) -> RunConfig:
    return small_config(
        model={"width": 16, "heads": 2, "layers": 1, "dropout": 0.0, "kappa_g": 1.0, "view_heads": True},
        penalties=INEXACT,
        sgl={"balancer": "none"} if scope == "none" else {"scope": scope},
        train={"lr": 0.01, "warmup": 0.0, **train},
    )


def make_step(settings: RunConfig, double: bool = False) -> TrainStep:
    torch.manual_seed(0)
    model = build_model(settings, DATA)
    return TrainStep(settings, model.double() if double else model, TASKS, make_fabric(settings))


def copy_of(values: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in values.items()}


def assert_same(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("clip", "progress"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.75)])
def test_the_plain_sum_is_what_plain_pytorch_makes_of_it(clip: float, progress: float) -> None:
    settings = config(clip=clip, view_loss=0.5)
    step, host = make_step(settings), batch(2, 3, 6, 7)
    model: Any = copy.deepcopy(step.model)
    optimizer = make_optimizer(model, settings.train)
    out = model(**host.inputs())
    losses = task_losses(TASKS, out.logits, host.labels, host.label_mask)
    penalty = penalty_loss(out.penalties, vars(settings.penalties))
    labelled = [task for task in TASKS if task.name in losses]
    alone = view_losses(labelled, out.view_logits, out.view_present, host.labels, host.label_mask)
    (sum(losses.values()) + 0.5 * (1.0 - progress) * sum(alone.values()) + penalty).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
    set_learning_rate(optimizer, settings.train, progress)
    optimizer.step()

    result = step(host, progress, 0)
    assert result.instances == host.num_instances
    assert result.lr == optimizer.param_groups[0]["lr"]
    assert result.values.keys() == {"gradient_norm", "penalty", *(f"loss/{name}" for name in losses)}
    assert result.values["gradient_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert norm > 0.1
    for name, loss in losses.items():
        assert result.values[f"loss/{name}"] == float(loss.detach())
    assert result.record()["penalties"] == {name: float(value.detach()) for name, value in out.penalties.items()}
    assert result.record()["view_losses"] == {name: float(value.detach()) for name, value in alone.items()}
    weights = model.state_dict()
    for name, value in step.model.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scope", SCOPES)
def test_steps_lower_the_loss(scope: str) -> None:
    step, host = make_step(config(scope)), batch(2, 3, 4, 6, 7)
    step.model.train()
    losses = [sum(v for k, v in step(host, 0.0, n).values.items() if k.startswith("loss/")) for n in range(30)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("scope", SCOPES)
def test_what_every_view_alone_loses_is_learnt_from_until_the_end(scope: str) -> None:
    def after(progress: float, view_loss: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
        step = make_step(config(scope, view_loss=view_loss))
        return step.model.state_dict(), step(batch(2, 3, 4, 6, 7), progress, 0).record()

    (some, record), (none, without) = after(0.5, 1.0), after(0.5, 0.0)
    assert any(not torch.equal(some[name], value) for name, value in none.items())
    assert record["losses"] == without["losses"]
    assert record["view_losses"].keys() == record["losses"].keys()
    assert "view_losses" not in without
    (end, record), (none, _) = after(1.0, 1.0), after(1.0, 0.0)
    assert_same(end, none)
    assert "view_losses" not in record


def test_the_learning_rate_follows_the_progress() -> None:
    settings = config(warmup=0.5, final_lr=0.1)
    rates = [make_step(settings)(batch(2, 3), progress, 0).lr for progress in (0.25, 0.5, 1.0)]
    assert rates == pytest.approx([0.005, 0.01, 0.001])


@pytest.mark.parametrize("scope", SCOPES)
def test_a_batch_without_labels_changes_nothing(scope: str) -> None:
    step, host = make_step(config(scope, ema=0.5)), batch(2, 3)
    for mask in host.label_mask.values():
        mask[:] = False
    before = copy_of(step.model.state_dict())
    result = step(host, 0.5, 0)
    assert result.instances == host.num_instances
    assert result.values == {}
    assert not step.optimizer.state
    after = step.model.state_dict()
    assert_same({name: after[name] for name, _ in step.model.named_parameters()},
                {name: before[name] for name, _ in step.model.named_parameters()})  # fmt: skip


@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_not_finite_is_named_before_anything_is_touched(scope: str) -> None:
    step, host = make_step(config(scope, ema=0.5)), batch(4, 6, 7)
    step(host, 0.1, 0)
    assert step.average is not None
    before = copy_of(dict(step.model.named_parameters())), copy_of(step.average.module.state_dict())
    moments = {key: copy_of(value) for key, value in step.optimizer.state_dict()["state"].items()}
    host.labels["rare"][:] = 3e38  # finite, its square is not
    with pytest.raises(NonFiniteError, match=r"^step 17: training stopped .* loss of 'rare'"):
        step(host, 0.1, 17)
    assert_same(dict(step.model.named_parameters()), before[0])
    assert_same(step.average.module.state_dict(), before[1])
    for key, value in step.optimizer.state_dict()["state"].items():
        assert_same(value, moments[key])


def test_the_running_mean_follows_the_weights() -> None:
    step = make_step(config(ema=0.75))
    assert step.evaluated_model is not step.model
    expected = copy_of(dict(step.model.named_parameters()))
    for number, bags in enumerate([(2, 3), (6, 7), (9, 10)]):
        step(batch(*bags), 0.2, number)
        for name, value in step.model.named_parameters():
            # The first update takes the weights as they are.
            expected[name] = value.detach().clone() if number == 0 else 0.75 * expected[name] + 0.25 * value.detach()
    for name, value in step.evaluated_model.named_parameters():
        torch.testing.assert_close(value, expected[name])
    without = make_step(config(ema=0.0))
    assert without.evaluated_model is without.model


@pytest.mark.parametrize("scope", SCOPES)
def test_another_goes_on_from_the_state_of_one(scope: str, tmp_path: Path) -> None:
    settings = config(scope, ema=0.5)
    first = make_step(settings)
    first(batch(2, 3, 4), 0.1, 0)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = make_step(settings)
    second(batch(9, 10), 0.3, 0)  # its own past does not matter
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for number, bags in enumerate([(6, 7), (11, 12)], start=1):
        here, there = (step(batch(*bags), 0.2, number) for step in (first, second))
        assert here.values == there.values
    assert_same(second.model.state_dict(), first.model.state_dict())
    assert_same(second.evaluated_model.state_dict(), first.evaluated_model.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        make_step(small_config(model={"width": 32, "heads": 2})).load_state_dict(first.state_dict())


class Reads:
    """Counts how often values of tensors reach the host, but for those of `hosted`, which lie there on every device."""

    def __init__(self, *hosted: torch.Tensor) -> None:
        self.count = 0
        reads = self

        class Functions(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                read = getattr(func, "__name__", "") in ("tolist", "numpy", "cpu")
                reads.count += read and not any(args[0] is tensor for tensor in hosted)
                return func(*args, **(kwargs or {}))

        class Operations(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                name = func.__name__.split(".")[0]
                by_mask = name in ("index", "index_put", "index_put_") and any(
                    index is not None and index.dtype == torch.bool for index in args[1]
                )
                reads.count += by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select")
                return func(*args, **(kwargs or {}))

        self._modes = Functions(), Operations()

    def __enter__(self) -> "Reads":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


@pytest.mark.parametrize("scope", SCOPES)
def test_one_host_synchronisation_a_step(scope: str) -> None:
    step = make_step(config(scope))
    step(batch(2, 3, 4), 0.5, 0)
    # AdamW reads its own step counters, which lie in host memory on every device.
    step.optimizer.step = lambda: None  # type: ignore[method-assign, assignment]
    host = batch(6, 7, 13)
    with Reads(*host.label_mask.values()) as reads:
        step(host, 0.5, 1)
    assert reads.count == 1


def test_reads_are_counted() -> None:
    values = torch.ones(3)
    with Reads() as reads:
        values.tolist(), float(values[0]), bool(values.all()), values[values > 0], values.nonzero(), values.cpu()
    assert reads.count == 6


# ---- two processes ----

PARTS = {
    "both": (((2, 3, 4), (6, 7)), 0),
    "one has no labels of a task": (((2, 3), (4, 6)), 1),
    "one has nothing": (((0,), ()), 2),
}


def take_steps(scope: str) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """A step for each of PARTS in float64, of this process's part; the weights and the records."""
    step = make_step(config(scope), double=True)
    records = []
    for parts, number in PARTS.values():
        own = parts[dist.get_rank()] if dist.is_initialized() else parts[0] + parts[1]
        host = batch(*own)
        host.views = {name: features.double() for name, features in host.views.items()}
        result = step(host, 0.1, number)
        records.append({**result.record(), "values": result.values, "instances": result.instances})
    return step.model.state_dict(), records


def wide_steps(scope: str) -> Any:
    from umda_fast.train import step

    step.to_device = lambda host, fabric: host  # type: ignore[assignment]
    return take_steps(scope)


def spoiled() -> str:
    """One process's labels are beyond float32; what each says."""
    step, host = make_step(config()), batch(*PARTS["both"][0][dist.get_rank()])
    if dist.get_rank() == 0:
        host.labels["rare"][:] = 3e38
    before = copy_of(step.model.state_dict())
    with pytest.raises(NonFiniteError) as caught:
        step(host, 0.1, 5)
    assert_same(step.model.state_dict(), before)
    return str(caught.value)


@pytest.mark.parametrize("scope", ["none", "representation"])
def test_two_processes_take_the_step_of_one(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("umda_fast.train.step.to_device", lambda host, fabric: host)
    weights, records = take_steps(scope)
    for theirs, found in run_together(wide_steps, 2, scope):
        for name, value in weights.items():
            allowed = allowed_error(value, value, torch.float32, GRADIENT_FACTOR)
            assert float((theirs[name] - value).abs().max()) <= allowed, name
        for mine, other in zip(found, records, strict=True):
            assert mine["instances"] == other["instances"]
            assert list(mine) == list(other)
            assert list(mine["values"]) == list(other["values"])
            for part in ("values", "losses", "view_losses"):
                assert mine[part] == pytest.approx(other[part], rel=1e-6)
            exact = [{k: v for k, v in record["penalties"].items() if k not in INEXACT} for record in (mine, other)]
            assert exact[0] == pytest.approx(exact[1], rel=1e-6)


def test_the_process_that_is_to_blame_says_so() -> None:
    to_blame, other = run_together(spoiled, 2)
    assert "loss of 'rare'" in to_blame
    assert other.startswith("step 5: training stopped")
    assert "came from another process" in other
