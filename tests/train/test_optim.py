from itertools import pairwise

import pytest
import torch
from torch import nn

from umda_fast.train.optim import learning_rate_factor, parameter_groups


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
