"""Functions run by several processes of torch.distributed (gloo) at once."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def _enter(function: Callable[..., Any], rank: int, size: int, place: str, seconds: float, args: bytes) -> None:
    directory = Path(place)
    torch.set_num_threads(1)
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # nobody asks for it: the group is there
    }
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{directory / 'store'}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=seconds),
        )
        (directory / f"result {rank}").write_bytes(pickle.dumps(function(*pickle.loads(args))))
        dist.destroy_process_group()
    except BaseException:
        (directory / f"error {rank}").write_text(traceback.format_exc(), encoding="utf-8")
        raise


def run_together(
    function: Callable[..., Any],
    size: int,
    *args: Any,
    timeout: float = 60.0,
    limit: float = 300.0,
    lost: tuple[int, ...] = (),
) -> list[Any]:
    """`function(*args)` in `size` processes of one group; what each of them returned, by rank.

    torch is imported once, by the server that the processes are forked from. They find the variables that
    torchrun sets. An error in a process is an error here.

    Args:
        function: of a module, not a local one.
        timeout: of collective operations, in seconds.
        limit: seconds for all of it.
        lost: processes that are expected to end without a result; theirs is None, and nobody waits for them.
    """
    context = multiprocessing.get_context("forkserver")
    # Imported once, by the first to come here, for all tests of this process.
    context.set_forkserver_preload([__name__, "umda_fast.train", "torch.distributed.fsdp"])
    # As bytes: a process takes some 250 tensors at most.
    given = pickle.dumps(args)
    with tempfile.TemporaryDirectory() as place:
        processes = [
            context.Process(target=_enter, args=(function, rank, size, place, timeout, given), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + limit
        results: list[Any] = [None] * size
        try:
            for rank, process in enumerate(processes):
                if rank in lost:
                    continue
                process.join(max(0.0, deadline - time.monotonic()))
                problems = [path.read_text(encoding="utf-8") for path in sorted(Path(place).glob("error *"))]
                assert not problems, "\n".join(problems)
                assert process.exitcode == 0, f"process {rank}: exit code {process.exitcode} (None: still running)"
                results[rank] = pickle.loads((Path(place) / f"result {rank}").read_bytes())
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
    return results
