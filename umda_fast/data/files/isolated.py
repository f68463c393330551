"""Calls in a process of their own: a library that never comes back, or crashes, becomes an error with a file's name.

From some corrupt HDF5 files libhdf5 (1.14) does not return, and on others it ends the process: one wrong byte in the
heap of strings is enough. Python cannot interrupt it. So whatever a file's first reading is, it is done elsewhere.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import warnings
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch

from umda_fast.errors import DataError

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# Where forking is safe beside the threads of torch, as it is for its loaders of data.
FORKS = sys.platform == "linux"


class IsolatedCalls:
    """Functions called in one forked process, which is made when it is first needed and again after it was lost.

    The limit is processor time of that process: neither a slow disk nor a busy machine uses it up, a loop without end
    does. Elsewhere than on Linux functions are called in this process. A context manager, which ends the process.

    Args:
        limit: seconds of processor time for one call.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._process = 0
        self._pipe: Connection | None = None

    def __enter__(self) -> IsolatedCalls:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def __call__(
        self, path: Path, function: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Result:
        """`function(*args, **kwargs)`, whose result or exception is pickled.

        Raises:
            DataError: naming `path`: the call took longer than the limit, or ended its process.
        """
        if not FORKS:
            return function(*args, **kwargs)
        try:
            if self._pipe is None:
                self._start()
            assert self._pipe is not None
            self._pipe.send((function, args, kwargs))
            failed, result = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise DataError(f"{path}: {self._loss()}") from None
        except BaseException:  # an interrupt: the answer still under way must not be taken for that of the next call
            self._end()
            raise
        if failed:
            raise result
        value: _Result = result
        return value

    def _start(self) -> None:
        ours, theirs = Pipe()
        with warnings.catch_warnings():
            # Python 3.12 warns of threads; this process runs none of their code and one thread of torch.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process = os.fork()
        if self._process == 0:
            ours.close()
            _serve(theirs, self._limit)
        theirs.close()
        self._pipe = ours

    def _loss(self) -> str:
        """Why the process is gone."""
        status = self._end(kill=False)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
            return (
                f"corrupt, or too slow to read: not done after {self._limit:g} s of processor time; "
                "to wait for longer: --set data.options.read_timeout=600"
            )
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            return f"corrupt, or too large for the memory: the process that read it was ended by {name}"
        return f"corrupt: the process that read it ended with exit code {os.waitstatus_to_exitcode(status)}"

    def _end(self, kill: bool = True) -> int:
        status = 0
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
            if kill:
                os.kill(self._process, signal.SIGKILL)
            status = os.waitpid(self._process, 0)[1]
        return status


def _serve(pipe: Connection, limit: float) -> NoReturn:
    """The other process: calls one function after the other until nobody asks."""
    import resource  # not on Windows

    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, also within a library
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        torch.set_num_threads(1)  # those of the parent's pool are not here
        while True:
            function, args, kwargs = pipe.recv()
            signal.setitimer(signal.ITIMER_PROF, limit)
            answer: tuple[bool, Any]
            try:
                answer = False, function(*args, **kwargs)
            except Exception as error:
                answer = True, error
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            pipe.send(answer)
    except EOFError:
        code = 0
    finally:
        os._exit(code)  # nothing of the parent's is flushed or cleaned up twice
