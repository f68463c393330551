"""The recipes of docs/development.md, followed literally: what is added, and that everything then knows it."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import poisson
from torch import Tensor
from torchmetrics import MeanSquaredError
from typer.testing import CliRunner

import umda_fast.cli
from tests.command_line import call
from umda_fast.cli.app import gather
from umda_fast.data import BagDataset, load_folds, load_source
from umda_fast.data.labels import ClassWeights
from umda_fast.data.options import option
from umda_fast.data.sources import source as sources
from umda_fast.data.sources.base import BagSource, Folds, OpenedSource
from umda_fast.errors import DataError
from umda_fast.model import TaskSpec, task_losses
from umda_fast.model.baselines import BASELINES
from umda_fast.model.baselines.base import OneEncoder, Pooled
from umda_fast.model.gmip import bag_index
from umda_fast.runtime.config import ARCHITECTURES
from umda_fast.runtime.rundir import read_metrics
from umda_fast.sgl import BALANCERS, Balancer
from umda_fast.tasks import Regression, Values, kind, register_kind
from umda_fast.tasks.metric_names import METRIC_NAMES, MetricName
from umda_fast.train import load_config, train

SMALL = {
    "device": "cpu",
    "data": {"options": {"train_bags": 40, "val_bags": 16, "test_bags": 16}, "budget": 96},
    "model": {"width": 16, "heads": 2, "layers": 1},
    "train": {"epochs": 1, "log_steps": 1},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


# ---- a balancer: a class, a line in BALANCERS


class Halves(Balancer):
    """Every task counts `share`."""

    def __init__(self, share: float = 0.5) -> None:
        if share <= 0:
            raise ValueError(f"share: expected a positive number, got {share}")
        self.share = share

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        return torch.full_like(losses, self.share)


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BALANCERS, "halves", Halves)


def test_a_balancer(halves: None, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = load_config(config, ["sgl.balancer=halves", "sgl.options={share: 0.25}"])  # as --set has it
    train(settings, run, progress=False, plots=False)
    steps = [record["sgl"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "step"]
    assert len(steps) >= 2
    weights = [step[f"weight/{task}"] for step in steps for task in ("has_nine", "largest", "present", "mean")]
    assert set(weights) == {0.25}
    assert yaml.safe_load((run / "config.yaml").read_text())["sgl"]["balancer"] == "halves"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("sgl.balancer=halve", "did you mean 'halves'"),
        ("sgl.balancer=none_of_them", "halves, got 'none_of_them'"),
        ("sgl.options={part: 1}", "options of halves: share"),
        ("sgl.options={share: -1}", "share: expected a positive number, got -1"),
    ],
)
def test_a_balancer_s_mistakes(
    values: str, words: str, halves: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("train", "--set", "sgl.balancer=halves", "--set", values, "--out", tmp_path / "run") == 2
    assert words in capsys.readouterr().err


# ---- a task kind: a class, register_kind


class Counts(Values):
    """How many: the Poisson negative log likelihood of the logarithm of the rate, without its constant."""

    name = "counts"
    loss_name = "Poisson negative log likelihood (nats)"
    expected = "a whole number of at least 0"

    def allowed(self, values: Any) -> Any:
        return np.isfinite(values) & (values >= 0) & (values == np.floor(values))

    def losses(self, task: TaskSpec, logits: Tensor, target: Tensor) -> Tensor:
        return logits[:, 0].exp() - target.to(logits.dtype) * logits[:, 0]

    def decode(self, task: TaskSpec, logits: Tensor) -> Tensor:
        return logits.exp()

    def encode(self, task: TaskSpec, prediction: Tensor) -> Tensor:
        return prediction.clamp_min(0.1).log()


@pytest.fixture
def counts() -> Iterator[None]:
    register_kind(Counts())
    yield
    del kind._KINDS["counts"]


@pytest.fixture
def events(tmp_path: Path) -> Path:
    """Bags whose counts have a rate that grows with one feature; two counts are missing."""
    rng = np.random.default_rng(0)
    rate = rng.normal(size=240)
    sizes = rng.integers(1, 4, len(rate))
    ptr = np.concatenate([[0], sizes.cumsum()])
    x = rng.normal(size=(ptr[-1], 4)).astype(np.float32)
    x[:, 0] = np.repeat(rate, sizes)
    found = rng.poisson(np.exp(1 + rate)).astype(float)
    found[[3, 7]] = np.nan
    path = tmp_path / "events.npz"
    np.savez(path, X=x, ptr=ptr, y_events=found, y_site=np.array(["a", "b"] * 120))
    return path


KINDS = ("--set", "data.options.kinds={events: counts}")


def test_a_task_kind(
    counts: None, events: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = tmp_path / "run", ["--data", events]
    assert call("inspect", events, *KINDS) == 0
    assert "counts" in capsys.readouterr().out

    config.write_text(yaml.safe_dump({**SMALL, "data": {"budget": 96}}))
    long = ["--set", "train.lr=0.01", "--epochs", 25, "--quiet"]
    assert call("train", *data, "--config", config, *KINDS, *long, "--out", run) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["tasks"]["events"]) == {"mae", "r2"}
    assert metrics["tasks"]["events"]["r2"] > 0.3
    assert metrics["mean_score"] == pytest.approx(
        (metrics["tasks"]["events"]["r2"] + metrics["tasks"]["site"]["auroc"]) / 2
    )
    tasks = {task["name"]: task["kind"] for task in json.loads((run / "config.json").read_text())["tasks"]}
    assert tasks == {"events": "counts", "site": "binary"}

    for runs in ([run], [run, run]):  # and the mean of several
        assert call("evaluate", *runs, "--json", tmp_path / "scores.json", "--quiet") == 0
        scores = json.loads((tmp_path / "scores.json").read_text())["tasks"]
        assert scores["events"] == pytest.approx(metrics["tasks"]["events"], rel=1e-5)

    table = tmp_path / "predicted.csv"
    assert call("predict", run, *data, "--out", table, "--refer-below", 0.5, "--quiet") == 0
    with open(table, newline="") as stream:
        lines = list(csv.DictReader(stream))
    columns = ["bag", "events", "site_probability_b", "site_predicted"]
    assert list(lines[0]) == [*columns, "events_low", "events_high", "site_confidence", "refer", "reason"]
    with np.load(events) as arrays:
        found = arrays["y_events"]
    there = ~np.isnan(found)
    predicted = np.array([float(line["events"]) for line in lines])
    assert (predicted > 0).all()
    assert np.corrcoef(predicted[there], found[there])[0, 1] > 0.6

    assert call("report", run, "--samples", 20, "--quiet") == 0
    page = (run / "report.html").read_text()
    assert "events (counts)" in page
    assert "events: prediction against label" in page
    assert call("crossval", *data, "--config", config, *KINDS, "--folds", 2, "--out", tmp_path / "cv", "--quiet") == 0


def test_a_task_kind_s_loss(counts: None) -> None:
    task, log_rate = TaskSpec("n", "counts"), torch.tensor([[0.3], [1.2], [-0.5]], dtype=torch.float64)
    found = torch.tensor([2.0, 0.0, float("nan")])
    loss = task_losses([task], {"n": log_rate}, {"n": found}, {"n": torch.tensor([True, True, False])})["n"]
    exact = poisson.logpmf([2, 0], log_rate[:2, 0].exp().numpy()) + np.log([2.0, 1.0])  # log k!
    assert float(loss) == pytest.approx(-exact.mean(), rel=1e-12)


@pytest.mark.parametrize(
    ("column", "kinds", "words"),
    [
        ([1, -2] * 20, "{y: counts}", "expected a whole number of at least 0, got -2 in row 1"),
        (["1", "few"] * 20, "{y: counts}", "expected numbers for counts, got text such as 'few'"),
        ([1, 2] * 20, "{y: count}", "counts, got 'count'"),
    ],
)
def test_a_task_kind_s_mistakes(
    column: list[Any], kinds: str, words: str, counts: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, X=np.ones((40, 2), np.float32), y=np.array(column))
    assert call("train", "--data", path, "--set", f"data.options.kinds={kinds}", "--out", tmp_path / "run") == 2
    assert words in capsys.readouterr().err


def test_a_name_is_taken_once(counts: None) -> None:
    with pytest.raises(ValueError, match="'counts': there is one already"):
        register_kind(Counts())


# ---- a metric: an entry in the kind's `metrics`, its name in METRIC_NAMES


class SquaredToo(Regression):
    def metrics(self, task: TaskSpec) -> dict[str, Any]:
        return {**super().metrics(task), "mse": MeanSquaredError()}


def test_a_metric(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(kind._KINDS, "regression", SquaredToo())
    monkeypatch.setitem(METRIC_NAMES, "mse", MetricName("squared error", lower_is_better=True))
    train(load_config(config), tmp_path / "run", progress=False, plots=False)
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())["tasks"]["mean"]
    assert found["mse"] >= found["mae"] ** 2
    assert call("evaluate", tmp_path / "run", "--quiet") == 0
    assert "squared error" in capsys.readouterr().out


# ---- a source: a class, a line in FORMATS


@dataclass(frozen=True, kw_only=True)
class RampSource(BagSource):
    """Bags of one instance whose label is whether its feature is positive; the file holds the step."""

    bags: int = 30
    val_share: float = 0.2
    test_share: float = option(0.2, folds=False)
    class_weights: ClassWeights = None

    def open(self, path: str, folds: Folds | None) -> OpenedSource:
        step = float(Path(path).read_text())
        x = (np.arange(self.bags)[:, None] - self.bags / 2 + 0.5) * step
        whole = BagDataset.from_arrays({"x": x.astype(np.float32)}, None, {"positive": x[:, 0] > 0}, name="ramp")
        return OpenedSource(whole, name="ramp", summary="a ramp")


def test_a_source(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ramp = sources.SourceFormat(
        "ramp", "a .ramp file with its step", lambda source: source.endswith(".ramp"), RampSource
    )
    monkeypatch.setattr(sources, "FORMATS", (*sources.FORMATS, ramp))
    path = tmp_path / "a.ramp"
    path.write_text("0.5")
    assert load_source(path, bags=10).whole.views[0].name == "x"
    options = "bags, val_share, test_share, class_weights"
    with pytest.raises(DataError, match=f"option 'bag': expected one of {options} for ramp"):
        load_source(path, bag=10)
    with pytest.raises(DataError, match=r"a \.ramp file with its step"):
        load_source(tmp_path / "a.slope")
    assert call("inspect", path) == 0
    assert "ramp (ramp): a ramp" in capsys.readouterr().out
    assert len(list(load_folds(path, folds=3))) == 3
    few = ["--set", "data.options={bags: 24}", "--quiet"]
    own = [*few, "--set", "model.width=16", "--set", "model.heads=2", "--epochs", 1, "--device", "cpu"]
    assert call("train", "--data", path, *own, "--out", tmp_path / "run") == 0
    assert call("evaluate", tmp_path / "run", "--data", path, "--split", "val", "--quiet") == 0


# ---- a baseline: a class, a line in BASELINES


class FirstInstance(OneEncoder):
    """A bag is its first instance."""

    architecture = "first_instance"

    def pool(self, z: Tensor, ptr: Tensor) -> Pooled:
        first = torch.zeros(len(z), 1).index_fill(0, ptr[:-1][ptr.diff() > 0], 1.0)
        pooled = z.new_zeros(len(ptr) - 1, z.shape[1]).index_add(0, bag_index(ptr, len(z)), z * first)
        return Pooled(pooled[:, None], first, torch.zeros(len(ptr) - 1, 1))


def test_a_baseline(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BASELINES, FirstInstance.architecture, FirstInstance)
    monkeypatch.setitem(ARCHITECTURES, FirstInstance.architecture, FirstInstance.config_class)  # built of BASELINES
    out = tmp_path / "compared"
    config.write_text(yaml.safe_dump({**SMALL, "model": {"width": 16}}))
    own = ["--config", config, "--models", "first_instance", "--seeds", 1, "--out", out, "--quiet"]
    assert call("compare", *own) == 0
    assert "first_instance" in capsys.readouterr().out
    assert call("evaluate", next(out.glob("first_instance*/**/model.safetensors")).parent, "--quiet") == 0


# ---- a command: a file, a name in COMMANDS

HELLO = '''
"""`umda-fast hello`."""

from __future__ import annotations

from typing import Annotated

import typer

from umda_fast.cli.options import Bags, Computing, Quiet, Set

EXAMPLE = "umda-fast hello you"


def hello(
    *,
    whom: Annotated[str, typer.Argument(help="Who is greeted.")],
    bags: Bags,
    computing: Computing,
    set_: Set = None,
    quiet: Quiet = False,
) -> None:
    """Greet."""
    print(whom, bags.data, computing.arguments(), set_, quiet)
'''


def test_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hello.py").write_text(HELLO)
    monkeypatch.setattr(umda_fast.cli, "__path__", [*umda_fast.cli.__path__, str(tmp_path)])
    app, runner = gather(("info", "hello")), CliRunner()
    assert "Greet." in runner.invoke(app, ["--help"]).output
    shown = runner.invoke(app, ["hello", "--help"]).output
    for word in ("--data", "--device", "--set", "Who is greeted.", "Example: umda-fast hello you"):
        assert word in shown
    said = runner.invoke(app, ["hello", "you", "--data", "digits", "--backend", "cpp", "--set", "a=1", "-q"])
    assert said.output == "you digits {'device': 'auto', 'backend': 'cpp'} ['a=1'] True\n"
