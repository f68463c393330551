import math
from pathlib import Path

import pytest
import torch

from tests.small import small_config
from umda_fast.data import Bag, BagDataset
from umda_fast.errors import DataError
from umda_fast.model import TaskSpec, ViewSpec
from umda_fast.runtime.fabric import make_fabric
from umda_fast.runtime.guard import check_batch
from umda_fast.runtime.rundir import RunDirectory
from umda_fast.train import NonFiniteError, Trainer, build_model, train

VIEWS = (ViewSpec("a", 3), ViewSpec("b", 2))
TASKS = (TaskSpec("y", "binary"), TaskSpec("z", "regression"))


def _bags(count: int = 12, scale: float = 1.0) -> list[Bag]:
    generator = torch.Generator().manual_seed(0)
    return [
        Bag(
            f"bag-{index}",
            {
                "a": scale * torch.randn(4, 3, generator=generator),
                "b": scale * torch.randn(4, 2, generator=generator),
            },
            labels={"y": torch.tensor(float(index % 2)), "z": torch.tensor(float(index))},
        )
        for index in range(count)
    ]


def test_a_bad_feature_is_named() -> None:
    bags = _bags()
    bags[5].views["b"][2, 1] = math.inf
    bags[7].views["b"][0, 0] = math.nan
    batch = BagDataset(bags, VIEWS, TASKS).collate(bags)
    with pytest.raises(
        DataError, match=r"bag 'bag-5', view 'b': instance 2, feature 1 is inf.*2 bad instances"
    ):
        check_batch(batch)


def test_huge_finite_features_pass() -> None:
    bags = _bags(2)
    bags[0].views["a"][:] = 3e38
    check_batch(BagDataset(bags, VIEWS, TASKS).collate(bags))


def test_training_stops_at_a_bad_feature_with_the_weights_untouched(tmp_path: Path) -> None:
    bags = _bags()
    bags[3].views["a"][1, 2] = math.nan
    config = small_config(data={"budget": 1000}, train={"epochs": 1})
    with pytest.raises(DataError, match="bag 'bag-3', view 'a': instance 1, feature 2 is nan"):
        train(config, tmp_path / "run", datasets={"train": BagDataset(bags, VIEWS, TASKS)}, progress=False)
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("balancer", ["sgl", "none"])
def test_a_loss_that_is_not_finite_names_the_bag_and_leaves_the_weights(
    tmp_path: Path, balancer: str
) -> None:
    bags = _bags()
    bags[4].labels["z"] = torch.tensor(3e38)  # finite, its square is not
    dataset = BagDataset(bags, VIEWS, TASKS)
    config = small_config(data={"budget": 1000}, sgl={"balancer": balancer})
    torch.manual_seed(0)
    model = build_model(config, dataset)
    trainer = Trainer(
        config, model, {"train": dataset}, RunDirectory(tmp_path), make_fabric(config), progress=False
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match="loss of 'z'") as caught:
        trainer.fit()
    assert "step 0" in str(caught.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not (tmp_path / "checkpoint.pt").exists()


def test_logits_that_are_not_finite_name_their_bag(tmp_path: Path) -> None:
    dataset = BagDataset(_bags(), VIEWS, TASKS)
    config = small_config(data={"budget": 1000})
    model = build_model(config, dataset)

    def spoil(module: object, inputs: object, output: torch.Tensor) -> None:
        output.logits["y"] = output.logits["y"].clone()  # type: ignore[attr-defined]
        output.logits["y"][names.index("bag-9")] = math.nan  # type: ignore[attr-defined]

    trainer = Trainer(
        config, model, {"train": dataset}, RunDirectory(tmp_path), make_fabric(config), progress=False
    )
    names = next(iter(trainer.loader)).names
    trainer.sampler.resume_at(0, 0)
    model.register_forward_hook(spoil)
    with pytest.raises(NonFiniteError, match="bag 'bag-9' \\(logits of task 'y'\\)"):
        trainer.fit()
