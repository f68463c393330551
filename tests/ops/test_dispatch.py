"""Which backend serves a call, and what is said when none can."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.test_imports import run
from umda_fast.errors import BackendUnavailableError
from umda_fast.ops import (
    BACKENDS,
    _library,
    backend_status,
    backends_used,
    bag_attention_pool,
    cross_view_attention,
    get_backend,
    norm_linear,
    prefer_backend,
    set_backend,
    use_backend,
)
from umda_fast.ops import bag_pool as bag_pool_module

X, PTR = torch.randn(5, 4), torch.tensor([0, 2, 5])


def pool(backend: str | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return bag_attention_pool(X.to(dtype), X.to(dtype), PTR, backend=backend).pooled


def test_auto_takes_the_kernel_and_float64_the_reference() -> None:
    for dtype, served in ((torch.float32, "cpp"), (torch.bfloat16, "cpp"), (torch.float64, "reference")):
        pool(dtype=dtype)
        assert backends_used()["bag_pool"] == served


def test_the_kernel_really_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only is it said: the profiler sees the operation, forward and backward, and the reference is not called."""

    def called(*_: object) -> None:
        raise AssertionError("the reference was called")

    monkeypatch.setattr(bag_pool_module, "reference", called)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        z = X.clone().requires_grad_()
        bag_attention_pool(z, X, PTR).pooled.sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"umda_fast::bag_pool", "umda_fast::bag_pool_backward"} <= names
    with pytest.raises(AssertionError, match="the reference was called"):
        pool("reference")


@pytest.mark.parametrize("name", ["fast", "", "CPP"])
def test_unknown_names(name: str) -> None:
    for call in (lambda: pool(name), lambda: set_backend(name), lambda: use_backend(name).__enter__()):
        with pytest.raises(ValueError, match=f"backend must be one of {', '.join(BACKENDS)}, got '{name}'"):
            call()
    assert get_backend() == "auto"


def test_an_explicit_backend_lists_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendUnavailableError, match=r"'cpp' cannot serve bag_pool: it serves .*, these are float64"):
        pool("cpp", torch.float64)
    monkeypatch.setattr(_library, "cpp_status", "it was not built")
    with pytest.raises(BackendUnavailableError, match=r"it was not built; it serves .*, these are float64"):
        pool("cpp", torch.float64)
    monkeypatch.setattr(_library, "triton_status", "triton is not installed")
    with pytest.raises(BackendUnavailableError) as refused:
        pool("triton", torch.float64)
    for reason in ("bag_pool has no Triton kernel", "triton is not installed", "these are on cpu", "these are float64"):
        assert reason in str(refused.value)
    with pytest.raises(BackendUnavailableError, match=r"'cuda' cannot serve bag_pool: .*; it serves cuda tensors"):
        pool("cuda")


def test_without_the_library_auto_serves_the_reference_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "cpp_status", "it was not built")
    pool()
    assert backends_used()["bag_pool"] == "reference"
    assert backend_status()["cpp"] == "it was not built"


def test_a_default_is_as_strict_as_an_argument_and_is_restored() -> None:
    with use_backend("reference"):
        assert get_backend() == "reference"
        pool()
        assert backends_used()["bag_pool"] == "reference"
        pool("cpp")
        assert backends_used()["bag_pool"] == "cpp"
    assert get_backend() == "auto"
    with pytest.raises(BackendUnavailableError), use_backend("cpp"):
        pool(dtype=torch.float64)
    assert get_backend() == "auto"


def test_status_names_every_backend() -> None:
    status = backend_status()
    assert set(status) == set(BACKENDS) - {"auto"}
    assert status["reference"] is None
    assert status["cpp"] is None
    if not torch.cuda.is_available():
        assert status["cuda"] == "torch finds no CUDA device"


def test_environment_variable() -> None:
    code = """
import torch
from umda_fast.ops import backends_used, bag_attention_pool, get_backend
x = torch.ones(2, 2)
bag_attention_pool(x, x, torch.tensor([0, 2]))
print(get_backend(), backends_used()["bag_pool"])
"""
    assert run(code, UMDA_FAST_BACKEND="reference") == "reference reference"
    failing = f"""
try:
{code.replace(chr(10), chr(10) + "    ")}
except ValueError as error:
    print(error)
"""
    assert "UMDA_FAST_BACKEND must be one of auto" in run(failing, UMDA_FAST_BACKEND="fast")


