"""Bags too large for all activations at once: chunks give what the whole gives, in less memory."""

import copy
import csv

import pytest
import torch

from tests.model.conftest import make_batch, make_config, total_loss
from tests.small import DATA, small_config, small_data
from umda_fast import UMDA, TaskSpec, UMDAConfig, ViewSpec
from umda_fast.data import Bag, BagDataset
from umda_fast.data.thinning import drop_instances
from umda_fast.model import penalty_loss
from umda_fast.model.chunked import forward_chunked
from umda_fast.parity.rule import GRADIENT_FACTOR, assert_close
from umda_fast.runtime.rundir import read_metrics
from umda_fast.score import inference
from umda_fast.train import ConfigError, evaluate, load_run, predict, train

SIZES = (40, 0, 1, 75, 23)


def outputs(out):
    """All numbers a model gives, but `view_consistency`, which is 1 minus one of them."""
    named = {f"logits {name}": value for name, value in out.logits.items()}
    named |= {f"penalty {name}": value for name, value in out.penalties.items()}
    parts = ("attention", "attention_entropy", "view_mass", "view_weights", "representation", "branches")
    return named | {name: getattr(out, name) for name in parts}


def in_three_ways(config, run, seed=0):
    """`run(model, batch, chunked)` chunked and whole in float32, and whole in float64."""
    torch.manual_seed(0)
    model, batch = UMDA(config).eval(), make_batch(SIZES, seed)
    return run(model, batch, True), run(model, batch, False), run(copy.deepcopy(model).double(), batch.double(), False)


class TestInference:
    @pytest.mark.parametrize("options", [{}, {"hcva": False}, {"graph": False}, {"message": "mean"}])
    def test_equals_the_forward_of_the_whole(self, options):
        def run(model, batch, chunked):
            with torch.no_grad():
                forward = forward_chunked if chunked else type(model).__call__
                return outputs(forward(model, **batch.inputs(), **({"chunk": 16} if chunked else {})))

        batches = [in_three_ways(make_config(**options), run, seed) for seed in range(8)]
        for name, value in batches[0][0].items():
            if value.dim():  # the error of one number in the whole is next to none now and then by chance
                assert_close(name, value, batches[0][2][name], batches[0][1][name])
            chunked, whole, exact = (torch.stack([batch[way][name] for batch in batches]) for way in range(3))
            assert_close(name, chunked, exact, whole)

    def test_all_views_present_and_features_in_half_precision(self):
        torch.manual_seed(0)
        model, batch = UMDA(make_config()).eval(), make_batch(SIZES)
        half = {name: features.half() for name, features in batch.views.items()}
        wide = {name: features.float() for name, features in half.items()}
        with torch.no_grad():
            exact = outputs(copy.deepcopy(model).double()({name: x.double() for name, x in half.items()}, batch.ptr))
            whole = outputs(model(wide, batch.ptr))
        for name, value in outputs(forward_chunked(model, half, batch.ptr, chunk=50)).items():
            assert_close(name, value, exact[name], whole[name])

    def test_a_view_that_a_piece_lacks_altogether(self):
        torch.manual_seed(0)
        model, batch = UMDA(make_config()).eval(), make_batch(SIZES)
        batch.mask[:32, 1:] = False
        batch.mask[:32, 0] = True
        with torch.no_grad():
            whole = outputs(model(**batch.inputs()))
            exact = outputs(copy.deepcopy(model).double()(**batch.double().inputs()))
        for name, value in outputs(forward_chunked(model, **batch.inputs(), chunk=16)).items():
            assert_close(name, value, exact[name], whole[name])

    def test_few_instances_go_through_the_model_itself(self):
        model, batch = UMDA(make_config()).eval(), make_batch()
        with torch.no_grad():
            expected = model(**batch.inputs())
        torch.testing.assert_close(outputs(forward_chunked(model, **batch.inputs())), outputs(expected), rtol=0, atol=0)

    def test_what_is_wrong_is_named(self):
        model, batch = UMDA(make_config()), make_batch()
        with pytest.raises(ValueError, match="expected evaluation mode"):
            forward_chunked(model, **batch.inputs())
        with pytest.raises(ValueError, match="chunk: expected at least 1, got 0"):
            forward_chunked(model.eval(), **batch.inputs(), chunk=0)
        batch.views["type"] = batch.views["type"][:-1]
        with pytest.raises(ValueError, match="'type'"):
            forward_chunked(model, **batch.inputs(), chunk=4)


