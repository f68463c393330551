import math

import pytest
import torch
import torch.nn.functional as F

from tests.model.conftest import VIEWS, make_batch, make_config, total_loss
from umda_fast import UMDA, ViewSpec
from umda_fast.model import FeatureEncoder, QuantileBins
from umda_fast.model.adapters import add_adapters
from umda_fast.model.encoders import squash


class TestInputDropout:
    def test_drops_features_in_training_only(self):
        torch.manual_seed(0)
        encoder = FeatureEncoder(200, 8, dropout=0.0, input_dropout=0.5)
        x = torch.randn(1, 200).requires_grad_()
        encoder.train()
        out = encoder(x.expand(4, -1))
        assert not torch.equal(out[0], out[1])
        encoder.eval()
        torch.testing.assert_close(encoder(x), encoder(x), rtol=0, atol=0)

    def test_what_is_dropped_gets_no_weight_gradient(self):
        torch.manual_seed(0)
        encoder = FeatureEncoder(1000, 8, dropout=0.0, input_dropout=0.7).train()
        encoder(torch.randn(1, 1000)).sum().backward()
        dropped = (encoder.get_parameter("1.weight").grad == 0).all(0)
        assert dropped.float().mean() == pytest.approx(0.7, abs=0.06)


class TestScaleWide:
    @pytest.mark.parametrize(("features", "gain"), [(512, 0.25), (32, 1.0), (8, 1.0)])
    def test_gain_of_wide_inputs(self, features, gain):
        encoder = FeatureEncoder(features, 16, hidden=32, scale_wide=True)
        assert (encoder.get_parameter("0.weight") == gain).all()
        normed = encoder[0](torch.randn(3, features))
        expected = gain * features**0.5  # no longer than the hidden vector of a narrow input
        torch.testing.assert_close(normed.norm(dim=1), torch.full((3,), expected), rtol=1e-3, atol=0)

    def test_off_unless_asked_for(self):
        assert (FeatureEncoder(512, 16).get_parameter("0.weight") == 1.0).all()


class TestBins:
    def test_place_in_every_bin(self):
        bins = QuantileBins(2, 2)
        bins.set_edges(torch.tensor([[0.0, 1.0, 3.0], [5.0, 5.0, 6.0]]), torch.full((2,), 1e-6))
        found = bins(torch.tensor([[-1.0, 5.0], [0.5, 5.5], [2.0, 5.001], [9.0, 9.0]]))
        # By feature, then by bin; that between the equal edges 5 and 5 is a step just above 5.
        expected = [[-1, -1, -1, -1], [0, -1, 1, 0], [1, 0, 1, -0.998], [1, 1, 1, 1]]
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-4)

    def test_any_piecewise_linear_function_is_a_linear_map_of_it(self):
        bins = QuantileBins(1, 4)
        edges = torch.tensor([[-2.0, -1.0, 0.5, 1.0, 2.0]])
        bins.set_edges(edges, torch.tensor([1e-6]))
        x = torch.linspace(-2, 2, 101)[:, None]
        steps = torch.cat([bins(x), torch.ones(101, 1)], 1)
        knots = torch.tensor([3.0, -1.0, 4.0, 0.0, 1.0])
        place = torch.searchsorted(edges[0], x[:, 0], right=True).clamp(1, 4)
        share = (x[:, 0] - edges[0, place - 1]) / (edges[0, place] - edges[0, place - 1])
        wanted = knots[place - 1] + share * (knots[place] - knots[place - 1])
        fitted = steps @ torch.linalg.lstsq(steps, wanted[:, None]).solution
        torch.testing.assert_close(fitted[:, 0], wanted, rtol=0, atol=1e-4)

    def test_hidden_units_read_both(self):
        torch.manual_seed(0)
        encoder = FeatureEncoder(3, 8, hidden=4, bins=5).eval()
        assert encoder.get_parameter("binned.weight").shape == (4, 15)
        x = torch.randn(6, 3)
        with torch.no_grad():
            hidden = torch.cat([encoder[1](encoder[0](x)), encoder.binned(encoder.bins(x))], 1)
            wanted = encoder[4](torch.nn.functional.gelu(hidden))
            torch.testing.assert_close(encoder(x), wanted)

    def test_input_dropout_reaches_them(self):
        torch.manual_seed(0)
        encoder = FeatureEncoder(50, 8, dropout=0.0, input_dropout=0.7, bins=20).train()
        encoder(torch.randn(1, 50)).sum().backward()
        dropped = (encoder.get_parameter("binned.weight").grad == 0).all(0)
        assert dropped.float().mean() == pytest.approx(0.7, abs=0.06)


