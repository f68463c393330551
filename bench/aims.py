"""What the kernels were designed to reach on an H200, held against what a run measured."""

from collections.abc import Callable, Mapping
from typing import Any

from .training_step import COMPOSED, COMPOSED_COMPILED, EXACT, LARGEST
from .workloads import CHUNKED, FLASH, OURS, SDPA

Record = dict[str, Any]


def judge(result: Mapping[str, Any]) -> list[Record]:
    """One row per aim: ``aim``, ``target``, ``value``, ``verdict`` (met, not met, not measured), ``detail``.

    Only full-size runs on a GPU are held to the aims.
    """
    if result["run"]["profile"] != "cuda":
        return [_row(name, target, None, "on a GPU, at full size") for name, target, _ in AIMS]
    return [_row(name, target, *measure(result)) for name, target, measure in AIMS]


def _row(aim: str, target: float, value: float | None, detail: str) -> Record:
    verdict = "not measured" if value is None else "met" if value >= target else "not met"
    return {"aim": aim, "target": target, "value": value, "verdict": verdict, "detail": detail}


Measured = tuple[float | None, str]
Measure = Callable[[Mapping[str, Any]], Measured]


def _contender(record: Mapping[str, Any], name: str) -> Record | None:
    """A contender that was timed."""
    return next((x for x in record["contenders"] if x["name"] == name and x["seconds"]), None)


def _find(result: Mapping[str, Any], op: str, direction: str, where: Callable[[Record], bool]) -> Record | None:
    """The largest problem that ours was timed on."""
    found = [
        x
        for x in result["timings"]
        if x["op"] == op and x["pass"] == direction and where(x) and _contender(x, OURS) is not None
    ]
    return max(found, key=lambda x: x["floor"]["seconds"], default=None)


def _share(op: str, direction: str, least: int = 0) -> Measure:
    """Ours as a share of the floor, at the largest size."""

    def measure(result: Mapping[str, Any]) -> Measured:
        record = _find(result, op, direction, lambda x: x["size"] >= least)
        if record is None:
            return None, "not timed"
        value = record["contenders"][0]["share"]
        return value, f"{value:.0%} of the floor, {record['shape']}, {record['dtype']}"

    return measure


def _ratio(op: str, direction: str, name: str, where: Callable[[Record], bool]) -> Measure:
    """How many times as long as ours a contender takes."""

    def measure(result: Mapping[str, Any]) -> Measured:
        record = _find(result, op, direction, lambda x: where(x) and _contender(x, name) is not None)
        if record is None:
            return None, f"not timed beside {name}"
        other = _contender(record, name)
        assert other is not None
        return other["ratio"], f"{other['ratio']:.2f} times as fast, {record['shape']}, {record['dtype']}"

    return measure


def _knn_memory(result: Mapping[str, Any]) -> Measured:
    """n k pairs of int32 and float32 over what the search allocated: about 1 where it is O(n k)."""
    record = _find(result, "knn", "forward", lambda x: x["size"] >= 100_000)
    grown = record["contenders"][0]["peak_bytes"] if record else None
    if record is None or not grown:
        return None, "not measured"
    pairs = 8.0 * record["size"] * int(record["shape"].split("k = ")[1].split(",")[0])
    return pairs / grown, f"allocated {grown / pairs:.1f} times the result, {record['shape']}"


def _step(name: str, field: str) -> Measure:
    """A contender of the training step against ours, at the largest bag that both were timed on."""

    def measure(result: Mapping[str, Any]) -> Measured:
        for step in sorted(result["steps"], key=lambda x: -x["instances"]):
            ours, other = _contender(step, OURS), _contender(step, name)
            if ours is None or other is None:
                continue
            if field == "seconds":
                value = other["seconds"]["median"] / ours["seconds"]["median"]
            elif ours["peak_bytes"] is None or other["peak_bytes"] is None:
                continue
            else:
                # All that a step needs: what it allocates and what lies there before.
                value = (other["peak_bytes"] + step["resident_bytes"]) / (ours["peak_bytes"] + step["resident_bytes"])
            return value, f"{value:.2f} times ours, {step['instances']:,} instances"
        return None, f"not measured beside {name}"

    return measure


def _largest(result: Mapping[str, Any]) -> Measured:
    found = result["largest"]
    if not found or found["status"] != "timed":
        return None if not found or found["status"] == "skipped" else 0.0, (found or {}).get("detail") or "not run"
    peak = "" if found["peak_bytes"] is None else f", {found['peak_bytes'] / 2**30:.0f} GiB"
    return float(found["finite"]), f"{found['instances']:,} instances: {found['seconds']:.1f} s{peak}"


def _tokens(width: int) -> Callable[[Record], bool]:
    return lambda x: x["size"] == 4096 and x["shape"].endswith(f"x {width}")


def _knn(width: int) -> Callable[[Record], bool]:
    return lambda x: x["size"] == 100_000 and f"d = {width}," in x["shape"] and x["dtype"] == "bfloat16"


#: What is wanted, the least value that meets it, and how it is measured.
AIMS: tuple[tuple[str, float, Measure], ...] = (
    ("cross_view forward, share of the copy rate, N >= 10^6", 0.85, _share("cross_view", "forward", 1_000_000)),
    ("cross_view backward, share of the copy rate, N >= 10^6", 0.80, _share("cross_view", "backward", 1_000_000)),
    *(
        (f"cross_view {way}, times {SDPA}", 10.0, _ratio("cross_view", way, SDPA, lambda x: x["size"] >= 1_000_000))
        for way in ("forward", "backward")
    ),
    *(
        (
            f"cross_view_tokens {way}, Dh {width}, 4k tokens, speed of {FLASH}",
            0.9,
            _ratio("cross_view_tokens", way, FLASH, _tokens(width)),
        )
        for width in (64, 128)
        for way in ("forward", "backward")
    ),
    *(
        (f"knn, n = 100k, d = {width}, times {CHUNKED}", 5.0, _ratio("knn", "forward", CHUNKED, _knn(width)))
        for width in (64, 256)
    ),
    ("knn, memory: result over allocation", 1 / 3, _knn_memory),
    *(
        (f"{op} {way}, share of the copy rate", 0.8, _share(op, way))
        for op in ("bag_pool", "edge_cosine", "neighbor_attention", "neighbor_sum", "smoothness_energy")
        for way in ("forward", "backward")
    ),
    *(
        (f"{op}, share of the copy rate", 0.8, _share(op, "forward"))
        for op in ("task_gradient_statistics", "combine_task_gradients")
    ),
    ("training step, times the eager reference", 8.0, _step(EXACT, "seconds")),
    ("training step, times eager with a chunked graph", 8.0, _step(COMPOSED, "seconds")),
    ("training step, times torch.compile of that", 3.0, _step(COMPOSED_COMPILED, "seconds")),
    ("training step, memory of eager over ours", 4.0, _step(COMPOSED, "memory")),
    (f"one bag of {LARGEST:,} instances x 3 views trains", 1.0, _largest),
)
