"""Servers and sites as processes of their own, for tests over the network."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from dpfast.federated.certificates import make_certificates
from dpfast.privacy import PrivacyLedger

ENVIRONMENT = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Command:
    """A dpfast command in the background, its output in a file."""

    def __init__(self, folder: Path, name: str, *arguments):
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{name.replace(' ', '_')}.log"
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dpfast.cli", *map(str, arguments)],
                cwd=folder,
                env=ENVIRONMENT,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @property
    def said(self):
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait(self, seconds=300):
        """The exit status."""
        return self.process.wait(seconds)

    def wait_for(self, text, seconds=300):
        """Until it has said something."""
        until(lambda: text in self.said or self.process.poll() is not None, seconds, self)
        assert text in self.said, self.said

    def kill(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()


def until(condition, seconds=300, about=None):
    """Wait for something."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"no end after {seconds} s: {about.said if about else ''}")
        time.sleep(0.2)


def rounds(run: Path):
    """The lines of rounds.jsonl, as far as it has come."""
    file = run / "rounds.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


class Federation:
    """A trial on this machine: a server and sites with keys, all stopped at the end."""

    def __init__(self, folder: Path, settings: Path, names):
        self.folder, self.settings, self.names = folder, settings, list(names)
        self.port, self.commands = free_port(), []
        self.keys = folder / "keys"
        make_certificates(self.keys, self.names, ["127.0.0.1"])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for command in self.commands:
            command.stop()

    def serve(self, *arguments):
        """Start the server."""
        where = ("--certificates", self.keys / "server", "--port", self.port)
        return self._start("server", "server", self.settings, *where, *arguments)

    def join(self, name, *arguments, keys=None):
        """Start a site."""
        return self._start(
            name,
            *("site", self.settings, "--name", name, "--certificates", keys or self.keys / name),
            *("--server", f"127.0.0.1:{self.port}", "--folder", self.folder / "own" / name),
            *arguments,
        )

    @property
    def run(self):
        """The run's folder."""
        return self.folder / "run"

    def steps(self, name):
        """How many steps a site's own ledger counts."""
        return PrivacyLedger.read(self.folder / "own" / name / "ledger.jsonl").spending(0).steps

    def _start(self, *arguments):
        command = Command(self.folder, *arguments)
        self.commands.append(command)
        return command
