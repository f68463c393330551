"""knn on the CPU against faiss (if installed) and torch: ``python -m bench.bench_knn``.

Floor: n^2 * d / 2 multiply-adds, for a bag with itself is symmetric; a library's search does n^2 * d.
"""

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

import umda_fast.ops  # noqa: F401  (defines the operations)
from bench.harness import arguments, medians, report, sgemm_rate

try:
    import faiss
except ImportError:
    faiss = None

WIDTH, DEGREE = 256, 16


def ours(x: Tensor, ptr: Tensor, k: int, metric: str) -> Any:
    return torch.ops.umda_fast.knn(x, ptr, k, metric)


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
    if faiss is not None:
        faiss.omp_set_num_threads(options.threads)
    workloads = {
        "one bag of 10,000": [int(10_000 * options.size)],
        "one bag of 50,000": [int(50_000 * options.size)],
        "100 bags of 10 to 1,000": [10 + 10 * i for i in range(100)],
        "5,000 bags of 12": [12] * 5000,
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
        report(f"{title}, d = {WIDTH}, k = {DEGREE}", seconds, notes)


if __name__ == "__main__":
    main()
