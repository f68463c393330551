"""The C library's heap. Lowest floor: imports nothing of the package."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's mallopt(3)
_NEVER = 2**31 - 1


def keep_freed_pages() -> bool:
    """Tell glibc to keep freed memory for this process instead of giving large blocks back to the system.

    By default every large temporary is returned and then faulted in again page by page, which can take longer
    than the arithmetic on it. The price: the process stays as large as it has ever been.

    Returns:
        Whether the C library took it; False where it is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, _NEVER)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


def settle_heap() -> str:
    """The heap of a training, and of what is timed for one: `keep_freed_pages`, unless `UMDA_FAST_HEAP=default`.

    Returns:
        ``keep``, or ``default`` where it stays as it is.
    """
    wanted = os.environ.get("UMDA_FAST_HEAP", "keep") != "default"
    return "keep" if wanted and keep_freed_pages() else "default"
