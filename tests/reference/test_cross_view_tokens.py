"""cross_view_tokens against loops, against cross_view, and across tile sizes."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from tests.reference._checks import (
    check_gradients,
    check_repeats,
    largest_tensor,
    leaf,
    same_bits,
    saved_tensors,
    with_gradients,
)
from umda_fast.reference import cross_view_tokens as module
from umda_fast.reference.cross_view import cross_view
from umda_fast.reference.cross_view_tokens import cross_view_tokens

# Instances as lists of (view, tokens).
# One view only, an empty segment, an empty instance, a view with two segments.
RAGGED = [
    [(0, 2), (1, 3), (2, 1)],
    [(2, 2)],
    [(1, 2), (0, 0)],
    [],
    [(2, 1), (0, 1)],
    [(1, 1), (0, 2), (1, 1)],
]
VIEWS = 3

Array = npt.NDArray[np.float64]


def layout(instances: list[list[tuple[int, int]]]) -> list[Tensor]:
    """cu_tokens, cu_segments, view_of_segment."""
    segments = [segment for instance in instances for segment in instance]
    tokens = torch.tensor([0, *(count for _, count in segments)]).cumsum(0)
    counts = torch.tensor([0, *(len(instance) for instance in instances)]).cumsum(0)
    return [tokens, counts, torch.tensor([view for view, _ in segments], dtype=torch.int32)]


def inputs(tokens: int, heads: int, width: int, views: int = VIEWS) -> list[Tensor]:
    vectors = [leaf(tokens, heads, width, seed=i) for i in range(3)]
    return [*vectors, leaf(tokens, heads, seed=3), leaf(heads, views, views, seed=4)]


def call(
    where: list[Tensor], views: int = VIEWS, token_entropy: bool = True, finite: bool = False
) -> Callable[..., tuple[Tensor, ...]]:
    def function(
        q: Tensor, k: Tensor, v: Tensor, gate: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        result = cross_view_tokens(q, k, v, gate, *where, views, bias, token_entropy)
        if finite:  # finite differences of -inf are NaN
            return tuple(x.masked_fill(x == -math.inf, 0.0) for x in result)
        return result

    return function


def loops(
    instances: list[list[tuple[int, int]]], q: Array, k: Array, v: Array, gate: Array, bias: Array
) -> tuple[Array, ...]:
    tokens, heads, width = q.shape
    out, mass = np.zeros((tokens, heads, width)), np.zeros((tokens, VIEWS))
    entropy, over_tokens = np.zeros((tokens, heads)), np.zeros((tokens, heads))
    lse_intra, lse_cross = np.full((tokens, heads), -np.inf), np.full((tokens, heads), -np.inf)
    first = 0
    for instance in instances:
        view = [w for w, count in instance for _ in range(count)]
        for i, u in enumerate(view):
            for h in range(heads):
                row = first + i
                intra, cross = {}, {}
                for j, w in enumerate(view):
                    s = float(q[row, h] @ k[first + j, h]) / math.sqrt(width)
                    if w == u:
                        intra[j] = math.exp(s)
                    else:
                        cross[j] = math.exp(s + bias[h, u, w])
                g = 1 / (1 + math.exp(-gate[row, h])) if cross else 1.0
                share = {u: g}
                for j, e in intra.items():
                    out[row, h] += g * e / sum(intra.values()) * v[first + j, h]
                for j, e in cross.items():
                    a = e / sum(cross.values())
                    out[row, h] += (1 - g) * a * v[first + j, h]
                    share[view[j]] = share.get(view[j], 0.0) + (1 - g) * a
                    over_tokens[row, h] -= a * math.log(a)
                for w, p in share.items():
                    mass[row, w] += p / heads
                    entropy[row, h] -= p * math.log(p)
                lse_intra[row, h] = math.log(sum(intra.values()))
                if cross:
                    lse_cross[row, h] = math.log(sum(cross.values()))
        first += len(view)
    return out, mass, entropy, over_tokens, lse_intra, lse_cross


@pytest.mark.parametrize("tile", [1, 40, 1 << 22])
@pytest.mark.parametrize(("heads", "width"), [(1, 3), (3, 1), (2, 5)])
def test_equals_the_formula(monkeypatch: pytest.MonkeyPatch, tile: int, heads: int, width: int) -> None:
    monkeypatch.setattr(module, "TILE_ELEMENTS", tile)
    where = layout(RAGGED)
    arguments = [x.detach() for x in inputs(int(where[0][-1]), heads, width)]
    expected = loops(RAGGED, *(x.numpy() for x in arguments))
    for got, want in zip(call(where)(*arguments), expected, strict=True):
        torch.testing.assert_close(got, torch.from_numpy(want))
        assert not got[6:8].eq(0).logical_and(got[6:8].signbit()).any()  # the instance of one view: 0, not -0
    unbiased = loops(RAGGED, *(x.numpy() for x in arguments[:4]), np.zeros((heads, VIEWS, VIEWS)))
    for got, want in zip(call(where)(*arguments[:4]), unbiased, strict=True):
        torch.testing.assert_close(got, torch.from_numpy(want))


@pytest.mark.parametrize(("tile", "token_entropy"), [(20, True), (1 << 22, False), (1 << 22, True)])
def test_derivatives(monkeypatch: pytest.MonkeyPatch, tile: int, token_entropy: bool) -> None:
    monkeypatch.setattr(module, "TILE_ELEMENTS", tile)
    instances = [[(1, 2)], [(2, 1), (0, 1)], [(0, 2), (2, 1), (1, 1)]]  # the last one is cut at a tile of 20
    where = layout(instances)
    function = call(where, token_entropy=token_entropy, finite=True)
    check_gradients(function, inputs(int(where[0][-1]), 2, 3))


@pytest.mark.parametrize("views", [1, 2, 4])
def test_one_token_per_view_is_cross_view(views: int) -> None:
    n, heads, width = 5, 2, 3
    q, k, v, gate, bias = inputs(n * views, heads, width, views)
    mask = torch.arange(n * views).reshape(n, views) % 3 != 1
    mask[:, 0] = True
    instances = [[(u, 1) for u in range(views) if mask[i, u]] for i in range(n)]
    present = mask.reshape(-1)
    result = call(layout(instances), views)(*(x[present] for x in (q, k, v, gate)), bias)
    dense = cross_view(*(x.reshape(n, views, *x.shape[1:]) for x in (q, k, v, gate)), bias, mask)
    for got, want in zip(result[:3], dense, strict=True):
        torch.testing.assert_close(got, want[mask])
    # With one token per view, the entropy over tokens is that over the other views.
    g = gate[present].sigmoid()
    gate_entropy = -(g * g.log() + (1 - g) * (1 - g).log())
    alone = ~(mask.sum(1) > 1).repeat_interleave(mask.sum(1))
    want = (gate_entropy + (1 - g) * result[3]).masked_fill(alone[:, None], 0.0)
    torch.testing.assert_close(result[2], want)


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    instances = [[(u, (i * 7 + u * 3) % 5) for u in range(VIEWS)] for i in range(9)]
    where = layout(instances)
    arguments = inputs(int(where[0][-1]), 2, 5)
    outputs, gradients = with_gradients(call(where), arguments)
    for tile in (1, 100, 700):
        monkeypatch.setattr(module, "TILE_ELEMENTS", tile)
        other = with_gradients(call(where), arguments)
        for got, want in zip(other[0] + other[1], outputs + gradients, strict=True):
            torch.testing.assert_close(got, want)


def test_memory_is_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    tile, tokens, heads = 1 << 14, 600, 2
    monkeypatch.setattr(module, "TILE_ELEMENTS", tile)
    instances = [[(0, tokens // 2), (1, tokens // 2)], *[[(0, 2), (1, 1)]] * 50]
    where = layout(instances)
    arguments = [x.float() for x in inputs(int(where[0][-1]), heads, 4)]
    with largest_tensor() as largest:
        with_gradients(call(where), arguments)
    scores = 4 * heads * tokens * tokens
    assert largest.bytes <= 8 * tile < scores / 10
    with saved_tensors() as saved:
        call(where)(*arguments)
    assert sum(saved.values()) < scores / 10


def test_permuting_instances_permutes_the_result() -> None:
    where = layout(RAGGED)
    arguments = [x.detach() for x in inputs(int(where[0][-1]), 2, 3)]
    expected = call(where)(*arguments)
    order = [4, 2, 0, 5, 3, 1]
    bounds = where[0][where[1]].tolist()
    rows = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in order])
    moved = call(layout([RAGGED[i] for i in order]))(*(x[rows] for x in arguments[:4]), arguments[4])
    for got, want in zip(moved, expected, strict=True):
        torch.testing.assert_close(got, want[rows])


def test_nan_stays_in_its_instance() -> None:
    where = layout(RAGGED)
    arguments = [x.detach() for x in inputs(int(where[0][-1]), 2, 3)]
    expected, gradients = with_gradients(call(where), arguments)
    arguments[1][0] = math.nan
    outputs, broken = with_gradients(call(where), arguments)
    assert outputs[0][:6].isnan().all()
    for got, want in zip(outputs + broken[:4], expected + gradients[:4], strict=True):
        torch.testing.assert_close(got[6:], want[6:])


@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_saturated_gate_and_one_sided_attention(logit: float) -> None:
    where = layout(RAGGED)
    arguments = [x.detach().float() for x in inputs(int(where[0][-1]), 2, 3)]
    arguments[3].fill_(logit)
    arguments[4][:, :, 0] = 1e4
    outputs, gradients = with_gradients(call(where), arguments)
    for x in outputs[:4] + gradients:
        assert x.isfinite().all()


def test_low_precision_and_nothing() -> None:
    where = layout(RAGGED)
    low = [x.detach().bfloat16() for x in inputs(int(where[0][-1]), 2, 3)]
    low[4] = low[4].float()
    got = call(where)(*low)
    want = call(where)(*(x.float() for x in low))
    assert same_bits(got, [want[0].bfloat16(), *want[1:]])
    for instances in ([], [[]], [[(0, 0)], []]):
        for token_entropy in (False, True):
            outputs, gradients = with_gradients(
                call(layout(instances), token_entropy=token_entropy), inputs(0, 2, 3)
            )
            shapes = [(0, 2, 3), (0, 3), (0, 2), (0, 2) if token_entropy else (0,), (0, 2), (0, 2)]
            assert [tuple(x.shape) for x in outputs] == shapes
            assert not gradients[4].any()


def test_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE_ELEMENTS", 1 << 12)
    instances = [[(u, (i * 7 + u * 3) % 11) for u in range(VIEWS)] for i in range(40)]
    where = layout(instances)
    check_repeats(call(where), [x.float() for x in inputs(int(where[0][-1]), 2, 16)])
