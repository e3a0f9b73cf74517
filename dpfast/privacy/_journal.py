"""An append-only file of JSON lines that survives a crash: what is appended is on the disk."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpfast.errors import PrivacyError

__all__ = ["Journal"]

_NAME = "PrivacyLedger"
# Record locks hold between processes, not within one.
_OPEN: weakref.WeakValueDictionary[Path, Journal] = weakref.WeakValueDictionary()


class Journal:
    """Records one after the other, each with a hash over itself and all before it.

    Args:
      path: the file, created where there is none; None keeps the records in memory alone.
      read_only: read an existing file, which another process may be writing, and leave it as it
        is.

    Attributes:
      records: those that the file held when it was opened. A last line cut short by a crash, or not
        yet whole, does not count and is removed unless read_only: whoever wrote it was still
        waiting for it to be on the disk.

    Raises:
      PrivacyError: the file is damaged; unless read_only, open in another process.
      OSError: it cannot be read or written.
    """

    def __init__(self, path: Path | None, *, read_only: bool = False) -> None:
        self.path = None if path is None else path.resolve()
        self._read_only = read_only
        self.records: list[dict[str, Any]] = []
        self._hashes: list[str] = []
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._file = -1
        if self.path is not None and read_only:
            self._look(self.path)
        elif self.path is not None:
            self._open(self.path)

    def __len__(self) -> int:
        return len(self._hashes)

    def hash_at(self, length: int) -> str:
        """The hash over the first `length` records, 1 <= length <= len(self)."""
        return self._hashes[length - 1]

    def check_writable(self) -> None:
        """Refuse what `append` would refuse, without a record.

        Raises:
          PrivacyError: as `append`.
        """
        if os.getpid() != self._pid:
            raise PrivacyError(f"{_NAME}: a forked process must not write the ledger")
        if self._read_only:
            raise PrivacyError(f"{_NAME}: {self.path} is open for reading only")
        if self.path is None:
            return
        if self._file < 0:
            raise PrivacyError(
                f"{_NAME}: {self.path} was closed, or opened again in this process; use one "
                "PrivacyLedger for all that is released about a data set"
            )
        # Closing any other descriptor of the file in this process gives the record lock away.
        self._take_lock()
        if os.fstat(self._file).st_size != self._size:
            raise PrivacyError(f"{_NAME}: {self.path} was changed by somebody else")

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a record; when this returns it is on the disk.

        Raises:
          PrivacyError: in a forked process, the file was changed by somebody else, or read_only.
          OSError: it could not be written; nothing is appended after that.
        """
        with self._lock:
            self.check_writable()
            body = json.dumps(record, sort_keys=True, allow_nan=False)
            digest = self._digest(body)
            if self.path is not None:
                self._write(json.dumps({**record, "hash": digest}, allow_nan=False).encode())
            self._hashes.append(digest)

    def close(self) -> None:
        """Let go of the file; to append is an error from now on."""
        if self._file >= 0 and os.getpid() == self._pid:
            os.close(self._file)
        self._file = -1

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()

    def _digest(self, body: str) -> str:
        before = self._hashes[-1] if self._hashes else ""
        return hashlib.sha256(f"{before}\n{body}".encode()).hexdigest()[:32]

    def _look(self, path: Path) -> None:
        writer = _OPEN.get(path)
        if writer is None or writer._file < 0:
            self._replay(path.read_bytes())
        else:  # to close a second descriptor of the file would give the writer's lock away
            size = os.fstat(writer._file).st_size
            self._replay(os.pread(writer._file, size, 0))

    def _open(self, path: Path) -> None:
        if path in _OPEN:
            # Whoever opens it last writes: a notebook's cell that is run again, say.
            _OPEN[path].close()
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        _OPEN[path] = self
        try:
            self._take_lock()
            self._read()
            _sync_folder(path.parent)
        except BaseException:
            self.close()
            raise

    def _take_lock(self) -> None:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise PrivacyError(f"{_NAME}: {self.path} is in use by another process") from error

    def _read(self) -> None:
        with open(self._file, "rb", closefd=False) as file:
            data = file.read()
        self._size = self._replay(data)
        if self._size < len(data):
            os.ftruncate(self._file, self._size)
            os.fsync(self._file)

    def _replay(self, data: bytes) -> int:
        """Take the records over; returns how many bytes are whole lines."""
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                record = json.loads(line)
                digest = record.pop("hash")
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise PrivacyError(f"{_NAME}: line {number} of {self.path} is damaged") from error
            if digest != self._digest(json.dumps(record, sort_keys=True)):
                raise PrivacyError(
                    f"{_NAME}: line {number} of {self.path} does not follow from the lines before "
                    "it: the file was changed"
                )
            self.records.append(record)
            self._hashes.append(digest)
        return whole

    def _write(self, line: bytes) -> None:
        line += b"\n"
        written = os.write(self._file, line)
        if written != len(line):
            raise OSError(f"{_NAME}: {self.path}: only {written} of {len(line)} bytes were written")
        os.fsync(self._file)
        self._size += written


def _sync_folder(folder: Path) -> None:
    """So that a new file's name is on the disk too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
