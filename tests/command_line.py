"""The command line as a user calls it, in this process."""

import pytest

from umda_fast.cli import main


def call(*arguments: object) -> int:
    """Exit code of `umda-fast` with these arguments."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    code = stopped.value.code
    return code if isinstance(code, int) else 0 if code is None else 1
