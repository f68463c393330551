"""Self-guided learning inside a LightningModule: the example, held to a plain loop."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.processes import run_together
from umda_fast.sgl import SelfGuided

pytest.importorskip("pytorch_lightning")  # in the extra `dev`

_SPEC = importlib.util.spec_from_file_location(
    "lightning_module", Path(__file__).parents[2] / "examples" / "lightning_module.py"
)
assert _SPEC is not None
example: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(example)  # type: ignore[union-attr]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def make(scope: str = "shared_parameters") -> Any:
    torch.manual_seed(0)
    return example.Guided(scope=scope)


def by_hand(epochs: int, scope: str) -> dict[str, Tensor]:
    model = make(scope)
    sgl = SelfGuided(
        model.trunk.parameters(),
        list(model.heads),
        task_parameters=model.heads.parameters(),
        scope=scope,  # type: ignore[arg-type]
        direction="gradient",
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(epochs):
        for x, *targets in zip(*(values.split(64) for values in example.data().tensors), strict=True):
            z = model.trunk(x)
            losses = {
                name: nn.functional.mse_loss(model.heads[name](z), target)
                for name, target in zip(model.heads, targets, strict=True)
            }
            optimizer.zero_grad()
            sgl.backward(losses, representation=z)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("scope", ["shared_parameters", "representation"])
def test_it_is_the_plain_loop_bit_for_bit(scope: str, tmp_path: Path) -> None:
    model = make(scope)
    trainer = example.fit(model, 2, directory=str(tmp_path))
    assert_equal(model.state_dict(), by_hand(2, scope))
    assert {"loss/sum", "loss/product", "weight/sum", "weight/product"} <= set(trainer.callback_metrics)


def test_a_checkpoint_of_lightning_continues_bit_for_bit(tmp_path: Path) -> None:
    model = make()
    example.fit(model, 2, directory=str(tmp_path)).save_checkpoint(tmp_path / "half.ckpt")
    resumed = make()
    example.fit(resumed, 4, checkpoint=str(tmp_path / "half.ckpt"), directory=str(tmp_path))
    assert_equal(resumed.state_dict(), by_hand(4, "shared_parameters"))


def trained(devices: int, place: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and running gradients after two epochs in float64."""
    rows = example.data().tensors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "data", lambda: TensorDataset(*(values.double() for values in rows)))
        model = make().double()
        example.fit(model, 2, devices, directory=place)
    return dict(model.state_dict()), model.sgl.state_dict()["tensors"]


def test_two_processes_of_lightning_are_one(tmp_path: Path) -> None:
    alone = trained(1, str(tmp_path))
    first, second = run_together(trained, 2, 2, str(tmp_path))
    for part, other, whole in zip(first, second, alone, strict=True):
        assert_equal(part, other)
        for name, value in whole.items():
            worst = float((part[name].double() - value.double()).abs().max())
            assert worst <= torch.finfo(torch.float32).eps * float(value.double().abs().max()), name
