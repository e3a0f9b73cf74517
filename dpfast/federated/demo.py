"""A federation of phantoms, trained by several methods side by side; needs no data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpfast.federated.report import write_report
from dpfast.federated.rounds import Observer
from dpfast.federated.training import federate

__all__ = ["METHODS", "demonstrate"]

_SETTINGS = """\
# Three hospitals that exist on paper alone: every number here may be changed.

[data]
kind = "phantoms"
patients = 300

[sites]
kind = "iid"
number = 3

[model]
arguments = {{ channels = [8, 16], strides = [2] }}

[training]
learning_rate = 0.02

[federation]
rounds = 6

[privacy]
{privacy}

[output]
folder = "{folder}"
"""
_PRIVATE = """\
privacy_unit = "patient"
target_epsilon = 8.0
target_delta = 1e-3
max_grad_norm = 0.5
expected_batch_size = 16"""
METHODS = {
    "non-private": "private = false\nexpected_batch_size = 16",
    "DP-FL, fixed threshold": _PRIVATE,
    "ADP-FL, private quantile": f'{_PRIVATE}\nthreshold = {{ kind = "private_quantile" }}',
}


def demonstrate(folder: Path, observer: Callable[[str], Observer]) -> dict[str, dict[str, Any]]:
    """Train phantoms at three sites by each method.

    Args:
      folder: for settings and run folders; what is finished there is not trained again.
      observer: makes one for a method's name.

    Returns:
      What each run's report.json holds, by method.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reports, runs = {}, []
    for number, (name, privacy) in enumerate(METHODS.items()):
        run = folder / f"run{number}"
        file = folder / f"run{number}.toml"
        file.write_text(_SETTINGS.format(privacy=privacy, folder=run.as_posix()))
        reports[name] = federate(file, observer(name))
        runs.append(run)
    write_report(runs, folder / "report.html")
    return reports
