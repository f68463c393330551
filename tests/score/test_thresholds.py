import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.small import small_config
from umda_fast.data import BagDataset
from umda_fast.model import TaskSpec
from umda_fast.score.collect import Predictions
from umda_fast.score.intervals import primary_score
from umda_fast.score.metrics import TaskMetrics
from umda_fast.score.thresholds import best_f1_thresholds, share_thresholds, tune_thresholds, with_thresholds
from umda_fast.tasks import predicted_labels
from umda_fast.train import load_run, predict, train


def f1(chosen, target):
    return 2 * (chosen & target).sum() / max(1, chosen.sum() + target.sum())


class TestBest:
    def test_no_other_cut_is_better(self):
        rng = np.random.default_rng(0)
        probability = rng.random((60, 5)).round(1)  # with ties
        target = (rng.random((60, 5)) < probability * [0.2, 0.5, 1.0, 0.05, 0.0]).astype(float)
        cuts = best_f1_thresholds(probability, target)
        for label in range(4):
            score = f1(probability[:, label] >= cuts[label], target[:, label] == 1)
            every = [f1(probability[:, label] >= cut, target[:, label] == 1) for cut in np.linspace(-0.05, 1.05, 23)]
            assert score == pytest.approx(max(every))
        assert cuts[4] == 0.5  # no positive to go by

    def test_lies_between_two_probabilities(self):
        probability = np.array([[0.9], [0.7], [0.3], [0.1]])
        assert best_f1_thresholds(probability, np.array([[1.0], [1.0], [0.0], [0.0]])) == pytest.approx([0.5])
        assert best_f1_thresholds(probability, np.array([[1.0], [1.0], [1.0], [1.0]])) == pytest.approx([0.05])


