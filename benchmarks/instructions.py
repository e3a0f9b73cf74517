"""Instructions that the CPU kernels execute per element: a figure no other load can disturb.

    python -m benchmarks instructions            # count, save, and write docs/instructions.md
    python -m benchmarks instructions --check    # compare with what is saved; exit 1 where it grew

valgrind's callgrind counts `csrc/tests/count_instructions.cpp`, a program that runs one kernel on
fixed numbers. A case is counted twice, with different repeats; the difference is the kernel's own.
It is the AVX2 kernels that are counted, valgrind knows no AVX-512. Another compiler makes other
instructions: with one, nothing is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks._record import RESULTS, ROOT, write_json

__all__ = ["Counter", "grown", "main", "render"]

SAVED = RESULTS / "instructions.json"
PAGE = ROOT / "docs" / "instructions.md"
ALLOWED_GROWTH = 0.05
_ISA = "avx2"
_REPEATS = (1, 3)
_TARGET = "dpfast_count_instructions"
_COLLECTED = re.compile(r"Collected : (\d+)")


def build(folder: Path) -> Path:
    """Compile the program into a folder; returns its path."""
    options = ["-DDPFAST_BUILD_TESTS=ON", "-DDPFAST_CUDA=OFF", "-DCMAKE_BUILD_TYPE=Release"]
    subprocess.run(
        ["cmake", "-S", str(ROOT), "-B", str(folder), *options], check=True, capture_output=True
    )
    subprocess.run(
        ["cmake", "--build", str(folder), "--target", _TARGET], check=True, capture_output=True
    )
    return next(path for path in folder.rglob(_TARGET) if path.is_file())


@dataclass(frozen=True)
class Counter:
    """Counts one build's instructions.

    Attributes:
      executable: `dpfast_count_instructions`.
    """

    executable: Path

    def _run(self, *arguments: str) -> str:
        done = subprocess.run(
            [str(self.executable), *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout

    def compiler(self) -> str:
        """Which compiler it was built with."""
        return self._run("--compiler").strip()

    def cases(self) -> list[str]:
        """What can be counted."""
        return self._run().splitlines()

    def per_element(self, case: str) -> float:
        """Instructions of a case, per element."""
        (few, elements), (many, _) = (self._collected(case, repeats) for repeats in _REPEATS)
        return (many - few) / (_REPEATS[1] - _REPEATS[0]) / elements

    def _collected(self, case: str, repeats: int) -> tuple[int, int]:
        valgrind = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
        done = subprocess.run(
            [*valgrind, str(self.executable), case, str(repeats)],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "DPFAST_FORCE_ISA": _ISA},
        )
        found = _COLLECTED.search(done.stderr)
        if found is None:
            raise RuntimeError(f"valgrind has counted nothing for {case!r}: {done.stderr[-500:]}")
        return int(found[1]), int(done.stdout)


def grown(saved: dict[str, float], counted: dict[str, float]) -> dict[str, str]:
    """Cases that fail the check, and why."""
    wrong = {
        case: f"{counted[case] / saved[case] - 1:+.1%}"
        for case in counted
        if case in saved and counted[case] > saved[case] * (1 + ALLOWED_GROWTH)
    }
    wrong |= {case: "not saved yet" for case in counted if case not in saved}
    wrong |= {case: "saved, but no longer counted" for case in saved if case not in counted}
    return wrong


def render(saved: dict[str, Any]) -> str:
    """The page of the docs."""
    lines = [
        "# Instructions per element",
        "",
        "What the CPU kernels execute per element of their input, on one thread, counted by",
        "valgrind's callgrind: it does not depend on the machine's load. CI counts again and fails",
        f"where a figure has grown by more than {ALLOWED_GROWTH:.0%}. The elements of a",
        "convolution's gradient are its products, those of noise its samples. Written by",
        "`python -m benchmarks instructions`.",
        "",
        f"{saved['isa']}; compiler {saved['compiler']}.",
        "",
        "| kernel | instructions per element |",
        "| --- | --- |",
    ]
    lines += [f"| {case} | {count:.3f} |" for case, count in saved["cases"].items()]
    return "\n".join(lines) + "\n"


def _show(counted: dict[str, float], saved: dict[str, float]) -> None:
    table = Table(title="instructions per element")
    for heading in ("kernel", "counted", "saved", "change"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    for case, count in counted.items():
        before = saved.get(case)
        change = "" if before is None else f"{count / before - 1:+.1%}"
        table.add_row(case, f"{count:.3f}", "" if before is None else f"{before:.3f}", change)
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks instructions", description=__doc__)
    parser.add_argument(
        "--executable", type=Path, help=f"{_TARGET} as built already; default: build it"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare with what is saved instead of saving"
    )
    arguments = parser.parse_args(argv)
    if shutil.which("valgrind") is None:
        parser.error("valgrind is not installed")
    with tempfile.TemporaryDirectory() as work:
        counter = Counter(arguments.executable or build(Path(work)))
        compiler = counter.compiler()
        saved = json.loads(SAVED.read_text()) if SAVED.exists() else {"cases": {}}
        if arguments.check and compiler != saved.get("compiler"):
            print(f"not compared: compiled by {compiler}, saved are {saved.get('compiler')}'s")
            return 0
        counted = {case: counter.per_element(case) for case in track(counter.cases(), "counting")}
    _show(counted, saved["cases"])
    if arguments.check:
        wrong = grown(saved["cases"], counted)
        for case, why in wrong.items():
            print(f"{case}: {why}")
        return 1 if wrong else 0
    result = {"compiler": compiler, "isa": _ISA, "cases": counted}
    write_json(SAVED, result)
    PAGE.write_text(render(result))
    return 0
