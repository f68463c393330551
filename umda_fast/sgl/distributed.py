"""Several processes: rows of gradients shared out by columns, and gradients summed in buckets.

Three kinds of traffic, for W processes and P numbers:

- **small**: losses, counts, Gram matrices. Gathered everywhere and added in the order of the processes, in
  float64, so that every process holds the same bits whatever algorithm the backend reduces with.
- **rows** (`ShardedRows`): a row [P] on every process becomes the sum of all of them, of which each process
  keeps ceil(P / W) columns. NCCL reduces and scatters. Elsewhere the pieces are exchanged (all-to-all) and
  added here in the order of the processes: gloo's own reduce-scatter is an all-reduce underneath, whose
  traffic is W times as much.
- **buckets** (`GradientReducer`): gradients of plain backward passes, summed while the pass goes on.

Every process makes the same calls in the same order, also one with an empty batch. A process that ends, or
that does not answer within the timeout of the process group, is a `ProcessLostError` in all others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from umda_fast.errors import ProcessLostError
from umda_fast.sgl.buffers import FlatLayout, in_use, memory_order, write_row
from umda_fast.sgl.graph import Reach
from umda_fast.sgl.linear import LinearUse
from umda_fast.sgl.rows import Rows

__all__ = ["GradientReducer", "Processes", "ShardedRows", "is_sharded"]

# torch 2.13 renames two collectives and warns about the old names, which are all that torch 2.11 has.
_gather_into: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process holds a part of the parameter only, as with FSDP2."""
    tensor = sys.modules.get("torch.distributed.tensor")  # whoever made one has imported it
    return tensor is not None and isinstance(parameter, tensor.DTensor)


