"""What was measured where: machine, versions, commit, and the files that hold the results."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from dpfast import __version__, _native

__all__ = [
    "RESULTS",
    "available_bytes",
    "device_name",
    "device_slug",
    "environment",
    "failure",
    "write_json",
]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def _from_proc(path: str, field: str) -> str | None:
    try:
        text = Path(path).read_text()
    except OSError:
        return None
    match = re.search(rf"^{field}\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else None


def _cpu_name() -> str:
    return _from_proc("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the CPU's with the number of cores this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {_num_cores()} cores"


def device_slug(device: torch.device) -> str:
    """The device's name as a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_bytes(device: torch.device) -> int:
    """Memory that can still be taken on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    kilobytes = _from_proc("/proc/meminfo", "MemAvailable")
    if kilobytes is not None:
        return int(kilobytes.split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _commit(given: str | None) -> dict[str, Any]:
    if given is not None:
        return {"hash": given, "dirty": None}
    commit = _git("rev-parse", "HEAD")
    # Results of an earlier run, and pages made of them, are no change of what is measured.
    generated = [f":(exclude){folder}" for folder in ("benchmarks/results", "docs")]
    changes = _git("status", "--porcelain", "--", ".", *generated)
    return {"hash": commit, "dirty": None if changes is None else bool(changes)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _opencv_version() -> str | None:
    """OpenCV comes in packages with and without windows."""
    return _version("opencv-python-headless") or _version("opencv-python")


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Device, date, commit and versions, to be saved with the figures.

    Args:
      device: what is measured.
      commit: for a checkout without its `.git` folder; None asks git.
    """
    machine: dict[str, Any] = {
        "device": device_name(device),
        "device_slug": device_slug(device),
        "device_type": device.type,
        "cpu": _cpu_name(),
        # Makers name many generations alike.
        "cpu_family": _from_proc("/proc/cpuinfo", "cpu family"),
        "cpu_model": _from_proc("/proc/cpuinfo", "model"),
        "cores": _num_cores(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "load_average_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["cuda"] = {
            "runtime_of_torch": torch.version.cuda,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "date": now.isoformat(timespec="seconds"),
        "machine": machine,
        "commit": _commit(commit),
        "versions": {
            "dpfast": __version__,
            "torch": torch.__version__,
            "fastdp": _version("fastDP"),
            "flower": _version("flwr"),
            "kornia": _version("kornia"),
            "monai": _version("monai"),
            "opacus": _version("opacus"),
            "opake": _version("opake"),
            "opencv": _opencv_version(),
            "scipy": _version("scipy"),
            "python": platform.python_version(),
        },
        "build": _native.build_info(),
    }


def failure(error: BaseException) -> str:
    """How a peer failed: the exception's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write the whole file or nothing: an interrupted run leaves the earlier results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8"
    ) as file:
        try:
            json.dump(content, file, indent=1, allow_nan=False)
            file.write("\n")
        except BaseException:
            os.unlink(file.name)
            raise
    os.chmod(file.name, 0o644)  # temporary files are private by default
    os.replace(file.name, path)
