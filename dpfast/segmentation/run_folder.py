"""The folder of a training run: what it was asked for, where it stands, what came out."""

from __future__ import annotations

import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from dpfast.segmentation.settings import Settings, load_settings

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = ["RunFolder", "StateFolder", "refuse_other_settings", "write_atomically"]


class StateFolder(ABC):
    """Where a run keeps what must outlive its process; each file is whole or not there.

    ledger.jsonl: what was released, by the privacy engine. morphology.json: element sizes that were
    measured on the training masks, if any; what was released is not released again. checkpoint.pt:
    where a continuation starts.

    Args:
      path: created where there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.mkdir(parents=True, exist_ok=True)

    @property
    @abstractmethod
    def started(self) -> bool:
        """Whether something was trained, or may have been."""

    @property
    def _morphology(self) -> Path:
        return self.path / "morphology.json"

    @property
    def ledger(self) -> Path:
        """Where the privacy engine keeps its ledger."""
        return self.path / "ledger.jsonl"

    def morphology(self) -> dict[str, Any] | None:
        """What `write_morphology` wrote; None before that."""
        return _json(self._morphology)

    def write_morphology(self, released: Mapping[str, Any]) -> None:
        """Keep what was measured on the training masks."""
        text = json.dumps(released, indent=2, allow_nan=False) + "\n"
        write_atomically(self._morphology, lambda file: file.write(text.encode()))

    def checkpoint(self, device: torch.device) -> dict[str, Any] | None:
        """The last checkpoint, None where there is none.

        Raises:
          ValueError: it is damaged.
        """
        file = self.path / "checkpoint.pt"
        if not file.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{file} must be a checkpoint, got {type(error).__name__}; without it the run "
                "starts anew, and the steps that the ledger holds stay counted"
            ) from error
        return state

    def write_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint."""
        write_atomically(self.path / "checkpoint.pt", lambda file: torch.save(dict(state), file))


class RunFolder(StateFolder):
    """Files of one run of `dpfast train`, whenever the process is killed.

    Besides those of every StateFolder, settings.toml: the settings as given; metrics.jsonl: a line
    per epoch; at the end model.pt and, last, report.json.

    Args:
      settings: of the run; with the same, an existing folder is continued. A ledger alone may be
        there already: it is continued, too.

    Raises:
      ValueError: the folder holds a run of other settings, or something else.
    """

    def __init__(self, settings: Settings) -> None:
        self.path = Path(settings.output.folder)
        if self._settings.is_file():
            refuse_other_settings(self.path, settings, load_settings(self._settings))
        elif self.path.exists() and (not self.path.is_dir() or self._foreign()):
            raise ValueError(
                f"output.folder must be a run folder, empty or new, got {self.path}, which holds "
                "something else"
            )
        super().__init__(self.path)

    def start(self, settings_file: Path) -> None:
        """Copy the settings, which binds the folder to them; nothing where that was done."""
        if not self.started:
            text = settings_file.read_bytes()
            write_atomically(self._settings, lambda file: file.write(text))

    @property
    def started(self) -> bool:
        """Whether the folder is bound to its settings."""
        return self._settings.is_file()

    @property
    def _settings(self) -> Path:
        return self.path / "settings.toml"

    def _foreign(self) -> list[Path]:
        # Hidden: what a killed process had not finished.
        files = [file for file in self.path.iterdir() if not file.name.startswith(".")]
        return [file for file in files if file not in (self.ledger, self._morphology)]

    def report(self) -> dict[str, Any] | None:
        """What a finished run wrote; None before that."""
        return _json(self.path / "report.json")

    def write_metrics(self, metrics: Sequence[Mapping[str, Any]]) -> None:
        """Replace metrics.jsonl by all epochs up to the checkpoint, none twice."""
        lines = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in metrics)
        write_atomically(self.path / "metrics.jsonl", lambda file: file.write(lines.encode()))

    def write_results(self, weights: Mapping[str, torch.Tensor], report: Mapping[str, Any]) -> None:
        """Write model.pt, then report.json, which marks the run as finished."""
        text = json.dumps(report, indent=2, allow_nan=False) + "\n"
        write_atomically(self.path / "model.pt", lambda file: torch.save(dict(weights), file))
        write_atomically(self.path / "report.json", lambda file: file.write(text.encode()))


def refuse_other_settings(folder: Path, ours: BaseModel, theirs: BaseModel) -> None:
    """Make sure that a folder is continued with the settings that it was begun with.

    Raises:
      ValueError: they differ; the message says where.
    """
    # The folder itself may have been moved.
    own, held = (_flat(each.model_dump(exclude={"output"})) for each in (ours, theirs))
    for name in sorted({**own, **held}):
        if own.get(name) != held.get(name):
            raise ValueError(
                f"output.folder must be a new folder or one of the same settings, got {folder}, "
                f"where {name} is {held.get(name)!r} and not {own.get(name)!r}"
            )


def write_atomically(
    path: Path, write: Callable[[IO[bytes]], object], *, durable: bool = True
) -> None:
    """Write a file beside its final place and move it there when it is whole and on the disk.

    Args:
      path: the final place.
      write: writes the content.
      durable: False: what can be made again after a loss of power is not waited for.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    if not durable:
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too
    finally:
        os.close(folder)


def _json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _flat(table: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested tables as one, by dotted names."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        nested = isinstance(value, Mapping)
        found |= _flat(value, f"{path}{name}.") if nested else {f"{path}{name}": value}
    return found
