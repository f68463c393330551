"""Self-guided learning inside a LightningModule; seconds on a laptop. Needs `pip install pytorch-lightning`.

    python examples/lightning_module.py
    python examples/lightning_module.py --devices 2          # the same batches, dealt out between two processes

Two tasks read one vector: a sum, and a product that is ten times as large. Optimisation is manual, because
self-guided learning takes gradients task by task; everything else is Lightning's. With the package `lightning`,
import `lightning.pytorch` instead.
"""

from __future__ import annotations

import argparse
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from umda_fast.sgl import SelfGuided


class Guided(pl.LightningModule):
    """A trunk, two heads, and self-guided learning between them."""

    def __init__(
        self, width: int = 32, lr: float = 1e-2, batch: int = 64, scope: str = "shared_parameters"
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.trunk = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.heads = nn.ModuleDict({"sum": nn.Linear(width, 1), "product": nn.Linear(width, 1)})
        self.saved: dict[str, Any] | None = None

    def setup(self, stage: str) -> None:
        # Here, and not before: only now is the process group there, if several processes train.
        self.sgl = SelfGuided(
            self.trunk.parameters(),
            tasks=list(self.heads),
            task_parameters=self.heads.parameters(),
            scope=self.hparams["scope"],
            direction="gradient",
            process_group=dist.group.WORLD if dist.is_initialized() else None,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        # In the order of the rows, so that two processes see the batches of one; Lightning's own sampler shuffles.
        rows, together = data(), dist.is_initialized()
        sampler: Any = DistributedSampler(rows, shuffle=False) if together else None
        size = self.hparams["batch"] // (dist.get_world_size() if together else 1)
        return DataLoader(rows, batch_size=size, sampler=sampler)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])

    def training_step(self, batch: list[Tensor], index: int) -> None:
        x, *targets = batch
        z = self.trunk(x)
        losses = {
            task: nn.functional.mse_loss(head(z), target)
            for (task, head), target in zip(self.heads.items(), targets, strict=True)
        }
        # Here all processes have as many labels; `counts` is for when they do not.
        counts = dict.fromkeys(losses, float(len(x)))
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        step = self.sgl.backward(losses, counts=counts, representation=z)
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()
        self.log_dict({f"loss/{task}": loss for task, loss in losses.items()}, sync_dist=True)
        self.log_dict({f"weight/{task}": weight for task, weight in zip(losses, step.weights, strict=True)})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["sgl"] = self.sgl.state_dict()  # every process calls it

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.saved = checkpoint["sgl"]  # the model may not be on its device yet

    def on_train_start(self) -> None:
        if self.saved is not None:
            self.sgl.load_state_dict(self.saved)


class BareStrategy(DDPStrategy):
    """Lightning's processes without DistributedDataParallel around the module: `SelfGuided` adds up the gradients
    itself, and DistributedDataParallel cannot be asked for those of single tasks."""

    def configure_ddp(self) -> None:
        """Nothing: the seed gives all processes the same weights."""


def data(rows: int = 512, seed: int = 0) -> TensorDataset:
    """x [rows, 4] and the targets [rows, 1] of the two tasks."""
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x.sum(1, keepdim=True), 10 * x[:, :1] * x[:, 1:2])


def fit(
    model: Guided, epochs: int, devices: int = 1, checkpoint: str | None = None, directory: str | None = None
) -> pl.Trainer:
    """Train `model` on the CPU, its batches dealt out among `devices` processes."""
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=devices,
        strategy=BareStrategy() if devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
    )
    trainer.fit(model, ckpt_path=checkpoint)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=60)
    arguments = parser.parse_args()
    pl.seed_everything(0)
    model = Guided()
    trainer = fit(model, arguments.epochs, arguments.devices)
    if trainer.is_global_zero:
        print({name: round(float(value), 4) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