class TestWholeInputs:
    def test_is_the_formula(self):
        torch.manual_seed(0)
        encoder = FeatureEncoder(12, 8, hidden=5, whole=True).double().eval()
        x = 2 * torch.randn(40, 12).double() + 1
        x[0, 0], x[1, 1] = 1e9, -1e3
        encoder.set_scaling(x[2:].mean(0), x[2:].std(0))
        encoder.set_row_scaling(x)
        scaled = (x - encoder.shift) / encoder.scale
        outside = scaled.abs() > 4
        assert outside[0, 0]
        assert outside[1, 1]
        scaled = torch.where(outside, scaled.sign() * (4 + torch.asinh(scaled.abs() - 4)), scaled)
        rows = torch.stack([scaled.mean(1), scaled.square().mean(1).sqrt()], 1)
        rows = (rows - rows.mean(0)) / rows.std(0, correction=0)
        rows = torch.where(rows.abs() > 4, rows.sign() * (4 + torch.asinh(rows.abs() - 4)), rows)
        hidden = encoder[1](torch.cat([encoder[0](scaled), rows], 1))
        wanted = encoder[4](torch.nn.functional.gelu(hidden))
        torch.testing.assert_close(encoder(x), wanted, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("features", [1, 2, 8])
    def test_few_features_are_read_as_they_are(self, features):
        torch.manual_seed(0)
        encoder = FeatureEncoder(features, 8, whole=True).eval()
        x = torch.randn(5, features)
        with torch.no_grad():
            wanted = encoder[4](torch.nn.functional.gelu(encoder[1](x)))
            torch.testing.assert_close(encoder(x), wanted)
        encoder.set_row_scaling(x)  # nothing to set
        assert not any(name.startswith("row") for name in encoder.state_dict())

    def test_what_layer_norm_takes_away_is_there(self):
        """A view of one feature, and a shift that all features share."""
        for features in (1, 20):
            torch.manual_seed(0)
            x = torch.randn(3, features)
            shifted = x + 1.0
            plain, whole = (FeatureEncoder(features, 8, whole=whole).eval() for whole in (False, True))
            torch.testing.assert_close(plain(shifted), plain(x), rtol=0, atol=1e-5)
            assert (whole(shifted) - whole(x)).abs().max() > 0.05

    def test_rows_are_not_dropped(self):
        torch.manual_seed(0)
        encoder = FeatureEncoder(1000, 8, dropout=0.0, input_dropout=0.7, whole=True).train()
        encoder(torch.randn(1, 1000)).sum().backward()
        dropped = (encoder.get_parameter("1.weight").grad == 0).all(0)
        assert dropped[:1000].float().mean() == pytest.approx(0.7, abs=0.06)
        assert not dropped[1000:].any()

    @pytest.mark.parametrize("bins", [0, 3])
    def test_in_the_model(self, bins, tmp_path):
        torch.manual_seed(0)
        model, batch = UMDA(make_config(whole_inputs=True, bins=bins, linear_path=True)).eval(), make_batch()
        for view, encoder in zip(VIEWS, model.encoders.encoders, strict=True):
            encoder.set_scaling(torch.zeros(view.width), torch.full((view.width,), 0.1))
            encoder.set_row_scaling(batch.views[view.name])
        total_loss(model, batch).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        model.save_pretrained(tmp_path)
        again = UMDA.from_pretrained(tmp_path).eval()
        with torch.no_grad():
            torch.testing.assert_close(again(**batch.inputs()).logits, model(**batch.inputs()).logits, rtol=0, atol=0)
            with torch.autocast("cpu", torch.bfloat16):
                rough = model(**batch.inputs()).logits
        for name, logits in again(**batch.inputs()).logits.items():
            assert (rough[name] - logits).abs().max() < 0.1

    def test_with_adapters(self):
        """An adapted layer has no weight of its own to ask for its dtype."""
        encoder = FeatureEncoder(40, 32, whole=True)
        add_adapters(encoder, rank=2)
        assert encoder(torch.randn(3, 40)).shape == (3, 32)


@pytest.mark.parametrize("scale_wide", [True, False])
@pytest.mark.parametrize("whole_inputs", [True, False])
def test_options_reach_the_encoders(scale_wide, whole_inputs):
    views = [ViewSpec("a", 9), ViewSpec("b", 20)]
    options = {"scale_wide": scale_wide, "whole_inputs": whole_inputs, "input_dropout": 0.25}
    model = UMDA(make_config(views=views, encoder_hidden=4, bins=3, **options))
    for view, encoder in zip(views, model.encoders.encoders, strict=True):
        assert encoder.bins.bins == 3
        assert encoder.input_dropout == 0.25
        gain = (4 / view.width) ** 0.5 if scale_wide else 1.0
        torch.testing.assert_close(encoder.get_parameter("0.weight"), torch.full((view.width,), gain))
        assert encoder.get_parameter("1.weight").shape == (4, view.width + 2 * whole_inputs)


def test_wide_and_whole_by_default():
    (encoder,) = UMDA(make_config(views=[ViewSpec("a", 20)], encoder_hidden=4)).encoders.encoders
    assert (encoder.get_parameter("0.weight") < 1.0).all()
    assert encoder.whole


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"input_dropout": 1.0}, ValueError, "input_dropout: expected at least 0 and below 1, got 1.0"),
        ({"scale_wide": 1}, TypeError, "scale_wide: expected a bool"),
        ({"bins": -1}, ValueError, "bins: expected at least 0, got -1"),
        ({"chunk": -1}, ValueError, "chunk: expected at least 0, got -1"),
    ],
)
def test_what_is_wrong_is_named(options, error, message):
    with pytest.raises(error, match=message):
        make_config(**options)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("input_dropout", [0.0, 0.4])
