"""knn on the CPU against faiss (if installed) and torch: ``python -m bench.bench_knn``.

Floor: n^2 * d / 2 multiply-adds, for a bag with itself is symmetric; a library's search does n^2 * d.
"""

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from umda_fast.ops import knn_graph
from umda_fast.reference.knn import knn as reference

from .harness import arguments, medians, report, sgemm_rate

try:
    import faiss
except ImportError:
    faiss = None

WIDTH, DEGREE = 256, 16


def ours(x: Tensor, ptr: Tensor, k: int, metric: str) -> Any:
    return knn_graph(x, ptr, k, metric=metric, backend="cpp")


def check() -> None:
    """Small integers: every similarity is exact in float32, so even ties have to agree."""
    generator = torch.Generator().manual_seed(0)
    ptr = torch.tensor([0, 700, 701, 2000])
    x = torch.randint(-2, 3, (2000, 20), generator=generator).float()
    signs = torch.randint(0, 2, (2000, 16), generator=generator) * 2.0 - 1
    for metric, points in (("euclidean", x), ("cosine", signs)):
        found, exact = ours(points, ptr, DEGREE, metric), reference(points, ptr, DEGREE, metric)
        if not (torch.equal(found.neighbors, exact[0]) and torch.equal(found.similarity, exact[1])):
            raise SystemExit(f"knn, {metric}: not the reference's neighbours; nothing was timed")


def torch_topk(x: Tensor, ptr: Tensor, k: int, rows: int = 1024) -> list[tuple[Tensor, Tensor]]:
    """Cosine by chunks of rows: matrix product, then topk without the row itself."""
    x = torch.nn.functional.normalize(x, dim=1)
    results = []
    for start, end in pairwise(ptr.tolist()):
        bag = x[start:end]
        for first in range(0, end - start, rows):
            products = bag[first : first + rows] @ bag.T
            products.diagonal(offset=first).fill_(-2)
            values, index = products.topk(min(k, end - start - 1), dim=1)
            results.append((values, index + start))
    return results


def faiss_search(x: Tensor, ptr: Tensor, k: int, metric: str) -> list[Any]:
    """A flat index per bag, asked for one more neighbour: the row finds itself."""
    if metric == "cosine":
        x = torch.nn.functional.normalize(x, dim=1)
    results = []
    for start, end in pairwise(ptr.tolist()):
        bag = x[start:end].numpy()
        index = faiss.IndexFlatIP(x.shape[1]) if metric == "cosine" else faiss.IndexFlatL2(x.shape[1])
        index.add(bag)
        results.append(index.search(bag, min(k + 1, end - start)))
    return results


def main() -> None:
    options = arguments(__doc__ or "")
    check()
    if faiss is not None:
        faiss.omp_set_num_threads(options.threads)
    workloads = {
        "one bag": [int(10_000 * options.size)],
        "one large bag": [int(50_000 * options.size)],
        "bags of 10 to 1,000": [10 + 10 * i for i in range(100)] * max(1, round(options.size)),
        "bags of 12": [12] * int(5000 * options.size),
    }
    for title, sizes in workloads.items():
        ptr = torch.tensor([0, *accumulate(sizes)])
        x = torch.randn(sum(sizes), WIDTH, generator=torch.Generator().manual_seed(0))
        contenders = {"umda_fast cosine": lambda x=x, ptr=ptr: ours(x, ptr, DEGREE, "cosine")}
        contenders["umda_fast euclidean"] = lambda x=x, ptr=ptr: ours(x, ptr, DEGREE, "euclidean")
        if faiss is not None:
            contenders["faiss IndexFlatIP"] = lambda x=x, ptr=ptr: faiss_search(x, ptr, DEGREE, "cosine")
            contenders["faiss IndexFlatL2"] = lambda x=x, ptr=ptr: faiss_search(x, ptr, DEGREE, "euclidean")
        contenders["torch mm + topk, chunked, cosine"] = lambda x=x, ptr=ptr: torch_topk(x, ptr, DEGREE)
        seconds = medians(contenders, options.repeats if sum(sizes) < 40_000 else min(3, options.repeats))
        pairs = sum(n * (n - 1) // 2 for n in sizes) * WIDTH * 2
        whole = sum(n * n for n in sizes) * WIDTH * 2
        rate = sgemm_rate()
        notes = {
            name: f"{(pairs if name.startswith('umda') else whole) / s / 1e9:7.0f} GFLOP/s done, "
            f"{whole / s / rate:5.0%} of sgemm counting all products"
            for name, s in seconds.items()
        }
        report(f"{title} ({sum(sizes):,} instances), d = {WIDTH}, k = {DEGREE}", seconds, notes)


if __name__ == "__main__":
    main()
