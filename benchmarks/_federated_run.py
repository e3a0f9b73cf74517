"""A federated run on phantoms whose time is told apart: steps, the rest of the sites, the server.

Flower and pydantic are needed; the module is imported where they are.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks._federated_cases import Case
from dpfast.federated.flower.in_process import InProcessGrid
from dpfast.federated.run_folder import FederatedFolder
from dpfast.federated.server import Server
from dpfast.federated.settings import load_federated_settings
from dpfast.federated.sites import make_site, records_by_site
from dpfast.segmentation.data import make_data

__all__ = ["Seconds", "federation", "run"]

_SETTINGS = """\
[data]
kind = "phantoms"
patients = {patients}
validation_fraction = 0.4

[sites]
kind = "iid"
number = {sites}

[model]
arguments = {{ channels = {channels}, strides = {strides} }}

[training]
learning_rate = 0.01
local_epochs = {local_epochs}

[federation]
rounds = {rounds}
evaluate_every = {rounds}

[privacy]
noise_multiplier = 1.0
target_delta = 1e-6
max_grad_norm = 1.0
threshold = {{ kind = "private_quantile" }}
expected_batch_size = {batch}

[output]
folder = "{folder}"
"""


@dataclass
class Seconds:
    """Where a run's time went.

    Attributes:
      steps: the sites' training steps alone.
      training: all that sites did to train, `steps` and making models, engines and checkpoints.
      evaluation: of the sites.
      total: of all rounds, from the first request to the last file; not making the first model and
        the last, which a run does once whatever its rounds.
    """

    steps: float = 0.0
    training: float = 0.0
    evaluation: float = 0.0
    total: float = 0.0

    @property
    def outside(self) -> float:
        """What messages, checks, averages and the server's files took."""
        return self.total - self.training - self.evaluation


class _Stopwatch:
    """Observes the rounds; `seconds` is how long they have taken."""

    def __init__(self) -> None:
        self.seconds = self._began = 0.0

    def started(self, sites: Any, rounds_done: int, rounds: int) -> None:
        self._began = time.perf_counter()

    def heard(self, round_number: int, site: str, status: str) -> None:
        pass

    def finished_round(self, line: Mapping[str, Any]) -> None:
        self.seconds = time.perf_counter() - self._began


class _TimedSite:
    """A site that is watched."""

    def __init__(self, site: Any, seconds: Seconds) -> None:
        self.name, self._site, self._seconds = site.name, site, seconds

    def train(self, *arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return self._site.train(*arguments)
        finally:
            self._seconds.training += time.perf_counter() - began

    def evaluate(self, *arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return self._site.evaluate(*arguments)
        finally:
            self._seconds.evaluation += time.perf_counter() - began


@contextmanager
def _timed_steps(seconds: Seconds) -> Iterator[None]:
    """Every private run of a site tells how long its steps took."""
    site_module: Any = importlib.import_module("dpfast.federated.site")
    original: Any = site_module.PrivateRun

    class Timed(original):  # type: ignore[misc]
        def epoch(self) -> Iterator[None]:
            steps = super().epoch()
            while True:
                began = time.perf_counter()
                try:
                    next(steps)
                except StopIteration:
                    return
                finally:
                    seconds.steps += time.perf_counter() - began
                yield

    site_module.PrivateRun = Timed
    try:
        yield
    finally:
        site_module.PrivateRun = original


@contextmanager
def federation(case: Case) -> Iterator[Callable[[], Seconds]]:
    """Make a case's sites with their data; yields what runs the rounds, once, in this process."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "settings.toml"
        levels = [2] * (len(case.channels) - 1)
        file.write_text(
            _SETTINGS.format(
                patients=case.sites * case.patients,
                sites=case.sites,
                channels=list(case.channels),
                strides=levels,
                local_epochs=case.local_epochs,
                rounds=case.rounds,
                batch=case.batch,
                folder=f"{scratch}/run",
            )
        )
        settings = load_federated_settings(file)
        folder = FederatedFolder(settings)
        folder.start(file)
        task, records = records_by_site(settings)
        seconds = Seconds()
        sites = [
            make_site(settings, name, make_data(task, own, settings.data), folder.site(name))
            for name, own in records.items()
        ]
        timed: Any = {site.name: _TimedSite(site, seconds) for site in sites}
        grid = InProcessGrid(timed)

        def rounds() -> Seconds:
            with _timed_steps(seconds), Server(settings, task, folder, grid, grid.nodes) as server:
                stopwatch = _Stopwatch()
                server.run(stopwatch)
                seconds.total = stopwatch.seconds
            return seconds

        try:
            yield rounds
        finally:
            grid.close()
            for site in sites:
                site.close()


def run(case: Case, *, rounds: int | None = None) -> Seconds:
    """Train a case's sites in this process and say where the time went."""
    with federation(case if rounds is None else replace(case, rounds=rounds)) as run_rounds:
        return run_rounds()