class TestTuned:
    TASKS = (TaskSpec("many", "multilabel", 3), TaskSpec("other", "binary"))

    @pytest.fixture
    def found(self):
        generator = torch.Generator().manual_seed(0)
        labels = (torch.rand(400, 3, generator=generator) < torch.tensor([0.5, 0.1, 0.02])).float()
        logits = 2.0 * labels + torch.randn(400, 3, generator=generator) - torch.tensor([1.0, 3.0, 5.0])
        masks = {"many": torch.arange(400) % 4 != 0, "other": torch.zeros(400, dtype=torch.bool)}
        return Predictions(
            {"many": logits, "other": torch.zeros(400, 1)}, {"many": labels, "other": torch.zeros(400)}, masks
        )

    def test_rare_labels_get_low_ones_and_f1_rises(self, found):
        many, other = tune_thresholds(self.TASKS, found)
        assert other.thresholds is None
        assert many.thresholds[0] > many.thresholds[1] > many.thresholds[2]

        def score(task):
            metrics = TaskMetrics([task, other])
            metrics.update(found.logits, found.labels, found.masks)
            return metrics.compute()["many"]

        assert score(many)["f1_macro"] > score(self.TASKS[0])["f1_macro"] + 0.1
        assert score(many)["map"] == score(self.TASKS[0])["map"]
        keep = found.masks["many"]
        probability, target = found.logits["many"][keep].sigmoid().numpy(), found.labels["many"][keep].numpy()
        assert primary_score(many, probability, target) == pytest.approx(score(many)["f1_macro"])

    def test_as_many_are_predicted_as_there_are(self, found):
        shares = np.array([0.5, 0.1, 0.02])
        labels = (np.arange(1000)[:, None] < 1000 * shares).astype(float)
        labels[::7] = np.nan  # every kind of bag alike
        many, other = tune_thresholds(self.TASKS, found, "share", {"many": labels})
        assert other.thresholds is None
        logits, _ = found.of(many)
        chosen = (logits.double().sigmoid().numpy() >= np.array(many.thresholds)).sum(0)
        known = np.nanmean(labels, 0)
        np.testing.assert_array_equal(chosen, np.rint(known * len(logits)))

    def test_share_of_none_and_of_few_bags(self, found):
        probability = np.array([[0.9, 0.2, 0.3], [0.7, 0.4, 0.1]])
        cuts = share_thresholds(probability, np.array([0.01, 1.0, 0.0]))
        assert cuts == pytest.approx([0.8, 0.1, 0.5])
        few = Predictions(
            {name: x[:9] for name, x in found.logits.items()},
            {name: x[:9] for name, x in found.labels.items()},
            {name: torch.ones(9, dtype=torch.bool) for name in found.masks},
        )
        assert tune_thresholds(self.TASKS[:1], few, "share", {"many": np.ones((5, 3))}) == self.TASKS[:1]

    def test_half_leaves_them_and_share_needs_the_training_labels(self, found):
        given = replace(self.TASKS[0], thresholds=(0.1, 0.2, 0.3))
        assert with_thresholds(given, *found.of(given), "half") == given
        with pytest.raises(ValueError, match="trained: expected the training labels of task 'many', got None"):
            with_thresholds(given, *found.of(given), "share")

    def test_auto_takes_the_better_of_share_and_half(self, found):
        labels = np.tile([0.5, 0.1, 0.02], (50, 1)) > np.linspace(0.0, 0.99, 50)[:, None]
        trained = labels.astype(float)
        hard = self.TASKS[0]
        shared = with_thresholds(hard, *found.of(hard), "share", trained)
        assert with_thresholds(hard, *found.of(hard), "auto", trained) == shared != hard
        _, target = found.of(hard)
        sure = 20.0 * target - 10.0  # right about every bag; as many of them as among `trained` are not there
        assert with_thresholds(hard, sure, target, "share", 1.0 - trained).thresholds is not None
        given = replace(hard, thresholds=(0.1, 0.2, 0.3))
        assert with_thresholds(given, sure, target, "auto", 1.0 - trained) == hard
        assert with_thresholds(given, sure[:9], target[:9], "auto", trained) == given
        with pytest.raises(ValueError, match="trained: expected the training labels of task 'many', got None"):
            with_thresholds(hard, sure, target, "auto")

    def test_the_same_every_time_and_unlabelled_tasks_keep_theirs(self, found):
        assert tune_thresholds(self.TASKS, found) == tune_thresholds(self.TASKS, found)
        given = TaskSpec("many", "multilabel", 3, thresholds=(0.1, 0.2, 0.3))
        none = Predictions(
            found.logits, found.labels, {name: torch.zeros(400, dtype=torch.bool) for name in found.masks}
        )
        assert tune_thresholds([given], none) == (given,)

    def test_predicted_from_the_threshold_on(self):
        task = TaskSpec("many", "multilabel", 2, thresholds=(0.25, 0.75))
        probability = torch.tensor([[0.25, 0.7], [0.2, 0.75]])
        assert predicted_labels(task, probability).tolist() == [[True, False], [False, True]]
        half = predicted_labels(TaskSpec("many", "multilabel", 2), probability)
        assert half.tolist() == [[False, True], [False, True]]


def test_a_run_keeps_them_with_its_model(tmp_path):
    rng = np.random.default_rng(0)
    labels = (rng.random((90, 2)) < [0.5, 0.15]).astype(float)
    x = rng.normal(size=(90, 4)) + np.pad(labels, ((0, 0), (0, 2)))
    whole = BagDataset.from_arrays({"x": x}, labels={"many": labels}, kinds={"many": "multilabel"})
    parts = {"train": range(50), "val": range(50, 70), "test": range(70, 90)}
    datasets = {name: whole.subset(rows) for name, rows in parts.items()}
    config = small_config(data={}, train={"epochs": 2, "thresholds": "f1"})
    result = train(config, tmp_path / "run", datasets=datasets, progress=False, plots=False)
    run = load_run(tmp_path / "run")
    (task,) = run.model.config.tasks
    assert task.thresholds is not None
    assert json.loads((tmp_path / "run" / "config.json").read_text())["tasks"][0]["thresholds"] == list(task.thresholds)
    predict(run, datasets=datasets, split="test", out=tmp_path / "p.csv", progress=False)
    with open(tmp_path / "p.csv", encoding="utf-8") as stream:
        lines = list(csv.DictReader(stream))
    probability = np.array([[float(line[f"many_probability_{name}"]) for name in "01"] for line in lines])
    chosen = np.array([[name in line["many_predicted"].split(";") for name in "01"] for line in lines])
    np.testing.assert_array_equal(chosen, probability >= np.array(task.thresholds))
    expected = np.mean([f1(chosen[:, label], labels[70:, label] == 1) for label in range(2)])
    assert result.metrics["tasks"]["many"]["f1_macro"] == pytest.approx(expected)
