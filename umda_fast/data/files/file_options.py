"""How files of bags are read: the options that packing and a source of slides have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from umda_fast.data.options import as_names, option
from umda_fast.errors import DataError

Matching: TypeAlias = Literal["coords", "position"]


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """How files of bags are read.

    Attributes:
        views: which views, in this order; None: all, by name.
        mpp: micrometres per level-0 pixel of all slides; None takes the files' or the table's column mpp.
        match: how rows of several views are brought together: by coords, or by position in the file.
        tolerance: in micrometres, of coordinates that are not whole pixels.
        skip_bad: leave out what is bad and list it in `Splits.skipped`, instead of stopping. Reads every file once.
        read_timeout: seconds of processor time that the first reading of one file may take before it counts as bad:
            the library does not come back from some corrupt HDF5 files. (On Linux; not of a packed directory.)
    """

    views: Sequence[str] | None = None
    mpp: float | None = option(None, local=True)
    match: Matching = "coords"
    tolerance: float = 1.0
    skip_bad: bool = False
    read_timeout: float = 60.0

    @property
    def chosen_views(self) -> list[str] | None:
        """`views` as a list."""
        return None if self.views is None else as_names(self.views)

    def check(self) -> None:
        """Raise DataError for a value that no reading can be done with."""
        if self.match not in ("coords", "position"):
            raise DataError(f"match: expected coords or position, got {self.match!r}")
        if not self.tolerance > 0:
            raise DataError(f"tolerance: expected a positive number of micrometres, got {self.tolerance!r}")
        if not self.read_timeout > 0:
            raise DataError(f"read_timeout: expected a positive number of seconds, got {self.read_timeout!r}")
