"""What a public format is, and how its files are looked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpfast.segmentation.records import Record

__all__ = ["Format", "files_below", "folder", "one_of"]


@dataclass(frozen=True)
class Format:
    """The public facts of a data set's format.

    Attributes:
      name: for people.
      find: from the data set's folder to its records; ValueError says what is missing and where it
        was looked for.
      spatial_dims: 2 or 3.
      class_names: of the foreground classes, from 1.
      class_values: by which label maps say a class, background first.
      in_channels: 3: pictures in colour, or modalities.
      foreground: whatever is above 0 is class 1.
      has_patients: whether it says which images are of one patient; if not, patients cannot be the
        privacy unit.
      window: intensities are cut off at these, Hounsfield units in CT.
      case_files: of volumes that have a folder for each patient: the names of the files in it that
        are the image's channels, each with its possible endings; "{case}" is the folder's name.
    """

    name: str
    find: Callable[[Path], list[Record]]
    spatial_dims: int
    class_names: tuple[str, ...]
    class_values: tuple[int, ...]
    in_channels: int = 1
    foreground: bool = False
    has_patients: bool = True
    window: tuple[float, float] | None = None
    case_files: tuple[tuple[str, ...], ...] = ()

    def case_image(self, case: Path) -> tuple[Path, ...] | None:
        """The files of a patient's image; None where the folder is none of a patient."""
        found = []
        for names in self.case_files:
            files = [case / name.format(case=case.name) for name in names]
            file = next((each for each in files if each.is_file()), None)
            if file is None:
                return None
            found.append(file)
        return tuple(found) or None


def folder(function: str, path: Path) -> Path:
    """A folder that is there.

    Raises:
      ValueError: it is not.
    """
    if not path.is_dir():
        raise ValueError(f"{function}: {path} must be a folder, got none there")
    return path


def one_of(function: str, where: Path, names: Sequence[str], what: str) -> Path:
    """The first of several files or folders that is there.

    Raises:
      ValueError: none is; the message has all their names.
    """
    for name in names:
        if (where / name).exists():
            return where / name
    raise ValueError(f"{function}: {where} must hold {what}: {' or '.join(names)}, got none of it")


def files_below(function: str, where: Path, pattern: str, what: str) -> list[Path]:
    """Files or folders by a pattern, sorted; hidden ones are left out.

    Raises:
      ValueError: there is none.
    """
    found = [each for each in sorted(where.glob(pattern)) if not each.name.startswith(".")]
    if not found:
        raise ValueError(f"{function}: {where} must hold {what}: {pattern}, got none of it")
    return found
