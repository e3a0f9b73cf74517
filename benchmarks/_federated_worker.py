"""Measures the peak memory of a federation's rounds: `python -m benchmarks._federated_worker`.

Its argument is a row and a number of threads as JSON; the last line that it prints is the result as
JSON, or how it failed.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import asdict, replace

from benchmarks._paths import leave_source_folder


def main(argument: str) -> None:
    """Run the rounds and print their peak, above what the sites with their data hold."""
    import torch

    from benchmarks._federated_cases import Case
    from benchmarks._federated_run import federation, run
    from benchmarks._memory import peak_of_call
    from benchmarks._record import failure

    warnings.simplefilter("ignore")
    request = json.loads(argument)
    torch.set_num_threads(request["threads"])
    case = Case.from_json(request["case"])
    try:
        # A small one first, which loads libraries and sets up their state.
        run(replace(case, sites=2, channels=(4, 8)))
        with federation(case) as rounds:
            found = asdict(peak_of_call(rounds, torch.device("cpu"), calls=1))
    except Exception as error:  # whatever it raises is what is to be told
        found = {"failure": failure(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    leave_source_folder()
    main(sys.argv[1])
