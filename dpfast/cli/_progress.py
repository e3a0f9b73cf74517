"""What people see of a run: a progress bar, and lines above it."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["RunBar", "spoken"]


class RunBar:
    """A progress bar while it is used as a context.

    Args:
      console: where it is shown.
      unit: of progress, such as "step".
    """

    def __init__(self, console: Console, unit: str) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn(f"{unit} {{task.completed:.0f}}/{{task.total:.0f}}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: Any = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        """A line above the bar."""
        self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def begin(self, done: int, total: int) -> None:
        """Show the bar, of another run if there was one."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task("training", total=total, completed=done)

    def advance(self, done: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=done)

    def describe(self, text: str) -> None:
        """Say beside the bar what is going on."""
        self._progress.update(self._task, description=text)


def spoken(value: Any) -> str:
    """Three digits of a number."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
