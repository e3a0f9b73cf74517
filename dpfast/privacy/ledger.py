"""`PrivacyLedger`: what was released about a data set, and what it cost."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import dp_accounting
from dp_accounting import DpEvent

from dpfast import _native
from dpfast.errors import PrivacyError
from dpfast.privacy import accounting
from dpfast.privacy._journal import Journal

__all__ = ["Mechanism", "PrivacyLedger", "Spending"]

_NAME = "PrivacyLedger"
_FORMAT = "dpfast.PrivacyLedger/1"


@dataclass(frozen=True)
class Mechanism:
    """One kind of release.

    Attributes:
      event: what dp-accounting composes, as JSON; a NonPrivateDpEvent where `reasons` are given.
      privacy_unit: what one neighbouring data set adds or removes: "sample", "patient", ...
      description: settings that a reader wants to see: sampler, clipping rule, public sizes.
      reasons: why there is no guarantee; empty where there is one.
      conditional_event: what the event would be if the reasons did not hold.
    """

    event: dict[str, Any]
    privacy_unit: str
    description: dict[str, Any]
    reasons: list[str] = field(default_factory=list)
    conditional_event: dict[str, Any] | None = None


@dataclass
class Spending:
    """How often a mechanism was used.

    Attributes:
      steps: releases begun.
      spends: how often the event counts; less than `steps` where one event covers an epoch.
    """

    steps: int = 0
    spends: int = 0


class PrivacyLedger:
    """An append-only record of every release about one data set, by any number of runs.

    Each entry is on the disk before the release that it counts, so that a process killed at any
    moment has counted at least what it released. The file holds JSON lines chained by hashes: a
    changed line, or one missing in the middle, is an error when it is opened; lines missing at the
    end are one when a checkpoint that counts them is loaded. A file has one writer: no other
    process can open it, and within one process whoever opened it last.

    Args:
      path: the file, created where there is none and continued where there is one. None keeps the
        ledger in memory: it lives on in checkpoints alone, and what a killed process released
        after its last checkpoint is not counted.

    Raises:
      TypeError: path is not a path. PrivacyError: the file is damaged, of another format, or in
        use. OSError: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        if path is not None and not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"{_NAME}: path must be a path or None, got {type(path).__name__}")
        self._replay(Journal(None if path is None else Path(path)))
        if not self._header:
            self._append(
                {
                    "type": "header",
                    "format": _FORMAT,
                    "run": secrets.token_hex(8),
                    "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    "dpfast": _native.build_info()["version"],
                    "accounting": accounting.library_version(),
                    "adjacency": accounting.ADJACENCY,
                }
            )

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> PrivacyLedger:
        """What a ledger's file holds now, even while it is being written.

        The file is neither locked nor changed, and what comes back takes no new entries. A last
        line that is not whole is not counted: its writer has not released anything for it yet.

        Raises:
          TypeError: path is not a path. PrivacyError: the file is damaged, of another format or
            empty. OSError: it cannot be read.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"{_NAME}: path must be a path, got {type(path).__name__}")
        ledger = cls.__new__(cls)
        ledger._replay(Journal(Path(path), read_only=True))
        if not ledger._header:
            raise PrivacyError(f"{_NAME}: {ledger.path} must begin with its header, it is empty")
        return ledger

    def _replay(self, journal: Journal) -> None:
        self._mechanisms: list[Mechanism] = []
        self._spendings: list[Spending] = []
        self._plans: list[dict[str, Any]] = []
        self._voids: list[str] = []
        self._carried: dict[str, int] = {}
        self._header: dict[str, Any] = {}
        self._journal = journal
        records, journal.records = journal.records, []
        for record in records:
            self._apply(record)

    @property
    def path(self) -> Path | None:
        """The file, or None."""
        return self._journal.path

    @property
    def run(self) -> str:
        """The ledger's own name, drawn when it was created."""
        return str(self._header["run"])

    @property
    def privacy_unit(self) -> str | None:
        """The unit of every entry; None before the first."""
        return self._mechanisms[0].privacy_unit if self._mechanisms else None

    @property
    def mechanisms(self) -> Sequence[Mechanism]:
        """What was registered; an id is a place in this sequence."""
        return tuple(self._mechanisms)

    @property
    def plans(self) -> Sequence[Mapping[str, Any]]:
        """The budgets that runs set themselves."""
        return tuple(self._plans)

    def spending(self, mechanism: int) -> Spending:
        """How often a mechanism was used so far."""
        return self._spendings[mechanism]

    def register(
        self,
        event: DpEvent,
        *,
        privacy_unit: str,
        description: Mapping[str, Any],
        reasons: Sequence[str] = (),
    ) -> int:
        """Describe a kind of release before its first use; nothing is spent by it.

        Args:
          event: what one use costs, for a unit of kind `privacy_unit`.
          privacy_unit: all entries of a ledger must have the same.
          description: JSON-able settings.
          reasons: why the event gives no guarantee: epsilon will be infinite, and the event is
            kept as what it would be otherwise.

        Returns:
          Its id; that of an equal description where there is one.

        Raises:
          PrivacyError: another privacy unit than the ledger's. ValueError: an unknown event.
        """
        stored = accounting.event_to_json(event)
        if reasons:
            void = accounting.event_to_json(dp_accounting.NonPrivateDpEvent())
            mechanism = Mechanism(void, privacy_unit, dict(description), list(reasons), stored)
        else:
            mechanism = Mechanism(stored, privacy_unit, dict(description))
        if mechanism in self._mechanisms:
            return self._mechanisms.index(mechanism)
        if self.privacy_unit not in (None, privacy_unit):
            raise PrivacyError(
                f"{_NAME}: privacy_unit must be {self.privacy_unit!r} like the entries before, got "
                f"{privacy_unit!r}: epsilons of different units do not add up"
            )
        self._append({"type": "mechanism", **asdict(mechanism)})
        return len(self._mechanisms) - 1

    def record(self, mechanism: int, *, steps: int = 1, spends: int = 1) -> None:
        """Count a use; call it before anything is released, the entry is durable when it returns.

        Args:
          mechanism: an id that `register` gave.
          steps: how many releases this stands for, >= 1.
          spends: how often the event counts, >= 0.
        """
        if not 0 <= mechanism < len(self._mechanisms) or steps < 1 or spends < 0:
            raise ValueError(
                f"{_NAME}: mechanism must be registered, steps >= 1 and spends >= 0, got "
                f"{mechanism}, {steps}, {spends}"
            )
        self._append({"type": "release", "mechanism": mechanism, "steps": steps, "spends": spends})

    def check_writable(self) -> None:
        """Refuse a ledger that takes no entries, before the data are touched that they are about.

        Raises:
          PrivacyError: it was only read, closed, opened elsewhere or changed by somebody else.
        """
        self._journal.check_writable()

    def plan(self, description: Mapping[str, Any]) -> None:
        """Note the budget that a run sets itself, so that its continuation finds it."""
        self._append({"type": "plan", "plan": dict(description)})

    def mark_non_private(self, reason: str) -> None:
        """Note that private data was used outside any mechanism: epsilon is infinite from now."""
        self._append({"type": "void", "reason": reason})

    def spent(self, *, conditional: bool = False) -> list[tuple[DpEvent, int]]:
        """Events and how often each counts.

        Args:
          conditional: as if no reason against the guarantee held.
        """
        pairs: list[tuple[DpEvent, int]] = []
        for mechanism, spending in zip(self._mechanisms, self._spendings, strict=True):
            event = mechanism.event
            if conditional and mechanism.conditional_event is not None:
                event = mechanism.conditional_event
            pairs.append((accounting.event_from_json(event), spending.spends))
        if self._voids and not conditional:
            pairs.append((dp_accounting.NonPrivateDpEvent(), len(self._voids)))
        return pairs

    def epsilon(self, delta: float, *, accountant: str = "pld", conditional: bool = False) -> float:
        """The epsilon of all entries for one unit added or removed, by `accounting.epsilon`."""
        return accounting.epsilon(self.spent(conditional=conditional), delta, accountant=accountant)

    def reasons(self) -> list[str]:
        """Why epsilon is infinite; empty where it is not."""
        used = zip(self._mechanisms, self._spendings, strict=True)
        found = [reason for each, spent in used if spent.spends for reason in each.reasons]
        return list(dict.fromkeys([*found, *self._voids]))

    def report(self, delta: float, *, accountant: str = "pld") -> dict[str, Any]:
        """What was spent, for which unit, under which adjacency and with which samplers; JSON-able.

        Epsilon is None where it is infinite: JSON has no such number.
        """
        value = self.epsilon(delta, accountant=accountant)
        reasons = self.reasons()
        result: dict[str, Any] = {
            "epsilon": None if math.isinf(value) else value,
            "delta": delta,
            "accountant": accounting.accountant_name(accountant),
            "privacy_unit": self.privacy_unit,
            "adjacency": self._header["adjacency"],
            "guarantee": "none" if reasons or math.isinf(value) else "(epsilon, delta)",
            "durable": self.path is not None,
            "run": self.run,
            "mechanisms": [
                {**asdict(each), "steps": spent.steps, "spends": spent.spends}
                for each, spent in zip(self._mechanisms, self._spendings, strict=True)
            ],
        }
        if reasons:
            conditional = self.epsilon(delta, accountant=accountant, conditional=True)
            result["reasons"] = reasons
            result["conditional_epsilon"] = None if math.isinf(conditional) else conditional
        return result

    def close(self) -> None:
        """Let go of the file; an entry after that is an error."""
        self._journal.close()

    def state_dict(self) -> dict[str, Any]:
        """A summary for checkpoints, from which another ledger can carry the counts on."""
        length = len(self._journal)
        return {
            "format": _FORMAT,
            "run": self.run,
            "length": length,
            "hash": self._journal.hash_at(length),
            "mechanisms": [asdict(each) for each in self._mechanisms],
            "spendings": [asdict(each) for each in self._spendings],
            "plans": list(self._plans),
            "voids": list(self._voids),
            "carried": dict(self._carried),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make sure that all of a checkpoint's entries are counted here.

        A ledger that holds them (its file outlived the process, and may have gone on since) stays
        as it is; one that has released nothing carries the counts over.

        Raises:
          ValueError: not a ledger's state.
          PrivacyError: this ledger lacks entries of the checkpoint, or belongs to something else.
        """
        fields = {"run", "length", "hash", "mechanisms", "spendings", "plans", "voids", "carried"}
        if not fields <= state.keys() or state.get("format") != _FORMAT:
            raise ValueError(f"{_NAME}: state must be of format {_FORMAT}")
        run, length = state["run"], state["length"]
        if run == self.run:
            if length > len(self._journal) or self._journal.hash_at(length) != state["hash"]:
                raise PrivacyError(
                    f"{_NAME}: this ledger has lost entries that the checkpoint counts ({length} "
                    "there); start a new ledger file, which carries the checkpoint's counts over"
                )
            return
        if length <= self._carried.get(run, 0):
            return
        if self._voids or self._carried or any(each.steps for each in self._spendings):
            raise PrivacyError(
                f"{_NAME}: the checkpoint belongs to ledger {run} and this one, {self.run}, has "
                "entries of its own; open the ledger that the checkpoint was written with"
            )
        # One entry: after a crash either all of it is there or none.
        names = ("mechanisms", "spendings", "plans", "voids")
        lengths = {**state["carried"], run: length}
        entry = {name: state[name] for name in names}
        self._append({"type": "carried_over", "lengths": lengths, **entry})

    def _append(self, record: dict[str, Any]) -> None:
        self._journal.append(record)
        self._apply(record)

    def _apply(self, record: Mapping[str, Any]) -> None:
        """Change the counts as an entry says; the one place where an entry gets its meaning."""
        kind = record.get("type")
        if bool(self._header) == (kind == "header"):
            raise PrivacyError(f"{_NAME}: {self.path} must begin with its only header")
        if kind == "header":
            if record.get("format") != _FORMAT or record.get("adjacency") != accounting.ADJACENCY:
                raise PrivacyError(f"{_NAME}: {self.path} is not of format {_FORMAT}")
            self._header = dict(record)
        elif kind == "mechanism":
            fields = {name: value for name, value in record.items() if name != "type"}
            self._place(Mechanism(**fields))
        elif kind == "release":
            self._count(record["mechanism"], record)
        elif kind == "plan":
            self._plans.append(record["plan"])
        elif kind == "void":
            self._voids.append(record["reason"])
        elif kind == "carried_over":
            for mechanism, spending in zip(record["mechanisms"], record["spendings"], strict=True):
                self._count(self._place(Mechanism(**mechanism)), spending)
            self._plans += [plan for plan in record["plans"] if plan not in self._plans]
            self._voids += record["voids"]
            self._carried.update(record["lengths"])
        else:
            raise PrivacyError(f"{_NAME}: {self.path} has an entry of unknown kind {kind!r}")

    def _place(self, mechanism: Mechanism) -> int:
        if mechanism not in self._mechanisms:
            self._mechanisms.append(mechanism)
            self._spendings.append(Spending())
        return self._mechanisms.index(mechanism)

    def _count(self, mechanism: int, use: Mapping[str, int]) -> None:
        self._spendings[mechanism].steps += use["steps"]
        self._spendings[mechanism].spends += use["spends"]
