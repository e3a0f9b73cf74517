"""Entry point of `python -m benchmarks`."""

from __future__ import annotations

import sys

from benchmarks._paths import leave_source_folder

if __name__ == "__main__":
    leave_source_folder()
    from benchmarks._cli import main

    sys.exit(main())
