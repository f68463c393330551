"""A slow self-guided learning in float64, written from docs/model.md with nothing of the package in it."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter


def flat_gradient(loss: Tensor, parameters: list[Parameter]) -> np.ndarray:
    """Gradient of one loss on all parameters, one vector, zeros where it does not reach."""
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    pieces = [
        np.zeros(p.numel()) if g is None else g.double().numpy().ravel()
        for p, g in zip(parameters, grads, strict=True)
    ]
    return np.concatenate(pieces)


class SlowSGL:
    """Steps 1 to 5 for T tasks with numpy loops; `rows` are the positions of the tasks present."""

    def __init__(
        self, tasks: int, *, beta: float = 0.9, loss_beta: float = 0.9, weight_beta: float = 0.9,
        alpha: float = 0.5, clip: float = 5.0, alignment: float = 0.5, project: bool = True,
    ) -> None:  # fmt: skip
        self.tasks, self.beta, self.loss_beta, self.weight_beta = tasks, beta, loss_beta, weight_beta
        self.alpha, self.clip, self.alignment, self.project = alpha, clip, alignment, project
        self.average: list[np.ndarray | None] = [None] * tasks
        self.count = [0] * tasks
        self.first: list[float | None] = [None] * tasks
        self.running: list[float] = [0.0] * tasks
        self.weight = [1.0] * tasks

    def smooth(self, rows: list[int], grads: list[np.ndarray]) -> None:
        for row, grad in zip(rows, grads, strict=True):
            old = self.average[row]
            self.average[row] = (1 - self.beta) * grad + (0 if old is None else self.beta * old)
            self.count[row] += 1

    def corrected(self, row: int) -> np.ndarray:
        average = self.average[row]
        assert average is not None
        return average / (1 - self.beta ** self.count[row])

    def gram(self, rows: list[int]) -> np.ndarray:
        return np.array([[self.corrected(s) @ self.corrected(t) for t in rows] for s in rows])

    def update(self, rows: list[int], losses: list[float], gram: np.ndarray) -> None:
        count = len(rows)
        for row, loss in zip(rows, losses, strict=True):
            if self.first[row] is None:
                self.first[row] = self.running[row] = loss
            else:
                self.running[row] = self.loss_beta * self.running[row] + (1 - self.loss_beta) * loss
        progress = np.array([self.running[r] / self.first[r] for r in rows])  # type: ignore[operator]
        rate = progress / progress.mean()
        norm = np.sqrt(np.diag(gram))
        cosine = gram / np.outer(norm, norm)
        strength = np.empty(count)
        for t in range(count):
            scale = min(max(norm.mean() * rate[t] ** self.alpha / norm[t], 1 / self.clip), self.clip)
            others = [cosine[s, t] for s in range(count) if s != t]
            strength[t] = scale * (1 + self.alignment * (np.mean(others) if others else 0))
        projected = strength.copy()
        if self.project and count > 1:
            projected[:] = 0
            for t in range(count):
                coefficient = np.eye(count)[t]  # of the unit gradients
                for _ in range(count):
                    against = [max(0.0, -coefficient @ cosine[:, s]) if s != t else 0.0 for s in range(count)]
                    squares, length = np.dot(against, against), against @ cosine @ against
                    coefficient = coefficient + min(1.0, squares / length if length > 0 else 1.0) * np.array(against)
                projected += strength[t] * coefficient * norm[t] / norm
            projected = np.minimum(projected, self.clip * strength)
        new = count * projected / projected.sum()
        for row, weight in zip(rows, new, strict=True):
            self.weight[row] = self.weight_beta * self.weight[row] + (1 - self.weight_beta) * weight

    def used(self, rows: list[int]) -> np.ndarray:
        weights = np.array([self.weight[row] for row in rows])
        return weights * len(rows) / weights.sum()


class TwoHeads(nn.Module):
    """A small trunk with T heads, an unused parameter and one that only a penalty reaches."""

    def __init__(self, tasks: int = 3, width: int = 7, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(5, 11), nn.Tanh(), nn.Linear(11, width))
        self.unused = Parameter(torch.zeros(3))
        self.penalized = Parameter(torch.ones(2))
        self.heads = nn.ModuleList([nn.Linear(width, 2) for _ in range(tasks)])
        self.to(dtype)

    def shared(self) -> list[Parameter]:
        return [*self.trunk.parameters(), self.unused, self.penalized]

    def own(self) -> list[Parameter]:
        return list(self.heads.parameters())

    def losses(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Losses by name, a penalty that touches trunk and heads, and the representation."""
        hidden = self.trunk(x)
        losses = {}
        for row, head in enumerate(self.heads):
            target = torch.sin(x[:, :2] * (row + 1)) * (3.0**row)
            losses[f"t{row}"] = (head(hidden) - target).square().mean()
        penalty = 0.1 * hidden.square().mean() + 0.3 * self.penalized.square().sum()
        penalty = (
            penalty + 0.01 * self.heads[0].weight.square().sum() + 0.02 * x.mean() * self.trunk[0].bias.sum()
        )
        return losses, penalty, hidden
