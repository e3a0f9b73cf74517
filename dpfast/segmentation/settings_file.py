"""Settings files: TOML in which every name and type is checked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, TypeVar

from dpfast.segmentation._extras import needs_extra

with needs_extra("dpfast train"):
    from pydantic import BaseModel, ConfigDict, Field, ValidationError

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

__all__ = ["Count", "Fraction", "Percentile", "Positive", "Seed", "Table", "read_settings"]

TableT = TypeVar("TableT", bound=BaseModel)
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Percentile = Annotated[float, Field(gt=0.0, lt=100.0)]


class Table(BaseModel):
    """A table of a settings file: unknown names and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def read_settings(path: Path, table: type[TableT]) -> TableT:
    """Read a settings file.

    Args:
      path: of a TOML file.
      table: what it must hold.

    Raises:
      ValueError: it cannot be read, is no TOML, or has an unknown, missing or wrong setting; the
        message names each. ImportError: pydantic is not installed.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: settings must be a readable file, got {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: settings must be TOML, got {error}") from error
    try:
        return table.model_validate(content)
    except ValidationError as error:
        lines = [_line(each["loc"], each, content) for each in error.errors(include_url=False)]
        raise ValueError("\n".join(f"{path}: {line}" for line in lines)) from None


def _line(location: tuple[int | str, ...], error: Any, content: Any) -> str:
    path = ".".join(_path(location, content)) or "the file"
    if error["type"] == "extra_forbidden":
        return f"{path}: there is no such setting"
    if error["type"] == "missing":
        return f"{path}: must be given"
    message = error["msg"].removeprefix("Value error, ")
    received = "" if isinstance(error["input"], (dict, BaseModel)) else f", got {error['input']!r}"
    return f"{path}: {message}{received}"


def _path(location: tuple[int | str, ...], content: Any) -> list[str]:
    """Names of tables and settings; pydantic has the kind of a table after its name."""
    names: list[str] = []
    for part in location:
        if isinstance(content, dict) and content.get("kind") == part and part not in content:
            continue
        names.append(str(part))
        content = content.get(part) if isinstance(content, dict) else None
    return names
