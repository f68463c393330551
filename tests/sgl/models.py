"""Tiny models drawn at random, of all that PyTorch's `backward` takes: what `SelfGuided` has to train as it does."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

WIDTH = 4
TASKS = ("a", "b", "c")


class Convolution(nn.Module):
    def __init__(self, channels_last: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3)
        self.out = nn.Linear(3, WIDTH)
        if channels_last:
            self.conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        image = torch.stack([x, x.cos()], 1).reshape(len(x), 2, 2, 2)
        return self.out(self.norm(self.conv(image)).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        return x + self.attention(z[None], z[None], z[None], need_weights=False)[0][0]


class Lookup(nn.Module):
    def __init__(self, sparse: bool, bag: bool) -> None:
        super().__init__()
        kind = nn.EmbeddingBag if bag else nn.Embedding
        self.table = kind(6, WIDTH, sparse=sparse, **({"mode": "sum"} if bag else {}))
        self.bag = bag

    def forward(self, x: Tensor) -> Tensor:
        index = (10 * x[:, 0].detach()).abs().long() % 4
        return x + self.table(index[:, None] if self.bag else index)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cell = kind(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x[:, None])[0][:, 0]


class Fourier(nn.Module):
    """A complex weight, beside a real parameter of an odd size."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = Parameter(torch.randn(3))
        self.weight = Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.cdouble))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * self.weight, WIDTH) + self.odd.sum()


class LowRank(nn.Module):
    """A frozen layer with an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class Recomputed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def _run(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._run, x, use_reentrant=False)


class Narrow(nn.Module):
    """A block of another precision."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH, dtype=torch.float32), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.float()).to(x.dtype)


class Wave(nn.Module):
    """A complex linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, dtype=torch.cdouble)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(torch.cdouble)).abs()


class Unusual(nn.Module):
    """Parameters with gaps in memory, of no dimension and transposed, and one that nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.gaps = Parameter(torch.randn(WIDTH, 2 * WIDTH)[:, ::2])
        self.transposed = Parameter(torch.randn(WIDTH, WIDTH).T)
        self.scale = Parameter(torch.randn(()))
        self.unused = Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x @ self.gaps) @ self.transposed


#: What a row gives depends on others there.
AMONG_ROWS = {"convolution", "channels_last", "attention", "lstm", "gru"}
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()),
    "convolution": lambda: Convolution(False),
    "channels_last": lambda: Convolution(True),
    "attention": Attention,
    "embedding": lambda: Lookup(False, False),
    "sparse": lambda: Lookup(True, False),
    "sparse_bag": lambda: Lookup(True, True),
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "complex": Fourier,
    "wave": Wave,
    "float32": Narrow,
    "lora": LowRank,
    "tied": Tied,
    "checkpoint": lambda: Recomputed(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "unusual": Unusual,
}


@dataclass
class Calls:
    """What hooks saw: of leaves, and of what lies between, (name, gradient) each."""

    leaves: list[tuple[str, Tensor]] = field(default_factory=list)
    between: list[tuple[str, Tensor]] = field(default_factory=list)


class Drawn(nn.Module):
    """A model of a seed: two or three blocks, heads of two or three tasks, hooks, prompts, things frozen."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float64)
        try:
            self._build(draw)
        finally:
            torch.set_default_dtype(torch.float32)

    def _build(self, draw: random.Random) -> None:
        self.names = draw.choices(list(BLOCKS), k=draw.choice((2, 3)))
        self.blocks = nn.ModuleList(BLOCKS[name]() for name in self.names)
        self.tasks = TASKS[: draw.choice((2, 2, 3))]
        self.heads = nn.ModuleDict({task: nn.Linear(WIDTH, 2) for task in self.tasks})
        self.early = draw.random() < 0.3  # one task leaves before the last block
        self.prompt = torch.randn(WIDTH, requires_grad=draw.random() < 0.4)
        self.watched = draw.random() < 0.3  # gradients on the input too
        self.penalty = draw.random() < 0.3
        self.calls = Calls()
        self.hooks = draw.random() < 0.6
        self.retained: Tensor | None = None
        shared = [p for p in self.blocks.parameters() if p.requires_grad]
        if draw.random() < 0.3:
            draw.choice(shared).requires_grad_(len(shared) == 1)
        self.later = draw.choice(shared) if draw.random() < 0.3 and len(shared) > 1 else None
        if self.hooks:
            self._add_hooks(draw)

    def _add_hooks(self, draw: random.Random) -> None:
        calls, named = self.calls, [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        self.kept: list[Any] = []  # nodes that are not kept lose their hooks
        for name, p in draw.sample(named, min(4, len(named))):
            kind = draw.randrange(5)
            if kind == 0:
                p.register_hook(lambda g, name=name: calls.leaves.append((f"tensor {name}", g.clone())))
            elif kind == 1:
                p.register_hook(lambda g: g * 0.5 if g.is_sparse else g.clone() * 0.5)
            elif kind == 2:
                p.register_post_accumulate_grad_hook(
                    lambda p, name=name: calls.leaves.append((f"after {name}", p.grad.clone()))
                )
            elif kind == 3:
                node = torch.autograd.graph.get_gradient_edge(p).node
                self.kept.append(node)
                node.register_prehook(lambda gs, name=name: calls.leaves.append((f"before {name}", gs[0].clone())))
            else:
                node = torch.autograd.graph.get_gradient_edge(p).node
                self.kept.append(node)
                node.register_hook(lambda _, gs, name=name: calls.leaves.append((f"node {name}", gs[0].clone())))
        if draw.random() < 0.5:
            self.blocks[-1].register_full_backward_hook(lambda m, i, o: calls.between.append(("module", o[0].clone())))

    def forward(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """Losses and a penalty."""
        z, before = x + self.prompt, x
        for block in self.blocks:
            before, z = z, block(z)
        if self.hooks:
            z.retain_grad()
            z.register_hook(lambda g: self.calls.between.append(("hidden", g.clone())))
            self.retained = z
        losses = {}
        for number, (task, head) in enumerate(self.heads.items()):
            out = head(before if self.early and number == 0 else z)
            losses[task] = F.mse_loss(out, torch.full_like(out, number)) * 3.0**number
        penalty = 0.1 * (z.square().mean() + sum(p.abs().square().sum() for p in self.blocks[0].parameters()))
        return losses, penalty if self.penalty else None

    @property
    def precision(self) -> float:
        """Relative, of the coarsest parameter."""
        return max(torch.finfo(p.dtype).eps for p in self.parameters())

    def shared(self) -> list[Tensor]:
        return list(self.blocks.parameters())

    def leaves(self, x: Tensor) -> dict[str, Tensor]:
        """All that may get a gradient, by name."""
        return {**dict(self.named_parameters()), "prompt": self.prompt, "input": x}
