"""Weights as Flower's arrays: the bytes are those of `numpy.save`, read and written faster.

NumPy parses an array's header as a Python expression each time. With many small arrays that was the
largest part of a round outside the sites. A model has few shapes: their headers are parsed once.
"""

from __future__ import annotations

import os
from functools import lru_cache
from io import BytesIO
from math import prod
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from dpfast.federated.weights import Weights
from dpfast.segmentation._extras import needs_extra

# Before anything of Flower's is imported: `messages` does so after this module.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
with needs_extra("dpfast federate", extra="federated"):
    from flwr.app import Array, ArrayRecord

__all__ = ["to_arrays", "to_weights"]

_KIND = "numpy.ndarray"  # how Flower calls it
_VERSION_1 = npy.magic(1, 0)
_LENGTH_BYTES = 2
# Headers of ours have 128 bytes. What others send may not fill the memory with longer ones.
_LONGEST_HEADER, _HEADERS = 512, 1024


def to_arrays(weights: Weights) -> ArrayRecord:
    """Weights as Flower sends them.

    Raises:
      ValueError: an array of objects.
    """
    record = ArrayRecord()
    for name, each in weights.items():
        record[name] = _written(np.asarray(each))  # from a dict, each would be checked three times
    return record


def to_weights(arrays: Any) -> dict[str, Any]:
    """The reverse; the arrays are copies.

    Raises:
      ValueError: not an ArrayRecord, or one whose bytes are no array.
      TypeError: an array of another kind than NumPy's.
    """
    if not isinstance(arrays, ArrayRecord):
        raise ValueError(f"to_weights: arrays must be an ArrayRecord, got {type(arrays).__name__}")
    try:
        return {name: _read(each) for name, each in arrays.items()}
    except (EOFError, MemoryError, OverflowError) as error:  # what was sent, not what happened here
        raise ValueError(f"to_weights: no array can be read: {type(error).__name__}") from error


def _written(array: NDArray[Any]) -> Array:
    if array.dtype.hasobject:
        return Array(array)  # raises
    kind, header = _about(array.dtype, array.shape)
    # Past the way in that looks at each argument again and again: these are what it wants.
    written = Array.__new__(Array)
    written.__dict__.update(
        dtype=kind, shape=array.shape, stype=_KIND, data=header + array.tobytes()
    )
    return written


@lru_cache(_HEADERS)
def _about(dtype: np.dtype[Any], shape: tuple[int, ...]) -> tuple[str, bytes]:
    """The name of a kind, and the header."""
    file = BytesIO()
    about = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(file, about)
    return str(dtype), file.getvalue()


def _read(array: Array) -> NDArray[Any]:
    data = array.data
    start = len(_VERSION_1) + _LENGTH_BYTES
    end = start + int.from_bytes(data[len(_VERSION_1) : start], "little")
    ours = array.stype == _KIND and data.startswith(_VERSION_1) and end <= _LONGEST_HEADER
    if ours and (about := _parsed(data[:end])) is not None:
        dtype, shape = about
        return np.frombuffer(data, dtype, prod(shape), end).reshape(shape).copy()
    return array.numpy()


@lru_cache(_HEADERS)
def _parsed(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...]] | None:
    """Kind and shape; None for what is left to NumPy: other orders, objects and mistakes."""
    file = BytesIO(header)
    try:
        npy.read_magic(file)
        shape, fortran_order, dtype = npy.read_array_header_1_0(file)
    except ValueError:
        return None
    return None if fortran_order or dtype.hasobject else (dtype, shape)
