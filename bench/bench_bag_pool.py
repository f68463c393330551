"""bag_pool on the CPU: ``python -m bench.bench_bag_pool``.

Floor: forward reads z once for all tasks; backward reads z and writes dz. Baselines: a loop over ``split()``
(one matrix product per bag, for one task, eight times for eight tasks, and once for all eight), and
torch_geometric's softmax + scatter where it is installed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from umda_fast.ops import bag_attention_pool
from umda_fast.reference.bag_pool import bag_pool as reference

from .harness import arguments, medians, report, require_parity, traffic_note

try:
    from torch_geometric.utils import scatter
    from torch_geometric.utils import softmax as segment_softmax
except ImportError:
    scatter = None

WIDTH = 256
Pool = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(z: Tensor, scores: Tensor, ptr: Tensor) -> Tensor:
    return bag_attention_pool(z, scores, ptr, backend="cpp").pooled


def split_loop(z: Tensor, scores: Tensor, ptr: Tensor) -> Tensor:
    sizes = ptr.diff().tolist()
    bags = zip(z.split(sizes), scores.split(sizes), strict=True)
    return torch.stack([torch.softmax(s, 0).T @ x for x, s in bags])


def task_by_task(z: Tensor, scores: Tensor, ptr: Tensor) -> Tensor:
    return torch.cat([split_loop(z, s, ptr) for s in scores.split(1, dim=1)], 1)


def geometric(z: Tensor, scores: Tensor, ptr: Tensor) -> Tensor:
    index = torch.repeat_interleave(torch.arange(ptr.shape[0] - 1), ptr.diff())
    weights = segment_softmax(scores, index, num_nodes=ptr.shape[0] - 1)
    return torch.stack([scatter(w[:, None] * z, index, reduce="sum") for w in weights.unbind(1)], 1)


def both(pool: Pool, z: Tensor, scores: Tensor, ptr: Tensor, d_pooled: Tensor) -> list[Tensor]:
    leaves = [z.detach().requires_grad_(), scores.detach().requires_grad_()]
    pooled = pool(*leaves, ptr)
    return [pooled.detach(), *torch.autograd.grad(pooled, leaves, d_pooled)]


def inputs(sizes: Tensor, tasks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    n = int(sizes.sum())
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    z, scores = torch.randn(n, WIDTH, generator=generator), torch.randn(n, tasks, generator=generator)
    return z, scores, ptr, torch.randn(sizes.shape[0], tasks, WIDTH, generator=generator)


def ragged(bags: int, instances: int) -> Tensor:
    share = torch.rand(bags, generator=torch.Generator().manual_seed(1)) + 0.1
    sizes = (share / share.sum() * instances).long()
    sizes[-1] += instances - sizes.sum()
    return sizes


def check() -> None:
    z, scores, ptr, d_pooled = inputs(ragged(9, 4000), 8)

    def composed(dtype: torch.dtype) -> list[Tensor]:
        return both(lambda *a: reference(*a)[0], z.to(dtype), scores.to(dtype), ptr, d_pooled.to(dtype))

    found = both(ours, z, scores, ptr, d_pooled)
    require_parity("bag_pool", found, composed(torch.float64), composed(torch.float32))


def main() -> None:
    options = arguments(__doc__ or "")
    check()
    n = int(200_000 * options.size)
    for title, sizes in {
        "64 ragged bags": ragged(64, n),
        "one bag": torch.tensor([n]),
        f"{n // 10:,} bags of 10": torch.full((n // 10,), 10),
    }.items():
        for tasks in (1, 8):
            z, scores, ptr, d_pooled = inputs(sizes, tasks)
            pools: dict[str, Pool] = {"umda_fast": ours}
            if sizes.shape[0] < 1000:
                pools["split loop"] = split_loop
                if tasks > 1:
                    pools[f"split loop, {tasks} times"] = task_by_task
            if scatter is not None:
                pools["torch_geometric softmax + scatter"] = geometric
            for direction, least in (("forward", 1), ("forward + backward", 3)):
                contenders = {
                    name: (
                        (lambda p=pool, a=(z, scores, ptr): p(*a))
                        if direction == "forward"
                        else (lambda p=pool, a=(z, scores, ptr, d_pooled): both(p, *a))
                    )
                    for name, pool in pools.items()
                }
                seconds = medians(contenders, options.repeats)
                notes = {name: traffic_note(least * z.nbytes, s, options.copy) for name, s in seconds.items()}
                report(f"{title}, {n:,} x {WIDTH} in all, T = {tasks}: {direction}", seconds, notes)


if __name__ == "__main__":
    main()