def test_gain_and_shift_in_the_weights_are_those_of_the_features(whole: bool, input_dropout: float) -> None:
    """The layer norm's, forward and backward, as PyTorch composes it; and where features are dropped as well."""
    torch.manual_seed(0)
    encoder = FeatureEncoder(11, 6, dropout=0.0, input_dropout=input_dropout, whole=whole).double()
    with torch.no_grad():
        encoder[0].weight.normal_()
        encoder[0].bias.normal_()
    features, shift = torch.randn(9, 11, dtype=torch.float64) * 3.0, torch.randn(6, dtype=torch.float64)
    torch.manual_seed(1)
    found = encoder(features, shift)
    torch.manual_seed(1)
    x = encoder.standardized(features)
    read = F.dropout(encoder[0](x), input_dropout)
    if whole:
        rows = torch.stack([x.mean(1), x.square().mean(1).sqrt()], 1)
        read = torch.cat([read, squash((rows - encoder.row_shift) / encoder.row_scale, encoder.LIMIT)], 1)
    expected = encoder[4](F.gelu(encoder[1](read))) + shift
    torch.testing.assert_close(found, expected)
    weights = list(encoder.parameters())
    cotangent = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, weights, cotangent), torch.autograd.grad(expected, weights, cotangent), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_squashing_bends_at_the_limit() -> None:
    x = torch.tensor([-30.0, -4.0, 0.5, 4.0, 6.0], dtype=torch.float64)
    expected = torch.tensor([-4.0 - math.asinh(26.0), -4.0, 0.5, 4.0, 4.0 + math.asinh(2.0)], dtype=torch.float64)
    torch.testing.assert_close(squash(x, 4.0), expected)
