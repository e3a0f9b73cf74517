"""Entry point of `python -m benchmarks`."""

from __future__ import annotations

import sys
from pathlib import Path


def _leave_source_folder() -> None:
    """Take the repository root off the import path.

    `python -m` puts the working folder first. Its source folder `dpfast` has no extension module
    unless the install is editable and would hide the installed package. Our own modules are still
    found: this package's search path is set once it is imported.
    """
    root = Path(__file__).resolve().parent.parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != root]


if __name__ == "__main__":
    _leave_source_folder()
    from benchmarks._cli import main

    sys.exit(main())
