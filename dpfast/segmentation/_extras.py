"""Packages that are not always installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["needs_extra"]


@contextmanager
def needs_extra(function: str, extra: str = "train") -> Iterator[None]:
    """Around imports of optional packages: a missing one is an error that names the extra.

    Raises:
      ImportError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package == "dpfast":
            raise
        raise ImportError(
            f"{function}: the package {package} must be installed: pip install 'dpfast[{extra}]'"
        ) from error
