"""Peak memory and seconds of bags too large for all activations at once: training steps and inference.

    python -m bench.bench_large_bags [--threads N] [--train 100000] [--infer 500000] [--json FILE]

Each case runs in a process of its own, whose peak of resident memory (torch itself and the features included) is
reported. Features are float16, as patch encoders' are stored: two views, 1024 and 768 wide. A training step is the
Trainer's: forward, losses and penalties, self-guided balancing of two tasks, AdamW. It runs `--steps` times, on one
bag each, and the least time counts.

What is least possible: the features themselves, and of what follows some arrays [N, D] in float32.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umda_fast.data import Bag, BagDataset
from umda_fast.model import UMDA, TaskSpec, UMDAConfig, ViewSpec
from umda_fast.model.chunked import forward_chunked
from umda_fast.runtime.progress import peak_memory_mb
from umda_fast.train import make_config, train

VIEWS = (ViewSpec("a", 1024), ViewSpec("b", 768))
TASKS = (TaskSpec("grade", "multiclass", 3), TaskSpec("age", "regression", mean=50.0, std=20.0))
CHUNK = 4096

# name -> settings of the run
TRAINING: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks": {"model": {"chunk": CHUNK}},
    "chunks, bf16-mixed": {"model": {"chunk": CHUNK}, "precision": "bf16-mixed"},
    "chunks, instance dropout 0.5": {"model": {"chunk": CHUNK}, "data": {"instance_dropout": 0.5}},
}
INFERENCE = ("whole", "chunks")


def features(instances: int) -> dict[str, Tensor]:
    """Random float16 features, made piece by piece so that making them is not the peak."""
    generator = torch.Generator().manual_seed(0)
    made = {view.name: torch.empty(instances, view.width, dtype=torch.float16) for view in VIEWS}
    for whole in made.values():
        for piece in whole.split(4096):
            piece.copy_(torch.randn(piece.shape, generator=generator))
    return made


def train_once(instances: int, settings: dict[str, Any], steps: int) -> dict[str, float]:
    """Seconds of a step, by the Trainer's clock."""
    labels = {"grade": torch.tensor(1), "age": torch.tensor(60.0)}
    data = BagDataset([Bag("bag", features(instances), labels=labels)], VIEWS, TASKS, "random bags")
    values: dict[str, Any] = {
        "device": "cpu",
        **settings,
        "train": {"epochs": steps, "ema": 0.0, "keep": "scores", "warmup": 0.0},
        "data": {**settings.get("data", {}), "budget": instances},
    }
    with tempfile.TemporaryDirectory() as place:
        train(make_config(values), Path(place) / "run", datasets={"train": data}, progress=False, plots=False)
        records = [json.loads(line) for line in (Path(place) / "run" / "metrics.jsonl").read_text().splitlines()]
    kept = instances * (1.0 - settings.get("data", {}).get("instance_dropout", 0.0))
    # The log has the mean rate of training so far; its inverse, times instances, is time.
    until = [0.0, *(r["step"] * kept / r["instances_per_second"] for r in records if r["kind"] == "epoch")]
    took = [end - begin for begin, end in pairwise(until)]
    return {"seconds": min(took)}


def infer_once(instances: int, chunked: bool) -> dict[str, float]:
    """Seconds of one forward, and of the graph and its messages within it."""
    torch.manual_seed(0)
    model = UMDA(UMDAConfig(VIEWS, TASKS)).eval()
    assert model.gmip is not None
    views, ptr = features(instances), torch.tensor([0, instances])
    clock: list[float] = []
    model.gmip.register_forward_pre_hook(lambda *_: clock.append(time.perf_counter()))
    model.gmip.register_forward_hook(lambda *_: clock.append(time.perf_counter()))
    begin = time.perf_counter()
    with torch.no_grad():
        if chunked:
            forward_chunked(model, views, ptr, chunk=CHUNK)
        else:
            model({name: value.float() for name, value in views.items()}, ptr)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "graph": clock[1] - clock[0]}


def alone(kind: str, name: str, options: argparse.Namespace) -> None:
    """One case, in this process; its result as JSON on standard output."""
    torch.set_num_threads(options.threads)
    if kind == "train":
        result = train_once(options.train, TRAINING[name], options.steps)
    else:
        result = infer_once(options.infer, name == "chunks")
    print(json.dumps({**result, "peak_mb": peak_memory_mb()}))


def main() -> None:
    """Run every case in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--train", type=int, default=100_000, help="instances of the training bag; 0 leaves it out")
    parser.add_argument("--infer", type=int, default=500_000, help="instances of the bag inferred; 0 leaves it out")
    parser.add_argument("--steps", type=int, default=2, help="training steps of each case")
    parser.add_argument("--only", help="cases with this name")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        kind, name = options.case
        alone(kind, name, options)
        return
    cases = [("train", name, options.train) for name in TRAINING] + [
        ("infer", name, options.infer) for name in INFERENCE
    ]
    rows = []
    print(
        f"torch {torch.__version__}, {options.threads} threads; two views, {VIEWS[0].width} and {VIEWS[1].width} wide"
    )
    print(f"{'case':<40} {'instances':>10} {'features MB':>12} {'peak MB':>9} {'seconds':>9}")
    for kind, name, instances in cases:
        if not instances or options.only not in (None, name):
            continue
        sizes = ["--train", options.train, "--infer", options.infer, "--steps", options.steps]
        command = [sys.executable, "-m", "bench.bench_large_bags", "--case", kind, name, "--threads", options.threads]
        done = subprocess.run([str(word) for word in command + sizes], capture_output=True, text=True)
        stored = instances * sum(view.width for view in VIEWS) * 2 / 2**20
        if done.returncode:
            print(f"{kind + ', ' + name:<40} {instances:>10,} {stored:>12.0f} failed: {done.stderr.strip()[-200:]}")
            rows.append({"case": [kind, name], "instances": instances, "returncode": done.returncode})
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        note = f"  of which the graph and its messages {row['graph']:.1f}" if "graph" in row else ""
        line = f"{kind + ', ' + name:<40} {instances:>10,} {stored:>12.0f}"
        print(f"{line} {row['peak_mb']:>9.0f} {row['seconds']:>9.1f}{note}", flush=True)
        rows.append({"case": [kind, name], "instances": instances, "features_mb": stored, **row})
    if options.json is not None:
        options.json.write_text(
            json.dumps({"threads": options.threads, "torch": torch.__version__, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
