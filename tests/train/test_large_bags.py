"""Bags too large for all activations at once: chunks give what the whole gives, in less memory."""

import copy

import pytest
import torch

from tests.model.conftest import make_batch, make_config, total_loss
from umda_fast import UMDA, TaskSpec, UMDAConfig, ViewSpec
from umda_fast.model import penalty_loss
from umda_fast.model.chunked import forward_chunked
from umda_fast.parity.rule import GRADIENT_FACTOR, assert_close

SIZES = (40, 0, 1, 75, 23)


def outputs(out):
    """All numbers a model gives, but `view_consistency`, which is 1 minus one of them."""
    named = {f"logits {name}": value for name, value in out.logits.items()}
    named |= {f"penalty {name}": value for name, value in out.penalties.items()}
    parts = ("attention", "attention_entropy", "view_mass", "view_weights", "representation", "branches")
    return named | {name: getattr(out, name) for name in parts}


def in_three_ways(config, run):
    """`run(model, batch, chunked)` chunked and whole in float32, and whole in float64."""
    torch.manual_seed(0)
    model, batch = UMDA(config).eval(), make_batch(SIZES)
    return run(model, batch, True), run(model, batch, False), run(copy.deepcopy(model).double(), batch.double(), False)


class TestInference:
    @pytest.mark.parametrize("options", [{}, {"hcva": False}, {"graph": False}, {"message": "mean"}])
    def test_equals_the_forward_of_the_whole(self, options):
        def run(model, batch, chunked):
            with torch.no_grad():
                forward = forward_chunked if chunked else type(model).__call__
                return outputs(forward(model, **batch.inputs(), **({"chunk": 16} if chunked else {})))

        chunked, whole, exact = in_three_ways(make_config(**options), run)
        for name, value in chunked.items():
            assert_close(name, value, exact[name], whole[name])

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
