import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from umda_fast.runtime.config import TrainConfig
from umda_fast.train.optim import (
    WeightAverage,
    learning_rate_factor,
    make_optimizer,
    parameter_groups,
    restore_optimizer,
)


def test_only_matrices_decay() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)
            self.norm = nn.LayerNorm(4)
            self.table = nn.Embedding(5, 4)
            self.view_embedding = nn.Parameter(torch.zeros(2, 4))
            self.influence_bias = nn.Parameter(torch.zeros(2, 3, 3))
            self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)

    model = Model()
    decayed, kept = parameter_groups(model, 0.1)
    assert decayed["betas"] == kept["betas"] == (0.9, 0.999)
    assert [id(p) for p in decayed["params"]] == [id(model.linear.weight)]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert len(kept["params"]) == 6


def test_gradients_that_are_running_means_get_no_second_one() -> None:
    model = nn.ModuleDict({"shared": nn.Linear(3, 4), "head": nn.Linear(4, 1)})
    groups = parameter_groups(model, 0.1, model["shared"].parameters())
    betas = {id(p): group["betas"][0] for group in groups for p in group["params"]}
    assert {betas[id(p)] for p in model["shared"].parameters()} == {0.0}
    assert {betas[id(p)] for p in model["head"].parameters()} == {0.9}
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0, 0.0]


def test_the_learning_rate_rises_then_falls_along_a_cosine() -> None:
    factors = [learning_rate_factor(i / 1000, 0.1, 0.01) for i in range(1001)]
    assert factors[0] == 0.0
    assert factors[50] == pytest.approx(0.5)
    assert max(factors) == factors[100] == 1.0
    assert factors[550] == pytest.approx(0.505)
    assert factors[-1] == pytest.approx(0.01)
    assert all(b <= a for a, b in pairwise(factors[100:]))
    assert learning_rate_factor(0.0, 0.0, 0.1) == 1.0


def trained(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def layers() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(300, 200), nn.Linear(200, 7)])


@pytest.mark.parametrize("threads", [1, 2])
def test_fused_adamw_is_adamw_on_any_number_of_threads(threads: int) -> None:
    ours, plain, alone = layers(), layers(), layers()
    options = TrainConfig()
    fused = make_optimizer(ours, options)
    assert fused.defaults["fused"]
    other = torch.optim.AdamW(parameter_groups(plain, options.weight_decay), lr=options.lr, foreach=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        trained(fused, list(ours.parameters()), range(5))
        torch.set_num_threads(1)
        trained(make_optimizer(alone, options), list(alone.parameters()), range(5))
    finally:
        torch.set_num_threads(before)
    trained(other, list(plain.parameters()), range(5))
    for one, same, near in zip(ours.parameters(), alone.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, same)
        torch.testing.assert_close(one, near)


def test_the_state_of_an_optimiser_that_was_not_fused_is_continued() -> None:
    """As a checkpoint from before has it."""
    model, options = layers(), TrainConfig()
    before = torch.optim.AdamW(parameter_groups(model, options.weight_decay), lr=options.lr)
    trained(before, list(model.parameters()), range(3))
    expected = layers()
    expected.load_state_dict(model.state_dict())
    after = make_optimizer(expected, options)
    restore_optimizer(after, copy.deepcopy(before.state_dict()))
    assert all(group["fused"] for group in after.param_groups)
    trained(before, list(model.parameters()), range(3, 6))
    trained(after, list(expected.parameters()), range(3, 6))
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_the_mean_of_the_weights_and_the_latest_buffers() -> None:
    model = nn.BatchNorm1d(3)
    average = WeightAverage(model, 0.75)
    weights = []
    for value in (1.0, 2.0, 5.0):
        with torch.no_grad():
            model.weight.fill_(value)
            model.running_mean.fill_(-value)
            model.num_batches_tracked.fill_(int(value))
        average.update_parameters(model)
        weights.append(average.module.weight[0].item())
    assert weights == [1.0, 1.25, 0.75 * 1.25 + 0.25 * 5.0]
    assert average.module.running_mean[0].item() == -5.0
    assert average.module.num_batches_tracked.item() == 5
    assert average.n_averaged.item() == 3


def test_a_loaded_mean_goes_on_from_its_number_of_updates() -> None:
    model = nn.Linear(1, 1, bias=False)
    first, second = WeightAverage(model, "auto"), WeightAverage(model, "auto")
    for value in (1.0, 2.0, 5.0):
        with torch.no_grad():
            model.weight.fill_(value)
        first.update_parameters(model)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        model.weight.fill_(9.0)
    before = first.module.weight.item()
    for average in (first, second):
        average.update_parameters(model)
        assert average.n_averaged.item() == 4
        assert average.module.weight.item() == pytest.approx(before + (1 - 4 / 13) * (9.0 - before), rel=1e-6)