class Processes:
    """A process group of torch.distributed.

    Attributes:
        rank: of this process in the group.
        size: number of processes.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        backends = dist.get_backend_config(group)
        self._scatters = "nccl" in backends
        self._host = "cpu:" in backends

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = " ".join(str(error).split()).split(". ")[0][:300]
            raise ProcessLostError(
                f"process {self.rank} of {self.size}: another process of this group ended or did not answer in "
                f"time ({reason})"
            ) from error

    def total(self, values: Tensor) -> Tensor:
        """Sum over the processes, float64, on the device of `values`: the same bits everywhere."""
        wide = values.detach().double().contiguous()
        gathered = wide.new_empty(self.size, *wide.shape)
        with self._watched():
            _gather_into(gathered.view(-1), wide.view(-1), group=self.group)
        return gathered.sum(0)

    def total_on_host(self, values: Sequence[float]) -> list[float]:
        """Sums of numbers that lie on the host. Waits for the device only where the group has no backend for
        the CPU."""
        device = torch.device("cpu") if self._host else torch.device("cuda", torch.cuda.current_device())
        result: list[float] = self.total(torch.tensor(values, dtype=torch.float64, device=device)).tolist()
        return result

    def from_first(self, values: Tensor) -> Tensor:
        """What process 0 has in `values`, in the memory of `values`."""
        sent = values.contiguous()  # backends take nothing else
        with self._watched():
            dist.broadcast(sent, group=self.group, group_src=0)
        return values if sent is values else values.copy_(sent)

    def objects(self, value: Any) -> list[Any]:
        """What every process gives, by rank, in all of them; anything that can be pickled."""
        result: list[Any] = [None] * self.size
        with self._watched():
            dist.all_gather_object(result, value, group=self.group)
        return result

    def object_from_first(self, value: Any) -> Any:
        """What process 0 gives."""
        result = [value]
        with self._watched():
            dist.broadcast_object_list(result, group=self.group, group_src=0)
        return result[0]

    def start_sum(self, values: Tensor) -> dist.Work:
        """Begins to replace `values` by its sum over the processes; see `wait`."""
        with self._watched():
            work: dist.Work | None = dist.all_reduce(values, group=self.group, async_op=True)
        assert work is not None
        return work

    def start_scatter(self, row: Tensor, received: Tensor | None, out: Tensor) -> dist.Work:
        """Begins to sum `row` [W S]: into `out` [S], or, with `received` [W S], the pieces of all processes
        into that."""
        with self._watched():
            work: dist.Work | None
            if received is None:
                work = _reduce_scatter(out, row, group=self.group, async_op=True)
            else:
                work = dist.all_to_all_single(received, row, group=self.group, async_op=True)
        assert work is not None
        return work

    def gather(self, shard: Tensor, out: Tensor) -> None:
        """The shards [S] of all processes behind one another in `out` [W S]."""
        with self._watched():
            _gather_into(out, shard, group=self.group)

    def wait(self, work: dist.Work) -> None:
        """Lets what follows on this device come after `work`; on the CPU, waits for it."""
        with self._watched():
            work.wait()

    def scatters(self, device: torch.device) -> bool:
        """Whether the backend for `device` has a reduce-scatter that is one."""
        return self._scatters and device.type == "cuda"


class ShardedRows(Rows):
    """Rows [count, S] of this process: its S = ceil(P / W) columns of sums over all processes.

    `put` takes a row's gradients on this process; a second row may be made while the first is on its way.
    Memory: count S numbers for the rows, 2 P for rows on their way (4 P without a reduce-scatter).

    Attributes:
        rows: [count, S]; complete after `wait`. Columns beyond P (in the last process) are zero.
    """

    def __init__(self, layout: FlatLayout, count: int, processes: Processes) -> None:
        self._processes = processes
        self._layout = layout
        self.columns = -(-layout.numel // processes.size)
        padded = self.columns * processes.size
        device, dtype = layout.device, layout.dtype
        self.rows = torch.zeros(count, self.columns, device=device, dtype=dtype)
        slots = min(2, count)
        self._staging = torch.zeros(slots, padded, device=device, dtype=dtype)
        self._views = [layout.views(row[: layout.numel]) for row in self._staging]
        self._received = None if processes.scatters(device) else torch.empty_like(self._staging)
        self._pending: list[tuple[dist.Work, int] | None] = [None] * slots
        self._next = 0
        self._gathered: Tensor | None = None

    def uses(self, reach: Reach, parameters: Sequence[Tensor]) -> list[LinearUse | None]:
        """None: the gradients themselves travel."""
        return [None] * len(parameters)

    def put(self, row: int, gradients: Sequence[Tensor | None], uses: Sequence[LinearUse | None] = ()) -> None:
        """Sends this process's part of a row, one gradient for each parameter, None for zeros."""
        slot = self._next
        self._next = (slot + 1) % len(self._pending)
        self._take(slot)
        write_row(self._views[slot], gradients)
        received = None if self._received is None else self._received[slot]
        self._pending[slot] = self._processes.start_scatter(self._staging[slot], received, self.rows[row]), row

    def wait(self) -> None:
        """Completes every row sent."""
        for slot in range(len(self._pending)):
            self._take(slot)

    def _take(self, slot: int) -> None:
        pending = self._pending[slot]
        if pending is None:
            return
        self._pending[slot] = None
        work, row = pending
        self._processes.wait(work)
        if self._received is not None:
            torch.sum(self._received[slot].view(-1, self.columns), 0, out=self.rows[row])

    def _padded(self) -> Tensor:
        """Zeros [W S], for `Processes.gather`; the first P are the row."""
        return self._staging.new_zeros(self._staging.shape[1])

    def part(self) -> Tensor:
        """[S]."""
        return self.rows.new_empty(self.columns)

    def spread(self, part: Tensor) -> Tensor:
        """Gathers the parts."""
        if self._gathered is None or in_use(self._gathered):
            self._gathered = self._staging.new_empty(self._staging.shape[1])
        self._processes.gather(part, self._gathered)
        return self._gathered[: self._layout.numel]

    def whole(self, rows: Tensor, *, keep: bool = True) -> Tensor:
        """All columns [count, P] of `rows` [count, S], gathered a row at a time. Every process calls it; without
        `keep` nothing is left of it ([count, 0])."""
        size = self._layout.numel if keep else 0
        result = rows.new_empty(len(rows), size)
        buffer = self._padded()
        for shard, out in zip(rows, result, strict=True):
            self._processes.gather(shard, buffer)
            out.copy_(buffer[:size])
        return result

    def own(self, whole: Tensor) -> Tensor:
        """This process's columns [count, S] of [count, P]."""
        first = self._processes.rank * self.columns
        part = whole[:, first : first + self.columns]
        return torch.nn.functional.pad(part, (0, self.columns - part.shape[1]))


