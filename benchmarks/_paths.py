"""The import path of a program that is started from the repository's root."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["leave_source_folder"]


def leave_source_folder() -> None:
    """Take the repository root off the import path.

    `python -m` puts the working folder first. Its source folder `dpfast` has no extension module
    unless the install is editable and would hide the installed package. Our own modules are still
    found: this package's search path is set once it is imported.
    """
    root = Path(__file__).resolve().parent.parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != root]
