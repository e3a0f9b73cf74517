"""The folder of a federated run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from numpy.typing import NDArray

from dpfast.federated.settings import FederatedSettings, load_federated_settings
from dpfast.segmentation.run_folder import refuse_other_settings, write_atomically

__all__ = ["FederatedFolder"]


class FederatedFolder:
    """Files of a federated run; each is whole or not there.

    settings.toml: as given. rounds.jsonl: a line per round. checkpoint.pt: after the last whole
    round. ledgers/sites.json: what each site last said that it had spent; ledgers/server.jsonl: the
    server's own ledger, where sites are the unit. sites/SITE: what a site keeps to itself, where it
    runs in this process. At the end model.pt, examples.npz and, last, report.json.

    Args:
      settings: of the run; with the same, an existing folder is continued.

    Raises:
      ValueError: the folder holds a run of other settings, or something else.
    """

    def __init__(self, settings: FederatedSettings) -> None:
        path = self.path = Path(settings.output.folder)
        self._settings = path / "settings.toml"
        if self._settings.is_file():
            refuse_other_settings(path, settings, load_federated_settings(self._settings))
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(
                f"output.folder must be a run folder, empty or new, got {path}, which holds "
                "something else"
            )

    def start(self, settings_file: Path) -> None:
        """Copy the settings, which binds the folder to them; nothing where that was done."""
        (self.path / "ledgers").mkdir(parents=True, exist_ok=True)
        if not self._settings.is_file():
            text = settings_file.read_bytes()
            write_atomically(self._settings, lambda file: file.write(text))

    def report(self) -> dict[str, Any] | None:
        """What a finished run wrote; None before that."""
        file = self.path / "report.json"
        if not file.is_file():
            return None
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return content

    def write_results(
        self,
        model: Mapping[str, torch.Tensor],
        examples: Mapping[str, NDArray[Any]],
        report: Mapping[str, Any],
    ) -> None:
        """Write model.pt and examples.npz, then report.json, which marks the run as finished."""
        write: Any = np.savez_compressed  # its stub knows no mapping of arrays
        text = json.dumps(report, indent=2, allow_nan=False) + "\n"
        write_atomically(self.path / "model.pt", lambda file: torch.save(dict(model), file))
        write_atomically(self.path / "examples.npz", lambda file: write(file, **examples))
        write_atomically(self.path / "report.json", lambda file: file.write(text.encode()))

    @property
    def server_ledger(self) -> Path:
        """Of releases about whole sites."""
        return self.path / "ledgers" / "server.jsonl"

    def site(self, name: str) -> Path:
        """Where a site of this process keeps its own."""
        return self.path / "sites" / _file_name(name)

    def checkpoint(self) -> dict[str, Any] | None:
        """The last one, with its `lines` and `entries`; None before the first.

        rounds.jsonl and ledgers/sites.json are written again from it.

        Raises:
          ValueError: it is damaged.
        """
        file = self.path / "checkpoint.pt"
        if not file.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
            lines, entries = state["lines"], state["entries"]
            state["lines"] = [json.loads(line) for line in lines.splitlines()]
            state["entries"] = json.loads(entries)
        except Exception as error:
            raise ValueError(f"{file} must be a checkpoint, got {type(error).__name__}") from error
        self._write_progress(lines, entries)
        return state

    def write_checkpoint(
        self,
        state: Mapping[str, Any],
        lines: Sequence[Mapping[str, Any]],
        entries: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Replace the checkpoint, then rounds.jsonl and ledgers/sites.json by what it has.

        These follow from the checkpoint, so that no disk is waited for.

        Args:
          state: what the rounds go on from.
          lines: of all rounds up to now, none twice.
          entries: what each site has said that it has spent.
        """
        # As text: of many small objects the checkpoint would take one after the other.
        rounds = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        said = (f"{json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in entries.items())
        sites = "{" + ",\n ".join(said) + "}\n"
        kept = {**state, "lines": rounds, "entries": sites}
        write_atomically(self.path / "checkpoint.pt", lambda file: torch.save(kept, file))
        self._write_progress(rounds, sites)

    def _write_progress(self, rounds: str, sites: str) -> None:
        self._write(self.path / "rounds.jsonl", rounds)
        self._write(self.path / "ledgers" / "sites.json", sites)

    @staticmethod
    def _write(path: Path, text: str) -> None:
        write_atomically(path, lambda file: file.write(text.encode()), durable=False)


def _file_name(site: str) -> str:
    """A name that no site can use to leave the folder."""
    return quote(site, safe=" ").replace(".", "%2E")
