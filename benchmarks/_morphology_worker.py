"""Measures one contender's peak memory: `python -m benchmarks._morphology_worker`.

Its argument is a row, a contender and a number of threads as JSON; the last line that it prints is
the result as JSON, or how the contender failed.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import asdict

from benchmarks._paths import leave_source_folder


def main(argument: str) -> None:
    """Build the contender, measure it and print the result."""
    import torch

    from benchmarks._morphology_cases import Case, MemoryCase
    from benchmarks._morphology_memory import peak
    from benchmarks._record import failure

    warnings.simplefilter("ignore")  # those of the peers are theirs
    request = json.loads(argument)
    torch.set_num_threads(request["threads"])
    case = MemoryCase(request["contender"], Case.from_json(request["case"]))
    try:
        found = asdict(peak(case, torch.device("cpu")))
    except Exception as error:  # whatever a peer raises is what is to be told
        found = {"failure": failure(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    leave_source_folder()
    main(sys.argv[1])
