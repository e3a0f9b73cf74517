"""Flower's own processes: a SuperLink beside the server, a SuperNode beside each site."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpfast.federated.certificates import CA, SERVER_CERTIFICATE, SERVER_KEY, SITE_KEY
from dpfast.federated.flower.runtime import Runtime

__all__ = ["SuperLink", "SuperNode", "super_link", "super_node"]

_START_SECONDS = 60.0
_CONNECTION = "dpfast"
_LET_IN = "SuperNode ID:"  # of a SuperNode's log
_PARENT_DEATH_SIGNAL = 1  # of Linux's prctl
# What a run brings along in Flower; nobody runs it, see `flower.runtime`.
_BUNDLE = {
    "pyproject.toml": """\
[project]
name = "dpfast-federation"
version = "1.0.0"
description = "dpfast runs what is installed, not this."
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "dpfast"

[tool.flwr.app.components]
serverapp = "nothing:app"
clientapp = "nothing:app"
""",
    "nothing.py": '"""Nothing: server and sites run their own dpfast."""\n\napp = None\n',
}


class SuperNode:
    """A running SuperNode.

    Attributes:
      runtime: where it hands out its messages.
    """

    def __init__(
        self, runtime: Runtime, process: subprocess.Popen[bytes], log: Path, begin: int
    ) -> None:
        self.runtime, self._process = runtime, process
        self._log, self._begin = log, begin

    @property
    def ended(self) -> bool:
        """Whether it gave up, as where the server does not let it in."""
        return self._process.poll() is not None

    @property
    def connected(self) -> bool:
        """Whether the server has let it in, and it is there."""
        return not self.ended and _LET_IN in self._said()

    @property
    def complaint(self) -> str:
        """The last error that it told."""
        errors = [line for line in self._said().splitlines() if "rror" in line or "ailed" in line]
        return errors[-1].strip() if errors else "no answer"

    def _said(self) -> str:
        with self._log.open("rb") as file:
            file.seek(self._begin)
            return file.read().decode("utf-8", "replace")


class SuperLink:
    """A running SuperLink and its registered sites.

    Attributes:
      runtime: where it hands out the server's part.
    """

    def __init__(self, home: Path, certificates: Path, address: str, secret: bytes) -> None:
        self._home = home
        root = certificates / CA
        self.runtime = Runtime(address, secret, root.read_bytes())
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\n'
            f"address = {json.dumps(address)}\n"
            f"root-certificates = {json.dumps(str(root.resolve()))}\n"
        )

    def register(self, keys: Mapping[str, Path]) -> dict[int, str]:
        """Make sites known by their keys; their nodes' numbers."""
        file = self._home / "nodes.json"
        known: dict[str, list[Any]] = json.loads(file.read_text()) if file.is_file() else {}
        for name, key in keys.items():
            text = key.read_text(encoding="utf-8")
            if known.get(name, [None, None])[1] == text:
                continue  # of an earlier start, in the same database
            answer = self._flwr("supernode", "register", str(key.resolve()), _CONNECTION)
            known[name] = [int(answer["node-id"]), text]
            file.write_text(json.dumps(known))
        return {known[name][0]: name for name in keys}

    def submit(self) -> None:
        """Begin a run of Flower's, which is what messages belong to."""
        bundle = self._home / "bundle"
        shutil.rmtree(bundle, ignore_errors=True)
        bundle.mkdir()
        for name, text in _BUNDLE.items():
            (bundle / name).write_text(text)
        self._flwr("run", str(bundle), _CONNECTION)

    def _flwr(self, *command: str) -> dict[str, Any]:
        done = subprocess.run(
            [_program("flwr"), *command, "--format", "json"],
            env=_environment(self._home),
            capture_output=True,
            text=True,
            timeout=_START_SECONDS,
        )
        try:
            answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        except ValueError:
            answer = {}
        if done.returncode or not answer.get("success"):
            said = answer.get("error-message") or done.stderr.strip() or done.stdout.strip()
            raise RuntimeError(f"flwr {command[0]} must succeed, got: {said[-500:]}")
        return answer


@contextmanager
def super_link(home: Path, certificates: Path, host: str, port: int) -> Iterator[SuperLink]:
    """A SuperLink with its database in `home`, stopped at the end.

    Raises:
      ValueError: a key or certificate is missing. RuntimeError: it did not start.
    """
    for needed in (CA, SERVER_CERTIFICATE, SERVER_KEY):
        if not (certificates / needed).is_file():
            raise ValueError(f"super_link: {certificates} must hold {needed}, got none")
    home.mkdir(parents=True, exist_ok=True)
    secret = _secret(home)
    command = [
        _program("flower-superlink"),
        *("--ssl-ca-certfile", str(certificates / CA)),
        *("--ssl-certfile", str(certificates / SERVER_CERTIFICATE)),
        *("--ssl-keyfile", str(certificates / SERVER_KEY)),
        *("--enable-supernode-auth", "--isolation", "process"),
        *("--superexec-auth-secret-file", str(secret)),
        *("--host", host, "--port", str(port)),
        *("--database", str(home / "state.db")),
    ]
    process = _started(command, home, home / "superlink.log")
    try:
        # Where it listens everywhere, this machine is one of the places.
        here = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        _wait_for_port(here, port, process, home / "superlink.log")
        yield SuperLink(home, certificates, f"{here}:{port}", secret.read_bytes())
    finally:
        _stop(process)


@contextmanager
def super_node(certificates: Path, server: str, folder: Path) -> Iterator[SuperNode]:
    """A SuperNode of a site, stopped at the end; who shares its secret takes its messages.

    Raises:
      ValueError: a key or certificate is missing. RuntimeError: it did not start.
    """
    for needed in (CA, SITE_KEY):
        if not (certificates / needed).is_file():
            raise ValueError(f"super_node: {certificates} must hold {needed}, got none")
    secret = _secret(folder)
    port = _free_port()
    command = [
        _program("flower-supernode"),
        *("--root-certificates", str(certificates / CA)),
        *("--superlink", server),
        *("--auth-supernode-private-key", str(certificates / SITE_KEY)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
        *("--host", "127.0.0.1", "--port", str(port)),
        # Whoever waits longer does so by starting it again.
        *("--max-wait-time", str(_START_SECONDS)),
    ]
    log = folder / "flower.log"
    begin = log.stat().st_size if log.is_file() else 0
    process = _started(command, folder, log)
    try:
        _wait_for_port("127.0.0.1", port, process, log)
        yield SuperNode(Runtime(f"127.0.0.1:{port}", secret.read_bytes()), process, log, begin)
    finally:
        _stop(process)


def _secret(folder: Path) -> Path:
    """A file with a secret that none but its owner can read."""
    file = folder / "secret"
    if not file.is_file():
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as new:
            new.write(secrets.token_bytes(32))
    return file


def _program(name: str) -> str:
    """Of the environment that this process runs in."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} must be installed, with dpfast[federated]")
    return found


def _environment(home: Path) -> dict[str, str]:
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    return {**os.environ, **quiet, "FLWR_HOME": str(home.resolve())}


def _started(command: list[str], home: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            env=_environment(home),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            # What stops this process must not stop the other before it has been told; but it must
            # not outlive this process, or a site would have two.
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def _wait_for_port(host: str, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex((host, port)) == 0:
                return
        time.sleep(0.2)
    raise RuntimeError(f"a process of Flower's must start at {host}:{port}: see {log}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