class TestCheckpointing:
    @pytest.mark.parametrize("options", [{}, {"hcva": False}])
    def test_gradients_are_those_of_the_whole(self, options):
        def run(model, batch, chunked):
            model = copy.deepcopy(model)
            model.config = UMDAConfig(**{**vars(model.config), "chunk": 16 if chunked else 0})
            total_loss(model, batch).backward()
            return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

        chunked, whole, exact = in_three_ways(make_config(**options), run)
        assert chunked.keys() == whole.keys()
        for name, value in chunked.items():
            assert_close(name, value, exact[name], whole[name], GRADIENT_FACTOR)

    def test_dropout_is_the_same_when_a_piece_runs_again(self):
        """Were it not, the gradient would not be that of the loss: here it is compared with finite differences."""
        config = make_config(chunk=16, dropout=0.4, graph=False)
        torch.manual_seed(0)
        model, batch = UMDA(config).double().train(), make_batch(SIZES).double()

        def loss():
            torch.manual_seed(1)
            return total_loss(model, batch)

        loss().backward()
        weight = model.encoders.encoders[0].get_parameter("1.weight")
        direction, step = weight.grad / weight.grad.norm(), 1e-5
        with torch.no_grad():
            # The pieces draw their dropout in turn with gradients or without: the same stream.
            weight += step * direction
            above = loss()
            weight -= 2 * step * direction
            below = loss()
        slope = float((above - below) / (2 * step))
        assert slope == pytest.approx(float(weight.grad.norm()), rel=1e-6)

    def test_less_is_kept_for_the_backward_pass(self):
        """Bytes of all tensors that autograd saves, which is what activations cost."""
        tasks = (TaskSpec("y", "binary"),)
        views = (ViewSpec("a", 64), ViewSpec("b", 48))
        features = {view.name: torch.randn(2048, view.width) for view in views}
        ptr = torch.tensor([0, 2048])

        def saved(chunk):
            torch.manual_seed(0)
            model = UMDA(UMDAConfig(views, tasks, width=32, heads=2, layers=3, chunk=chunk))
            kept = {}

            def pack(tensor):
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                out = model(features, ptr)
            del out
            return sum(kept.values())

        assert saved(256) < 0.4 * saved(0)

    def test_penalties_alone_reach_the_encoders(self):
        model, batch = UMDA(make_config(chunk=16)), make_batch(SIZES)
        out = model(**batch.inputs())
        penalty_loss(out.penalties, dict.fromkeys(out.penalties, 1.0)).backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in model.encoders.parameters())


class TestInstanceDropout:
    @pytest.fixture
    def data(self):
        generator = torch.Generator().manual_seed(0)
        return BagDataset(
            [
                Bag(f"b{size}", {"x": torch.randn(size, 3, generator=generator)}, coords=torch.randn(size, 2))
                for size in (1, 2, 10, 100)
            ],
            [ViewSpec("x", 3)],
            [],
        )

    def test_a_share_of_every_bag_in_order(self, data):
        batch = data.collate([data[index] for index in range(4)])
        thin = drop_instances(batch, 0.3)
        assert thin.ptr.diff().tolist() == [1, 1, 7, 70]
        assert thin.names == batch.names
        rows = [(batch.views["x"] == row).all(1).nonzero().item() for row in thin.views["x"]]
        assert rows == sorted(rows)
        torch.testing.assert_close(thin.coords, batch.coords[rows])
        assert len(thin.mask) == 79
        assert drop_instances(batch, 0.0) is batch

    def test_depends_on_seed_epoch_and_bag_only(self, data):
        whole = data.collate([data[index] for index in range(4)])
        alone = data.collate([data[3]])

        def last(batch, **key):
            return drop_instances(batch, 0.5, **key).views["x"][-50:]

        torch.testing.assert_close(last(whole, seed=1, epoch=2), last(alone, seed=1, epoch=2), rtol=0, atol=0)
        assert not torch.equal(last(alone, seed=1, epoch=2), last(alone, seed=1, epoch=3))
        assert not torch.equal(last(alone, seed=1, epoch=2), last(alone, seed=2, epoch=2))

    def test_every_instance_is_seen_sooner_or_later(self, data):
        batch = data.collate([data[2]])
        seen = torch.cat([drop_instances(batch, 0.8, epoch=epoch).views["x"] for epoch in range(40)])
        assert len(seen.unique(dim=0)) == 10

    def test_empty_bags_stay(self):
        bags = [Bag("none", {"x": torch.zeros(0, 3)}), Bag("two", {"x": torch.ones(2, 3)})]
        data = BagDataset(bags, [ViewSpec("x", 3)], [])
        assert drop_instances(data.collate(bags), 0.5).ptr.tolist() == [0, 0, 1]

    @pytest.mark.parametrize("share", [-0.1, 1.0])
    def test_what_is_wrong_is_named(self, data, share):
        with pytest.raises(ValueError, match="share: expected at least 0 and below 1"):
            drop_instances(data.collate([data[0]]), share)


class TestRuns:
    def test_training_with_all_of_it_and_inference_in_chunks(self, tmp_path, monkeypatch):
        config = small_config(
            precision="bf16-mixed",
            data={"options": DATA, "budget": 96, "instance_dropout": 0.5},
            model={"width": 16, "heads": 2, "layers": 1, "chunk": 20},
        )
        datasets = small_data()
        result = train(config, tmp_path / "run", datasets=datasets, progress=False, plots=False)
        trained = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "epoch"]
        assert len(trained) == 2
        run = load_run(tmp_path / "run")
        assert run.config.data.instance_dropout == 0.5

        def predictions():
            predict(run, datasets=datasets, split="test", out=tmp_path / "p.csv", progress=False)
            with open(tmp_path / "p.csv", encoding="utf-8") as stream:
                return list(csv.DictReader(stream))

        whole = predictions()
        asked = []

        def chunked(model, views, *args, **options):
            asked.append(len(next(iter(views.values()))))
            return forward_chunked(model, views, *args, **options, chunk=7)

        monkeypatch.setattr(inference, "LARGE", 10)
        monkeypatch.setattr(inference, "forward_chunked", chunked)
        pieces = predictions()
        assert sum(asked) == int(datasets["test"].sizes.sum())
        for one, other in zip(whole, pieces, strict=True):
            for name, value in one.items():
                if "probability" in name:  # both were computed in bfloat16
                    assert float(other[name]) == pytest.approx(float(value), abs=2 * torch.finfo(torch.bfloat16).eps)
        again = evaluate(run, datasets=datasets, progress=False)
        assert again.mean_score == pytest.approx(result.metrics["mean_score"], abs=0.05)
        assert len(asked) > 1

    def test_a_share_of_one_is_refused(self):
        with pytest.raises(ConfigError, match=r"data\.instance_dropout"):
            small_config(data={"instance_dropout": 1.0})