class _Bucket:
    """Gradients of some parameters of one dtype behind one another, in one buffer, made when it is needed first."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.buffer = torch.empty(0, dtype=parameters[0].dtype, device=parameters[0].device)
        self.views: list[Tensor] = []
        self.before: list[Tensor | None] = []
        self.missing: set[int] = set()
        self.work: dist.Work | None = None

    def begin(self) -> None:
        """Puts `.grad` of its parameters aside and lets it be a zeroed view of the buffer."""
        if not self.views:
            sizes = [p.numel() for p in self.parameters]
            self.buffer = self.buffer.new_zeros(sum(sizes))
            pieces = self.buffer.split(sizes)
            laid = zip(pieces, self.parameters, strict=True)
            self.views = [piece.as_strided(p.shape, memory_order(p), piece.storage_offset()) for piece, p in laid]
        start = self.buffer.untyped_storage().data_ptr()
        self.before = []
        for parameter in self.parameters:
            grad = parameter.grad
            if grad is not None and grad.untyped_storage().data_ptr() == start:
                grad = grad.clone()  # left there by the last call, and not zeroed since
            self.before.append(grad)
        self.buffer.zero_()
        for parameter, view in zip(self.parameters, self.views, strict=True):
            parameter.grad = view
        self.missing = {id(parameter) for parameter in self.parameters}
        self.work = None


class GradientReducer:
    """Adds the sum over the processes of their gradients to `.grad`, as DistributedDataParallel does it:
    in buckets, in reverse order of the parameters, each sent as soon as it is complete.

    It works beside `torch.autograd.grad`, which DistributedDataParallel does not. A parameter that the pass
    reaches in no process keeps its `.grad` as it was; one that it reaches in some gets their sum in all. Sparse
    gradients become dense. After `backward` `.grad` is a view of a buffer that the next call reuses (keep a clone, not
    the tensor).

    Args:
        groups: lists of parameters, the same in every process; the last ones of the last list are expected to
            be complete first. A pass may leave out all lists but the last ones.
        processes: the group.
        bucket: numbers in a bucket, at most, where a parameter alone does not have more.
        overlap: send a bucket as soon as it is complete, and not after the pass.

    Raises:
        ValueError: parameters on several devices.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Tensor]],
        processes: Processes,
        bucket: int = 1 << 22,
        overlap: bool = True,
    ) -> None:
        self._processes = processes
        self._overlap = overlap
        devices = {p.device for group in groups for p in group}
        if len(devices) > 1:
            raise ValueError(f"parameters: expected one device, got {sorted(map(str, devices))}")
        self._groups: list[list[_Bucket]] = []
        for group in reversed(groups):
            buckets: list[_Bucket] = []
            taken: list[Tensor] = []
            for parameter in reversed(group):
                size = sum(p.numel() for p in taken) + parameter.numel()
                if taken and (size > bucket or taken[0].dtype != parameter.dtype):
                    buckets.append(_Bucket(taken))
                    taken = []
                taken.append(parameter)
            if taken:
                buckets.append(_Bucket(taken))
            self._groups.append(buckets)
        self._active: list[_Bucket] = []
        self._started = 0
        self._where: dict[int, _Bucket] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def backward(self, total: Tensor | None) -> None:
        """A backward pass of `total` (None: this process has nothing to add)."""
        self.begin()
        try:
            for bucket in self._active:
                trained = [parameter for parameter in bucket.parameters if parameter.requires_grad]
                self._hooks += [parameter.register_post_accumulate_grad_hook(self._arrived) for parameter in trained]
            if total is not None:
                torch.autograd.backward(total)
        except BaseException:
            self._restore()
            raise
        finally:
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
        self.finish()

    def begin(self, groups: int | None = None) -> None:
        """Begins a pass over the last `groups` lists of parameters (None: all)."""
        self._active = [bucket for buckets in self._groups[:groups] for bucket in buckets]
        self._started = 0
        self._where = {id(p): bucket for bucket in self._active for p in bucket.parameters}
        for bucket in self._active:
            bucket.begin()

    def add(self, gradients: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Adds gradients of this process to the pass begun; gives those back whose parameter it is not about."""
        rest = []
        for parameter, gradient in gradients:
            bucket = self._where.get(id(parameter))
            if bucket is None:
                rest.append((parameter, gradient))
                continue
            assert parameter.grad is not None
            parameter.grad.add_(gradient)
            bucket.missing.discard(id(parameter))
        return rest

    def start(self) -> None:
        """Sends what has not been sent; nothing may be added afterwards."""
        for bucket in self._active[self._started :]:
            bucket.work = self._processes.start_sum(bucket.buffer)
        self._started = len(self._active)

    def finish(self) -> None:
        """Waits for the sums and adds them to what `.grad` held before `begin`."""
        for bucket, everywhere in self._complete():
            sums: list[Tensor] = []
            olds: list[Tensor] = []
            before = zip(bucket.parameters, bucket.views, bucket.before, everywhere, strict=True)
            for parameter, view, old, reached in before:
                if not reached:
                    parameter.grad = old
                elif old is not None:
                    sums.append(view)
                    olds.append(old)
            if sums:
                torch._foreach_add_(sums, olds)
            bucket.before = []

    def sums(self) -> list[tuple[Tensor, Tensor]]:
        """Waits for the sums, and leaves `.grad` as it was before `begin`; views that the next pass overwrites."""
        found = []
        for bucket, everywhere in self._complete():
            for parameter, old in zip(bucket.parameters, bucket.before, strict=True):
                parameter.grad = old
            bucket.before = []
            summed = zip(bucket.parameters, bucket.views, everywhere, strict=True)
            found += [(parameter, view) for parameter, view, reached in summed if reached]
        return found

    def _complete(self) -> list[tuple[_Bucket, list[bool]]]:
        """The buckets, summed, and which of their parameters some process reaches."""
        if not self._active:
            return []
        try:
            self.start()
            # A parameter missing here may have been reached elsewhere; nothing missing here needs no look.
            reached = [id(p) not in bucket.missing for bucket in self._active for p in bucket.parameters]
            flags = torch.tensor(reached, dtype=torch.float32, device=self._active[0].buffer.device)
            work = self._processes.start_sum(flags)
            for bucket in self._active:
                assert bucket.work is not None
                self._processes.wait(bucket.work)
            self._processes.wait(work)
        except BaseException:
            self._restore()
            raise
        everywhere = iter(reached if all(reached) else (flags > 0).tolist())
        found = [(bucket, list(islice(everywhere, len(bucket.parameters)))) for bucket in self._active]
        self._active = []
        return found

    def _arrived(self, parameter: Tensor) -> None:
        """The gradient of a parameter is complete; sends every bucket that is, in their order."""
        self._where[id(parameter)].missing.discard(id(parameter))
        while self._overlap and self._started < len(self._active) and not self._active[self._started].missing:
            bucket = self._active[self._started]
            bucket.work = self._processes.start_sum(bucket.buffer)
            self._started += 1

    def _restore(self) -> None:
        """After an error: `.grad` as it was."""
        for bucket in self._active:
            for parameter, old in zip(bucket.parameters, bucket.before, strict=True):
                parameter.grad = old
        self._active = []