def test_triton_refuses_the_cpu_without_its_interpreter() -> None:
    q = torch.zeros(1, 2, 1, 8)
    if "triton" in sys.modules and _library.TRITON_INTERPRETED:
        pytest.fail("run without TRITON_INTERPRET")
    with pytest.raises(BackendUnavailableError, match=r"it serves CUDA tensors .*TRITON_INTERPRET=1"):
        cross_view_attention(q, q, q, q[..., 0], backend="triton")


#: Every operation that has a Triton kernel, forward and backward, and opcheck.
INTERPRETED = """
import json, torch
from umda_fast.ops import backend_status
from umda_fast.ops._library import op
from umda_fast.parity import run_parity
from umda_fast.parity.cases import cross_view_case, cross_view_tokens_case, knn_case, view_fusion_case

assert backend_status()["triton"] is None
cases = [
    cross_view_case("missing views", 3, 3, 2, 9, missing=True),
    cross_view_case("no instance", 0, 2, 1, 8),
    cross_view_tokens_case("ragged", [3, 1, 2, 0], [3, 0, 1], 1, 9, views=3),
    knn_case("ragged", [5, 0, 3], 9, 2, "cosine"),
    knn_case("k >= n", [3], 5, 4, "euclidean"),
    view_fusion_case("missing views", 5, 3, 9, 4, missing=True),
    view_fusion_case("no instance", 0, 2, 3, 2),
]
report = run_parity(backends=["triton"], cases=cases, dtypes=[torch.float32])
q = torch.randn(2, 2, 1, 8, requires_grad=True)
x = torch.randn(3, 1, 8, requires_grad=True)
segments = torch.tensor([0, 2, 3]), torch.tensor([0, 2]), torch.tensor([0, 1], dtype=torch.int32), 2
checked = {
    "cross_view_triton": (q, q, q, q[..., 0], None, None),
    "cross_view_tokens_triton": (x, x, x, x[..., 0], *segments, None, True),
    "knn_triton": (x[:, 0].detach(), torch.tensor([0, 3]), 2, "cosine"),
    "view_fusion_triton": (x, x[..., 0], x, None),
}
for name, arguments in checked.items():
    results = torch.library.opcheck(op(name), arguments)
    assert set(results.values()) == {"SUCCESS"}, (name, results)
print(json.dumps(report))
"""


def test_triton_in_its_interpreter() -> None:
    report = json.loads(run(INTERPRETED, TRITON_INTERPRET="1").splitlines()[-1])
    rows = report["rows"]
    assert [row for row in rows if row["verdict"] != "pass"] == []
    assert {(row["op"], row["pass"]) for row in rows} == {
        ("cross_view", "forward"),
        ("cross_view", "backward"),
        ("cross_view_tokens", "forward"),
        ("cross_view_tokens", "backward"),
        ("knn", "forward"),
        ("view_fusion", "forward"),
        ("view_fusion", "backward"),
    }


def test_the_libraries_lie_beside_the_package() -> None:
    assert (Path(_library.__file__).parents[1] / "_C.abi3.so").is_file()


def test_a_default_leaves_library_calls_to_pytorch_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(3, 4), torch.randn(5, 4)

    def layer(backend: str | None = None) -> torch.Tensor:
        return norm_linear(x, torch.ones(4), torch.zeros(4), weight, backend=backend)[0]

    with use_backend("cpp"):
        torch.testing.assert_close(layer(), layer("reference"))
        layer()
        assert backends_used()["norm_linear"] == "composition"
        with pytest.raises(BackendUnavailableError, match="norm_linear has no CPU kernel"):
            layer("cpp")
        monkeypatch.setattr(_library, "cpp_status", "it was not built")
        with pytest.raises(BackendUnavailableError, match="cannot serve norm_linear: it was not built"):
            layer()
        monkeypatch.setattr(_library, "cpp_status", None)
    with use_backend("cpp", strict=True), pytest.raises(BackendUnavailableError, match="norm_linear has no CPU kernel"):
        layer()
    with use_backend("cuda"), pytest.raises(BackendUnavailableError, match="it serves cuda tensors"):
        layer()


def test_a_preference_of_auto_keeps_the_default() -> None:
    with use_backend("reference"), prefer_backend("auto"):
        assert get_backend() == "reference"
    with use_backend("reference"), prefer_backend("cpp"):
        assert get_backend() == "cpp"
    with use_backend("cpp", strict=True), prefer_backend("auto"), pytest.raises(BackendUnavailableError):
        norm_linear(torch.randn(2, 4), torch.ones(4), torch.zeros(4), torch.randn(3, 4))
    assert get_backend() == "auto"
