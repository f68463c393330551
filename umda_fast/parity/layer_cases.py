"""Shapes of what lies around a linear layer: projections, and what is done between two of them."""

import math

import torch
import torch.nn.functional as F

from umda_fast import ops
from umda_fast.parity.case import Case, Inputs, Outputs, normal
from umda_fast.reference import philox


def norm_linear_case(shape: str, n: int, views: int, width: int, columns: int, second: int) -> Case:
    """Two linear layers on one layer norm."""
    inputs = {
        "x": normal(n, views, width, seed=24),
        "norm_weight": normal(width, seed=25),
        "norm_bias": normal(width, seed=26),
        "weight": normal(columns, width, seed=27) / math.sqrt(width),
        "bias": normal(columns, seed=28),
        "weight2": normal(second, width, seed=29) / math.sqrt(width),
        "bias2": normal(second, seed=30),
    }

    def run(x: Inputs, backend: str) -> Outputs:
        y, y2 = ops.norm_linear(*(x[name] for name in inputs), backend=backend)
        return {"y": y, "y2": y2}

    return Case("norm_linear", shape, inputs, run, ("x", "weight", "bias", "weight2", "bias2"), tuple(inputs))


def linear_residual_case(shape: str, n: int, views: int, inputs: int, outputs: int) -> Case:
    """Without dropout, which draws other elements on every backend."""
    tensors = {
        "x": normal(n, views, inputs, seed=31),
        "weight": normal(outputs, inputs, seed=32) / math.sqrt(inputs),
        "bias": normal(outputs, seed=33),
        "residual": normal(n, views, outputs, seed=34),
    }

    def run(x: Inputs, backend: str) -> Outputs:
        return {"out": ops.linear_residual(*(x[name] for name in tensors), backend=backend)}

    return Case("linear_residual", shape, tensors, run, tuple(tensors), tuple(tensors))


def gelu_dropout_case(
    shape: str, rows: tuple[int, ...], width: int, *, p: float = 0.0, bias: bool = True, wide_bias: bool = False
) -> Case:
    """With dropout, drawn from a seed that is given: every backend drops the same elements; with ``wide_bias``, a bias
    as autocast leaves it."""
    tensors = {"x": 2 * normal(*rows, width, seed=35), **({"bias": normal(width, seed=36)} if bias else {})}
    seed = {"seed": torch.tensor(-(2**61) - 12345)} if p else {}

    def run(x: Inputs, backend: str) -> Outputs:
        return {"out": ops.gelu_dropout(x["x"], x.get("bias"), p=p, seed=x.get("seed"), backend=backend)}

    def composition(x: Inputs, backend: str) -> Outputs:
        hidden = x["x"] + x["bias"].to(x["x"].dtype) if bias else x["x"]
        return {"out": philox.dropout(F.gelu(hidden), x.get("seed"), round(65536 * p))}

    storage = ("x",) if wide_bias else tuple(tensors)
    return Case("gelu_dropout", shape, {**tensors, **seed}, run, storage, tuple(tensors), composition)


def dropout_add_norm_case(
    shape: str, rows: tuple[int, ...], width: int, *, p: float = 0.0, gain: bool = True, norm: bool = True,
    wide: bool = False,
) -> Case:  # fmt: skip
    """Residual rows far from 0; with ``wide``, residual and vectors as autocast leaves them."""
    vectors = ["bias", *(["gain"] if gain else []), *(["norm_weight", "norm_bias"] if norm else [])]
    tensors = {
        "x": normal(*rows, width, seed=37),
        "residual": 2 * normal(*rows, width, seed=38) + 3,
        **{name: normal(width, seed=39 + i) for i, name in enumerate(vectors)},
    }
    seed = {"seed": torch.tensor(2**62 + 777)} if p else {}

    def run(x: Inputs, backend: str) -> Outputs:
        given = (x.get(name) for name in ("bias", "gain", "norm_weight", "norm_bias"))
        total, normed = ops.dropout_add_norm(x["x"], x["residual"], *given, p=p, seed=x.get("seed"), backend=backend)
        return {"sum": total} if normed is None else {"sum": total, "normed": normed}

    def composition(x: Inputs, backend: str) -> Outputs:
        dtype = x["x"].dtype
        added = philox.dropout(x["x"] + x["bias"].to(dtype), x.get("seed"), round(65536 * p))
        total = x["residual"] + (added * x["gain"].to(dtype) if gain else added)
        if not norm:
            return {"sum": total}
        scale, shift = (x[name].to(total.dtype) for name in ("norm_weight", "norm_bias"))
        return {"sum": total, "normed": F.layer_norm(total, (width,), scale, shift).to(dtype)}

    storage = ("x",) if wide else tuple(tensors)
    return Case("dropout_add_norm", shape, {**tensors, **seed}, run, storage, tuple(tensors), composition)
