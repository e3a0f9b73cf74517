"""Entry point of `python -m benchmarks`."""

from __future__ import annotations

import importlib
import sys

from benchmarks._paths import leave_source_folder

# Experiments with a command line of their own; all else measures ops.
_EXPERIMENTS = (
    *(
        "adp_fl",
        "agreement",
        "dp_morph",
        "instructions",
        "large_federation",
        "thresholds",
        "utility",
    ),
)

if __name__ == "__main__":
    leave_source_folder()
    arguments = sys.argv[1:]
    name = arguments.pop(0) if arguments and arguments[0] in _EXPERIMENTS else "_cli"
    sys.exit(importlib.import_module(f"benchmarks.{name}").main(arguments))
