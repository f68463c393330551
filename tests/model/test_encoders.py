import pytest
import torch

from tests.model.conftest import make_config
from umda_fast import UMDA
from umda_fast.model import FeatureEncoder


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


def test_options_reach_the_encoders():
    model = UMDA(make_config(input_dropout=0.25, scale_wide=True, encoder_hidden=4))
    for encoder in model.encoders.encoders:
        assert encoder.input_dropout == 0.25
        assert (encoder.get_parameter("0.weight") < 1.0).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"input_dropout": 1.0}, ValueError, "input_dropout: expected at least 0 and below 1, got 1.0"),
        ({"scale_wide": 1}, TypeError, "scale_wide: expected a bool"),
        ({"chunk": -1}, ValueError, "chunk: expected at least 0, got -1"),
    ],
)
def test_what_is_wrong_is_named(options, error, message):
    with pytest.raises(error, match=message):
        make_config(**options)
