"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from benchmarks import report
from benchmarks._ops import OPS
from benchmarks._record import RESULTS, ROOT, device_slug, environment, write_json
from benchmarks._text import TextTable
from dpfast import _native

__all__ = ["main"]

_NOT_A_TERMINAL_WIDTH = 240
_IDLE_LOAD = 0.5


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure dpfast's ops against the machine's memory bandwidth, the ordinary "
        "training step and other packages. Without the name of an op, measure all.",
    )
    parser.add_argument(
        "command",
        nargs="*",
        metavar="OP",
        help=f"an op to measure ({', '.join(OPS)}); or 'report': write the tables and "
        "pictures of the docs and of README from saved results; or 'where': print the folder of "
        "this device's results",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a few small rows, to try it out")
    parser.add_argument("--rounds", type=int, default=25, help="at most so many rounds a row")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder of the results (default benchmarks/results/DEVICE); with 'report' a file for "
        "the tables alone",
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="with 'report': folder that holds them all"
    )
    parser.add_argument("--commit", help="commit to record, for a checkout without its .git")
    return parser


def _show(console: Console, tables: Sequence[TextTable], title: str) -> None:
    for text in tables:
        table = Table(title=f"{title}: {text.title}")
        for heading in text.headings:
            table.add_column(heading, justify="left" if heading in text.left else "right")
        for row in text.rows:
            table.add_row(*row)
        console.print(table)


def _why_no_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return None if _native.has_cuda_kernels() else "this build of dpfast has no CUDA kernels"


def _lacking(ops: Sequence[str]) -> str | None:
    """Which packages an op cannot do without, and are not installed."""
    for op in ops:
        absent = [name for name in OPS[op].requires if importlib.util.find_spec(name) is None]
        if absent:
            return f"{op} needs {' and '.join(absent)}: pip install '.[benchmarks]'"
    return None


def _advance(progress: Progress, task: TaskID, text: str, number: int, total: int) -> None:
    progress.update(task, description=text, completed=number, total=total)


def _measure(
    console: Console, ops: Sequence[str], device: torch.device, arguments: argparse.Namespace
) -> None:
    folder = arguments.output or RESULTS / device_slug(device)
    about = environment(device, arguments.commit)
    load = about["machine"]["load_average_at_start"]
    if device.type == "cpu" and load is not None and load > _IDLE_LOAD:
        # OpenMP's barriers wait for a thread that lost its core: it is the peers that suffer most.
        console.print(
            f"warning: the load average is {load:.1f}: other work on this machine distorts the "
            "ratios, the peers' most of all",
            style="yellow",
        )
    for op in ops:
        settings = OPS[op].settings(quick=arguments.quick, rounds=arguments.rounds)
        with Progress(console=console, transient=True) as progress:
            on_row = partial(_advance, progress, progress.add_task(op))
            result = about | OPS[op].run(device, settings, on_row)
        path = folder / (f"quick-{op}.json" if arguments.quick else f"{op}.json")
        write_json(path, result)
        _show(console, OPS[op].tables(result), f"{op} on {result['machine']['device']}")
        console.print(f"written to {path}", soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_NOT_A_TERMINAL_WIDTH)
    command = arguments.command or [
        name for name, op in OPS.items() if arguments.device in op.devices
    ]
    if arguments.rounds < 1:
        parser.error(f"--rounds must be >= 1, got {arguments.rounds}")
    if command == ["report"]:
        if arguments.output is None:
            report.write(arguments.results, ROOT)
            console.print("written to docs/benchmarks.md, docs/figures and README.md")
            return 0
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(report.render(arguments.results))
        console.print(f"written to {arguments.output}", soft_wrap=True)
        return 0
    device = torch.device(arguments.device)
    if unknown := [name for name in command if name not in OPS and command != ["where"]]:
        parser.error(f"unknown op {unknown[0]}; there is {', '.join(OPS)}")
    for name in command:
        if name in OPS and device.type not in OPS[name].devices:
            parser.error(f"{name} is measured on {' and '.join(OPS[name].devices)} alone")
    if device.type == "cuda" and (reason := _why_no_cuda()):
        for op in [name for name in command if name in OPS]:
            tables = OPS[op].unmeasured("cuda", quick=arguments.quick)
            _show(console, tables, f"{op} on CUDA")
        Console(stderr=True).print(f"benchmarks: {reason}")
        return 1
    if command == ["where"]:
        console.print(str(RESULTS / device_slug(device)), soft_wrap=True, highlight=False)
        return 0
    if reason := _lacking(command):
        parser.error(reason)
    _measure(console, command, device, arguments)
    return 0
