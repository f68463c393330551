"""The backward call of self-guided learning against a slow float64 implementation and hand-computed cases."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from tests.sgl.oracle import SlowSGL, TwoHeads, flat_gradient
from umda_fast.sgl import Equal, SelfGuided, SGLBalancer, _gradients

SCOPES = ["shared_parameters", "last_shared_layer", "representation"]


def batches(count: int, size: int = 6, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 5, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def make(model: TwoHeads, scope: str, **options: object) -> SelfGuided:
    layer = list(model.trunk[2].parameters()) if scope == "last_shared_layer" else []
    return SelfGuided(
        model.shared(),
        [f"t{row}" for row in range(len(model.heads))],
        scope=scope,  # type: ignore[arg-type]
        last_shared_layer=layer,
        **options,  # type: ignore[arg-type]
    )


def gradients(parameters: list[Parameter]) -> np.ndarray:
    return np.concatenate(
        [np.zeros(p.numel()) if p.grad is None else p.grad.double().numpy().ravel() for p in parameters]
    )


def run(model: TwoHeads, sgl: SelfGuided, x: Tensor, present: list[int] | None = None, penalty: bool = True):
    losses, extra, hidden = model.losses(x)
    if present is not None:
        losses = {name: losses[name] for name in (f"t{row}" for row in present)}
    return sgl.backward(
        losses,
        penalty=extra if penalty else None,
        representation=hidden if sgl.scope == "representation" else None,
    )


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("given", [False, True])
def test_every_scope_equals_the_slow_implementation(scope: str, given: bool) -> None:
    model = TwoHeads()
    sgl = make(model, scope, task_parameters=model.own() if given else ())
    slow = SlowSGL(3)
    pair_gram, pair_count = np.zeros((3, 3)), np.zeros((3, 3))
    # t1 has no label in the second batch, t0 none in the fourth, and there is none at all in the fifth.
    plan = [[0, 1, 2], [0, 2], [0, 1, 2], [1, 2], [], [1], [0, 1, 2]]
    for x, rows in zip(batches(len(plan)), plan, strict=True):
        losses, penalty, hidden = model.losses(x)
        ordered = [losses[f"t{row}"] for row in rows]
        shared, own = model.shared(), model.own()
        layer = list(model.trunk[2].parameters())
        expected_shared = flat_gradient(penalty, shared)
        expected_own = flat_gradient(penalty, own)
        if rows:
            if scope == "representation":
                (grads,) = zip(
                    *[torch.autograd.grad(loss, hidden, retain_graph=True) for loss in ordered], strict=True
                )
                for i, s in enumerate(rows):
                    for j, t in enumerate(rows):
                        inner = float((grads[i] * grads[j]).sum())
                        pair_gram[s, t] = 0.9 * pair_gram[s, t] + 0.1 * inner
                        pair_count[s, t] += 1
                full = pair_gram / np.where(pair_count > 0, 1 - 0.9**pair_count, 1)
                gram = full[np.ix_(rows, rows)]
            else:
                scoped = shared if scope == "shared_parameters" else layer
                slow.smooth(rows, [flat_gradient(loss, scoped) for loss in ordered])
                gram = slow.gram(rows)
            slow.update(rows, [loss.item() for loss in ordered], gram)
            weights = slow.used(rows)
            for row, weight, loss in zip(rows, weights, ordered, strict=True):
                raw = flat_gradient(loss, shared)
                expected_shared += weight * (slow.corrected(row) if scope == "shared_parameters" else raw)
                expected_own += weight * flat_gradient(loss, own)
        before = {name: value.clone() for name, value in model.named_parameters()}
        step = run(model, sgl, x, rows)
        assert step.active.tolist() == [row in rows for row in range(3)]
        if rows:
            np.testing.assert_allclose(step.weights.numpy()[rows], weights, rtol=1e-12)
            np.testing.assert_allclose(step.gram.numpy()[np.ix_(rows, rows)], gram, rtol=1e-10)
            absent = [row for row in range(3) if row not in rows]
            assert not step.weights.numpy()[absent].any()
        np.testing.assert_allclose(gradients(shared), expected_shared, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(gradients(own), expected_own, rtol=1e-11, atol=1e-13)
        assert model.unused.grad is None
        assert all(torch.equal(before[name], value) for name, value in model.named_parameters())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        model.zero_grad()


@pytest.mark.parametrize("scope", SCOPES)
def test_between_statistics_steps_it_is_a_plain_weighted_backward(scope: str) -> None:
    model = TwoHeads()
    sgl = make(model, scope, every=3)
    held = None
    for number, x in enumerate(batches(7)):
        model.zero_grad()
        counts = None if held is None else sgl.state_dict()["tensors"]["counts"]
        step = run(model, sgl, x)
        if number % 3 == 0:
            assert held is None or not torch.equal(step.weights, held)
            held = step.weights
            continue
        assert torch.equal(step.weights, held)
        assert torch.equal(sgl.state_dict()["tensors"]["counts"], counts)
        found = gradients(list(model.parameters()))
        model.zero_grad()
        losses, penalty, _ = model.losses(x)
        (sum(w * loss for w, loss in zip(held, losses.values(), strict=True)) + penalty).backward()
        np.testing.assert_allclose(found, gradients(list(model.parameters())), rtol=1e-12, atol=1e-15)


def test_two_quadratics_by_hand() -> None:
    # L_a = (x - 1)^2 / 2 at x = 3 gives 2; L_b = (x + 1)^2 at x = 3 gives 8; one shared number, beta = 0.
    shared = Parameter(torch.tensor([3.0], dtype=torch.float64))
    sgl = SelfGuided([shared], ["a", "b"], beta=0.0, balancer=SGLBalancer(weight_beta=0.0))
    step = sgl.backward({"a": (shared - 1).square().sum() / 2, "b": (shared + 1).square().sum()})
    assert step.gram.tolist() == [[4.0, 16.0], [16.0, 64.0]]
    assert step.cosine.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    # nbar = 5, rates 1: scales 5/2 and 5/8, both aligned by 1.5; weights 2 * (4/5, 1/5).
    np.testing.assert_allclose(step.weights.numpy(), [1.6, 0.4], rtol=1e-15)
    np.testing.assert_allclose(shared.grad.numpy(), [1.6 * 2 + 0.4 * 8], rtol=1e-15)
    # Second step at x = 1.5: losses 1/8 and 6.25; Lema = .9 * 2 + .1 / 8 and .9 * 16 + .625.
    shared.data.fill_(1.5)
    shared.grad = None
    step = sgl.backward({"a": (shared - 1).square().sum() / 2, "b": (shared + 1).square().sum()})
    progress = np.array([(1.8 + 0.0125) / 2, (14.4 + 0.625) / 16])
    rate = progress / progress.mean()
    strength = 2.75 * np.sqrt(rate) / np.array([0.5, 5.0])
    strength = np.minimum(strength, 5)
    np.testing.assert_allclose(step.weights.numpy(), 2 * strength / strength.sum(), rtol=1e-14)


def test_opposite_gradients_by_hand() -> None:
    shared = Parameter(torch.zeros(2, dtype=torch.float64))
    sgl = SelfGuided([shared], ["a", "b"], beta=0.0, balancer=SGLBalancer(weight_beta=0.0))
    step = sgl.backward({"a": 2 + shared[0], "b": 2 - shared[0]})
    assert step.cosine[0, 1] == -1
    np.testing.assert_allclose(step.weights.numpy(), [1, 1])
    assert shared.grad.tolist() == [0, 0]


@pytest.mark.parametrize("scope", SCOPES)
def test_one_task_gets_weight_one(scope: str) -> None:
    model = TwoHeads(tasks=1)
    sgl = make(model, scope, beta=0.0)
    for x in batches(3):
        model.zero_grad()
        step = run(model, sgl, x)
        assert step.weights.tolist() == [1.0]
        found = gradients(list(model.parameters()))
        model.zero_grad()
        losses, penalty, _ = model.losses(x)
        (losses["t0"] + penalty).backward()
        np.testing.assert_allclose(found, gradients(list(model.parameters())), rtol=1e-12, atol=1e-15)


def test_equal_is_a_plain_step_without_task_gradients() -> None:
    model = TwoHeads(dtype=torch.float32)
    sgl = make(model, "shared_parameters", balancer=Equal())
    (x,) = batches(1, dtype=torch.float32)
    step = run(model, sgl, x)
    assert step.weights.tolist() == [1, 1, 1]
    assert "ema" not in sgl.state_dict()["tensors"]
    found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    losses, penalty, _ = model.losses(x)
    (torch.stack(list(losses.values())).sum() + penalty).backward()
    for mine, parameter in zip(found, model.parameters(), strict=True):
        assert (mine is None) == (parameter.grad is None)
        if mine is not None:
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-6, atol=1e-7)


def test_equal_with_statistics_follows_the_mean_of_averages() -> None:
    model = TwoHeads()
    sgl = make(model, "shared_parameters", balancer=Equal(), statistics=True)
    slow = SlowSGL(3)
    for x in batches(3):
        model.zero_grad()
        losses, _, _ = model.losses(x)
        slow.smooth([0, 1, 2], [flat_gradient(loss, model.shared()) for loss in losses.values()])
        step = run(model, sgl, x, penalty=False)
        assert step.weights.tolist() == [1, 1, 1]
        expected = sum(slow.corrected(row) for row in range(3))
        np.testing.assert_allclose(gradients(model.shared()), expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("scope", SCOPES)
def test_penalties_are_never_weighted(scope: str) -> None:
    model = TwoHeads()
    (x,) = batches(1)
    found = []
    for penalty in (True, False):
        model.zero_grad()
        run(model, make(model, scope), x, penalty=penalty)
        found.append(gradients(list(model.parameters())))
    expected = flat_gradient(model.losses(x)[1], list(model.parameters()))
    np.testing.assert_allclose(found[0] - found[1], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("every", [1, 2])
def test_resuming_is_bit_exact(scope: str, every: int) -> None:
    def train(model: TwoHeads, sgl: SelfGuided, data: list[Tensor]) -> list[Tensor]:
        weights = []
        for number, x in enumerate(data):
            model.zero_grad()
            weights.append(run(model, sgl, x, [0, 2] if number % 3 == 1 else None).weights)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.05 * parameter.grad
        return weights

    data = batches(8, dtype=torch.float32)
    options = {"every": every, "variance_window": 3, "control": scope == "shared_parameters"}
    model = TwoHeads(dtype=torch.float32)
    sgl = make(model, scope, **options)
    train(model, sgl, data[:5])
    other = TwoHeads(dtype=torch.float32)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = make(other, scope, **options)
    resumed.load_state_dict(copy.deepcopy(sgl.state_dict()))
    assert resumed.metrics().keys() == sgl.metrics().keys()
    first, second = train(model, sgl, data[5:]), train(other, resumed, data[5:])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    np.testing.assert_equal(sgl.metrics(), resumed.metrics())
    assert torch.equal(sgl.cosine_ema, resumed.cosine_ema)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_accumulate_as_with_backward(scope: str, set_to_none: bool) -> None:
    model = TwoHeads()
    data = batches(3)
    single = []
    for number in range(3):
        sgl = make(model, scope)
        for x in data[: number + 1]:
            model.zero_grad()
            run(model, sgl, x)
        single.append(gradients(list(model.parameters())))
    sgl = make(model, scope)
    model.zero_grad()
    for x in data:
        run(model, sgl, x)
    np.testing.assert_allclose(gradients(list(model.parameters())), sum(single), rtol=1e-12, atol=1e-14)
    # Held gradients of an earlier call are zeroed in place, or dropped; the next call does not see them.
    sgl = make(model, scope)
    for number, x in enumerate(data):
        model.zero_grad(set_to_none=set_to_none)
        run(model, sgl, x)
        np.testing.assert_allclose(
            gradients(list(model.parameters())), single[number], rtol=1e-12, atol=1e-14
        )


def test_accumulated_gradients_of_others_are_kept() -> None:
    model = TwoHeads()
    (x,) = batches(1)
    model.zero_grad()
    run(model, make(model, "shared_parameters"), x)
    alone = gradients(list(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    run(model, make(model, "shared_parameters"), x)
    np.testing.assert_allclose(gradients(list(model.parameters())), alone + 1, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_parameters_get_gradients_of_their_own_dtype(dtype: torch.dtype) -> None:
    model = TwoHeads(dtype=dtype)
    sgl = make(model, "shared_parameters")
    (x,) = batches(1, dtype=dtype)
    step = run(model, sgl, x)
    assert step.gram.dtype == torch.float32
    found = gradients(list(model.parameters()))
    exact = TwoHeads()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    run(exact, make(exact, "shared_parameters"), x.double())
    expected = gradients(list(exact.parameters()))
    model.zero_grad()
    losses, penalty, _ = model.losses(x)
    weights = [float(w) for w in step.weights]
    (sum(w * loss for w, loss in zip(weights, losses.values(), strict=True)) + penalty).backward()
    composed = gradients(list(model.parameters()))
    floor = 4 * torch.finfo(dtype).eps * np.abs(expected).max()
    assert np.abs(found - expected).max() <= 3 * np.abs(composed - expected).max() + floor
    assert all(p.grad is None or p.grad.dtype == dtype for p in model.parameters())


def test_a_task_without_gradient_on_the_scope_counts_as_zeros() -> None:
    shared, own = Parameter(torch.tensor([1.0, 2.0])), Parameter(torch.tensor([1.0]))
    sgl = SelfGuided([shared], ["a", "b"], beta=0.0, balancer=SGLBalancer(weight_beta=0.0))
    step = sgl.backward({"a": shared.square().sum(), "b": own.square().sum()})
    assert step.gram[1].tolist() == [0, 0]
    assert step.cosine.tolist() == [[1, 0], [0, 1]]
    assert bool(step.weights.isfinite().all())
    torch.testing.assert_close(shared.grad, step.weights[0] * 2 * shared.detach())
    torch.testing.assert_close(own.grad, step.weights[1] * 2 * own.detach())


def test_all_gradients_zero() -> None:
    shared = Parameter(torch.zeros(3))
    sgl = SelfGuided([shared], ["a", "b"])
    step = sgl.backward({"a": shared.square().sum(), "b": shared.square().sum()})
    assert step.weights.tolist() == [1, 1]
    assert shared.grad.tolist() == [0, 0, 0]


def test_the_direction_can_be_this_step_s_gradients() -> None:
    model = TwoHeads()
    sgl = make(model, "shared_parameters", direction="gradient", control=True)
    averaged = make(model, "shared_parameters")
    plain = make(model, "shared_parameters", balancer=Equal(), direction="gradient", statistics=True)
    for number, x in enumerate(batches(4)):
        rows = [0, 2] if number == 2 else [0, 1, 2]
        model.zero_grad()
        expected_weights = run(model, averaged, x, rows).weights
        model.zero_grad()
        run(model, plain, x, rows)
        model.zero_grad()
        step = run(model, sgl, x, rows)
        assert torch.equal(step.weights, expected_weights)
        found = gradients(list(model.parameters()))
        model.zero_grad()
        losses, penalty, _ = model.losses(x)
        (sum(step.weights[row] * losses[f"t{row}"] for row in rows) + penalty).backward()
        np.testing.assert_allclose(found, gradients(list(model.parameters())), rtol=1e-11, atol=1e-13)
    control, equal = sgl.metrics()["control_gradient_variance"], plain.metrics()["gradient_variance"]
    assert control == pytest.approx(equal, rel=1e-9)


@pytest.mark.parametrize("count", [1, 3])
def test_the_gram_matrix_of_any_shape_is_summed_in_pieces(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [torch.randn(7, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]
    rows[0] = rows[0].T.contiguous().T  # not contiguous
    flat = torch.stack([row.reshape(-1).double() for row in rows])
    for chunk in (8, 35, 1000):
        monkeypatch.setattr(_gradients, "CHUNK", chunk)
        found = _gradients.gram(rows, torch.float32, None)
        torch.testing.assert_close(found.double(), flat @ flat.T, rtol=3e-7, atol=0)


def test_cosine_ema_is_the_corrected_running_mean() -> None:
    model = TwoHeads()
    sgl = make(model, "shared_parameters")
    assert torch.equal(sgl.cosine_ema, torch.eye(3, dtype=torch.float64))
    expected, total = np.zeros((3, 3)), 0.0
    for x in batches(4):
        step = run(model, sgl, x)
        expected = 0.9 * expected + 0.1 * step.cosine.numpy()
        total = 0.9 * total + 0.1
    np.testing.assert_allclose(sgl.cosine_ema.numpy(), expected / total, rtol=1e-12)


class CountBackward(nn.Module):
    """Passes its input on and counts how often a gradient comes back through it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y.register_hook(self.note)
        return y

    def note(self, grad: Tensor) -> None:
        self.count += 1


