"""bag_pool against loops over bags, with empty bags, long bags and extreme scores."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.reference._checks import check_gradients, check_repeats, leaf, same_bits, with_gradients
from umda_fast.reference import bag_pool as module
from umda_fast.reference.bag_pool import bag_pool

POINTERS = [[0, 3, 3, 4, 9], [0, 0, 5, 9, 9], [0, 9], [0, 0, 0, 9, 9, 9]]


def loops(z: Tensor, scores: Tensor, ptr: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    bags, tasks = len(ptr) - 1, scores.shape[1]
    pooled = torch.zeros(bags, tasks, z.shape[1], dtype=z.dtype)
    entropy = torch.zeros(bags, tasks, dtype=z.dtype)
    lse = torch.full((bags, tasks), -math.inf, dtype=z.dtype)
    for b in range(bags):
        for t in range(tasks):
            rows = range(ptr[b], ptr[b + 1])
            if rows:
                weight = [math.exp(float(scores[i, t])) for i in rows]
                lse[b, t] = math.log(math.fsum(weight))
                for i, w in zip(rows, weight, strict=True):
                    a = w / math.fsum(weight)
                    pooled[b, t] += a * z[i]
                    entropy[b, t] -= a * math.log(a)
    return pooled, entropy, lse


def call(ptr: list[int]) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    return lambda z, scores: bag_pool(z, scores, torch.tensor(ptr))


def finite(ptr: list[int]) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    def function(z: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
        pooled, entropy, lse = bag_pool(z, scores, torch.tensor(ptr))
        return pooled, entropy, lse.masked_fill(lse == -math.inf, 0.0)  # finite differences of -inf are NaN

    return function


@pytest.mark.parametrize("ptr", POINTERS)
@pytest.mark.parametrize(("width", "tasks"), [(1, 1), (5, 3)])
@pytest.mark.parametrize("chunk", [1, 2, 256])
def test_equals_the_formula(
    monkeypatch: pytest.MonkeyPatch, ptr: list[int], width: int, tasks: int, chunk: int
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    z, scores = leaf(9, width), leaf(9, tasks, seed=1)
    for got, want in zip(call(ptr)(z, scores), loops(z.detach(), scores.detach(), ptr), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("ptr", POINTERS)
@pytest.mark.parametrize("chunk", [2, 256])
def test_derivatives(monkeypatch: pytest.MonkeyPatch, ptr: list[int], chunk: int) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    check_gradients(finite(ptr), [leaf(9, 3), leaf(9, 2, seed=1)])


@pytest.mark.parametrize("output", [0, 1, 2])
def test_derivatives_of_one_output(output: int) -> None:
    check_gradients(
        lambda *x: finite([0, 4, 4, 9])(*x)[output], [leaf(9, 3), leaf(9, 2, seed=1)], twice=False
    )


def test_extreme_scores() -> None:
    z = leaf(8, 3, dtype=torch.float32)
    scores = torch.tensor([[1e4], [-1e4], [0.0], [-math.inf], [0.0], [-math.inf], [-math.inf], [1e30]])
    (pooled, entropy, lse), gradients = with_gradients(call([0, 3, 5, 7, 8]), [z, scores])
    torch.testing.assert_close(pooled[:, 0], torch.stack([z[0], z[4], torch.zeros(3), z[7]]).detach())
    assert entropy.tolist() == [[0], [0], [0], [0]]
    assert lse.tolist() == [[1e4], [0], [-math.inf], [torch.tensor(1e30).item()]]
    for gradient in gradients:
        assert gradient.isfinite().all()


def test_nan_stays_in_its_bag() -> None:
    z, scores = leaf(9, 3).detach(), leaf(9, 2, seed=1).detach()
    want, want_gradients = with_gradients(call([0, 4, 9]), [z, scores])
    for broken in (0, 1):
        arguments = [z.clone(), scores.clone()]
        arguments[broken][2, 0] = math.nan
        outputs, gradients = with_gradients(call([0, 4, 9]), arguments)
        assert outputs[0][0].isnan().any()
        assert same_bits([x[1:] for x in outputs], [x[1:] for x in want])
        assert same_bits([x[4:] for x in gradients], [x[4:] for x in want_gradients])


def test_order_inside_a_bag_does_not_matter() -> None:
    z, scores = leaf(9, 3).detach(), leaf(9, 2, seed=1).detach()
    order = torch.tensor([2, 0, 3, 1, 8, 6, 7, 5, 4])
    for got, want in zip(call([0, 4, 9])(z[order], scores[order]), call([0, 4, 9])(z, scores), strict=True):
        torch.testing.assert_close(got, want)


def test_long_bags_stay_accurate() -> None:
    """One bag of 300,000 among small ones: the error of float32 does not grow with the bag.

    Held to twice the error of PyTorch's own composition on that bag alone, which adds in a tree.
    """
    ptr = [0, 3, 300003, 300010]
    z = leaf(300010, 2, dtype=torch.float32).detach() + 1
    scores = leaf(300010, 1, seed=1, dtype=torch.float32).detach()
    a, log_a = scores[3:300003].softmax(0), scores[3:300003].log_softmax(0)
    composed = ((a * z[3:300003]).sum(0), -(a * log_a).sum(0), scores[3:300003].logsumexp(0))
    ulp = torch.finfo(torch.float32).eps
    for got, want, other in zip(
        call(ptr)(z, scores), call(ptr)(z.double(), scores.double()), composed, strict=True
    ):
        exact = want[1].reshape(-1)
        error = (got[1].reshape(-1) - exact).abs().max()
        assert error <= 2 * (other - exact).abs().max() + 4 * ulp * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    z, scores = leaf(9, 3, dtype=dtype).detach(), leaf(9, 2, seed=1, dtype=dtype).detach()
    got = call([0, 4, 9])(z, scores)
    want = call([0, 4, 9])(z.float(), scores.float())
    assert same_bits(got, [want[0].to(dtype), *want[1:]])
    assert [x.dtype for x in with_gradients(call([0, 4, 9]), [z, scores])[1]] == [dtype, dtype]


@pytest.mark.parametrize(("ptr", "tasks"), [([0], 2), ([0, 0], 2), ([0, 0, 0], 1)])
def test_nothing(ptr: list[int], tasks: int) -> None:
    (pooled, entropy, lse), gradients = with_gradients(call(ptr), [leaf(0, 3), leaf(0, tasks)])
    bags = len(ptr) - 1
    assert pooled.tolist() == [[[0.0] * 3] * tasks] * bags
    assert entropy.tolist() == [[0.0] * tasks] * bags
    assert lse.tolist() == [[-math.inf] * tasks] * bags
    assert [x.shape[0] for x in gradients] == [0, 0]


def test_repeats_and_traces() -> None:
    ptr = [0, 5, 5, 3000, 3400]
    z, scores = leaf(3400, 16, dtype=torch.float32), leaf(3400, 3, seed=1, dtype=torch.float32)
    check_repeats(call(ptr), [z, scores])
    traced = torch.compile(bag_pool, backend="aot_eager", fullgraph=True)
    for got, want in zip(traced(z, scores, torch.tensor(ptr)), call(ptr)(z, scores), strict=True):
        torch.testing.assert_close(got, want)
