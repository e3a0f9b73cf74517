"""Tables as text: the terminal and the report show the same."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

__all__ = ["NOT_MEASURED", "TextTable", "not_measured"]

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class TextTable:
    """A table.

    Attributes:
      title: for the terminal.
      headings: of the columns.
      rows: cells as text.
      left: headings of the columns that are words rather than figures.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Collection[str] = ()


def not_measured(reason: str | None) -> str:
    """What stands where there is no figure."""
    return NOT_MEASURED if reason is None else f"{NOT_MEASURED}: {reason}"