class NothingRead(TorchDispatchMode):
    """Fails on every operation that would wait for a device, or whose result's shape depends on values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.FORBIDDEN:
            raise AssertionError(f"{func} waits for the device")
        # A boolean mask as an index has a data-dependent shape and waits too.
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise AssertionError(f"{func} with a mask waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scope", SCOPES)
def test_a_step_reads_nothing_from_the_device(scope: str) -> None:
    model = TwoHeads(dtype=torch.float32)
    options = {"variance_window": 2, "control": scope == "shared_parameters", "every": 2}
    sgl = make(model, scope, **options)
    for number, x in enumerate(batches(6, dtype=torch.float32)):
        losses, penalty, hidden = model.losses(x)
        if number % 4 == 2:
            del losses["t1"]
        with NothingRead():
            sgl.backward(
                losses, penalty=penalty, representation=hidden if scope == "representation" else None
            )
            _ = sgl.cosine_ema
    with pytest.raises(AssertionError, match="waits for the device"), NothingRead():
        sgl.metrics()


def test_the_trunk_is_traversed_once_by_the_cheap_scopes() -> None:
    for scope, passes in (("shared_parameters", 4), ("last_shared_layer", 1), ("representation", 1)):
        model = TwoHeads()
        counter = CountBackward()
        model.trunk.insert(1, counter)
        layer = list(model.trunk[3].parameters()) if scope == "last_shared_layer" else []
        sgl = SelfGuided(model.shared(), ["t0", "t1", "t2"], scope=scope, last_shared_layer=layer)  # type: ignore[arg-type]
        (x,) = batches(1)
        run(model, sgl, x)
        assert counter.count == passes, scope


def test_five_lines_on_any_model() -> None:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
    heads = nn.ModuleDict({"sum": nn.Linear(16, 1), "product": nn.Linear(16, 1)})
    groups = [{"params": trunk.parameters(), "betas": (0.0, 0.999)}, {"params": heads.parameters()}]
    optimizer = torch.optim.Adam(groups, lr=1e-2)
    x = torch.randn(128, 4)
    targets = {"sum": x.sum(1, keepdim=True), "product": 10 * x[:, :1] * x[:, 1:2]}
    history = []
    sgl = SelfGuided(trunk.parameters(), tasks=["sum", "product"])
    for _ in range(150):
        hidden = trunk(x)
        losses = {name: (heads[name](hidden) - target).square().mean() for name, target in targets.items()}
        optimizer.zero_grad()
        sgl.backward(losses)
        optimizer.step()
        history.append([loss.item() for loss in losses.values()])
    assert history[-1][0] < 0.1 * history[0][0]
    assert history[-1][1] < 0.1 * history[0][1]


def test_wrong_arguments_are_named() -> None:
    model = TwoHeads()
    shared, tasks = model.shared(), ["t0", "t1", "t2"]
    for message, arguments, options in (
        ("tasks: ", (shared, []), {}),
        ("tasks: ", (shared, ["a", "a"]), {}),
        ("shared_parameters: ", ([], tasks), {}),
        ("scope: ", (shared, tasks), {"scope": "trunk"}),
        ("every: ", (shared, tasks), {"every": 0}),
        ("beta: ", (shared, tasks), {"beta": 1.0}),
        ("direction: ", (shared, tasks), {"direction": "mean"}),
        ("weight_beta: ", (shared, tasks), {"weight_beta": -0.1}),
        ("variance_window: ", (shared, tasks), {"variance_window": 1}),
        ("last_shared_layer: ", (shared, tasks), {"scope": "last_shared_layer"}),
        ("task_parameters: ", (shared, tasks), {"task_parameters": shared[:1]}),
        ("statistics: ", (shared, tasks), {"statistics": False}),
        ("control: ", (shared, tasks), {"control": True, "variance_window": 0}),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            SelfGuided(*arguments, **options)
    with pytest.raises(TypeError, match=r"^shared_parameters: .*Tensor"):
        SelfGuided([torch.zeros(2)], tasks)
    with pytest.raises(TypeError, match=r"^balancer: .*int"):
        SelfGuided(shared, tasks, balancer=3)

    (x,) = batches(1)
    losses, _, hidden = model.losses(x)
    sgl = make(model, "shared_parameters")
    with pytest.raises(ValueError, match=r"^losses: .*'other'"):
        sgl.backward({"other": losses["t0"]})
    with pytest.raises(ValueError, match=r"^losses\['t0'\]: .*shape \(2,\)"):
        sgl.backward({"t0": torch.stack([losses["t0"], losses["t1"]])})
    with pytest.raises(ValueError, match=r"^losses\['t0'\]: .*constant"):
        sgl.backward({"t0": losses["t0"].detach()})
    with pytest.raises(TypeError, match=r"^losses\['t0'\]: .*float"):
        sgl.backward({"t0": 1.0})
    with pytest.raises(ValueError, match=r"^task_parameters: .*2 parameters"):
        make(model, "shared_parameters", task_parameters=model.own()[2:]).backward(losses)
    other = make(model, "representation")
    for wrong in (None, hidden.detach()):
        with pytest.raises(ValueError, match=r"^representation: "):
            other.backward(losses, representation=wrong)
    assert not other.backward({}, representation=None).weights.any()  # a batch without labels needs none
    with pytest.raises(ValueError, match=r"^state_dict: expected scope"):
        other.load_state_dict(sgl.state_dict())


@pytest.mark.parametrize("wrap", [lambda z: [z], lambda z: (z, z), lambda z: {"a": z}])
def test_a_representation_that_is_no_tensor_is_named(wrap: Callable[[Tensor], Any]) -> None:
    trunk, head = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)
    balanced = SelfGuided(trunk.parameters(), ["a", "b"], scope="representation", variance_window=0)
    z = trunk(torch.randn(5, 3))
    losses = dict(zip("ab", head(z).square().mean(0), strict=True))
    got = type(wrap(z)).__name__
    with pytest.raises(ValueError, match=f"^representation: expected a Tensor .*, got {got} .of several"):
        balanced.backward(losses, representation=wrap(z))
    assert all(p.grad is None for p in (*trunk.parameters(), *head.parameters()))
    balanced.backward(losses, representation=z)
