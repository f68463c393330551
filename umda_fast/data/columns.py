"""What a column of a table of labels was taken for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ColumnUse:
    """One column.

    Attributes:
        name: as in the header.
        use: `bag`, `patient`, `split`, `pixel size`, `metadata`, `task (<kind>)` or `left out`.
        why: in a few words.
    """

    name: str
    use: str
    why: str
