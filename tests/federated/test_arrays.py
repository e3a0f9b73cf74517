"""Weights on the way: the bytes are NumPy's, and what others send is read as NumPy reads it."""

from io import BytesIO

import numpy as np
import pytest

pytest.importorskip("flwr")
pytest.importorskip("pydantic")

from flwr.app import Array, ArrayRecord

from dpfast.federated.flower import arrays
from dpfast.federated.flower.arrays import to_arrays, to_weights

NUMBERS = np.random.default_rng(5)
EXAMPLES = {
    "weight": NUMBERS.standard_normal((3, 2, 5)).astype(np.float32),
    "double": NUMBERS.standard_normal(7),
    "scalar": np.array(2.5, dtype=np.float32),
    "empty": np.zeros((0, 4), dtype=np.float32),
    "half": np.arange(4, dtype=np.float16),
    "whole": np.arange(3),
}


def record(array):
    return ArrayRecord({"it": array})


def saved(array, **options):
    file = BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


def test_what_is_sent_is_what_flower_would_send():
    sent = to_arrays(EXAMPLES)
    for name, array in EXAMPLES.items():
        theirs = Array(array)
        for field in ("dtype", "shape", "stype", "data"):
            assert getattr(sent[name], field) == getattr(theirs, field), (name, field)


def test_what_is_sent_comes_back_bit_for_bit_and_can_be_written_to():
    found = to_weights(to_arrays(EXAMPLES))
    assert list(found) == list(EXAMPLES)
    for name, array in EXAMPLES.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()
        assert found[name].flags.writeable


def test_arrays_in_another_order_are_sent_in_ours():
    turned = EXAMPLES["weight"].transpose(2, 0, 1)
    found = to_weights(to_arrays({"it": turned, "part": EXAMPLES["double"][::2]}))
    np.testing.assert_array_equal(found["it"], turned)
    np.testing.assert_array_equal(found["part"], EXAMPLES["double"][::2])


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_others_write_is_read(version, order):
    array = np.asarray(EXAMPLES["weight"], order=order)
    data = saved(array, version=version)
    found = to_weights(record(Array("float32", array.shape, "numpy.ndarray", data)))
    np.testing.assert_array_equal(found["it"], array)


def test_the_header_counts_and_not_what_is_said_beside_it():
    data = saved(EXAMPLES["double"])
    found = to_weights(record(Array("float32", (99,), "numpy.ndarray", data)))
    np.testing.assert_array_equal(found["it"], EXAMPLES["double"])


def test_a_header_longer_than_ours_is_read_and_not_kept():
    long = np.zeros(2, dtype=[(f"field{number}" * 9, np.float32) for number in range(20)])
    before = arrays._parsed.cache_info().currsize
    found = to_weights(record(Array(str(long.dtype), (2,), "numpy.ndarray", saved(long))))
    assert found["it"].dtype == long.dtype
    assert arrays._parsed.cache_info().currsize == before


GOOD = saved(EXAMPLES["double"])
BAD = {
    "no bytes": b"",
    "not NumPy's": b"PK" + GOOD,
    "half a header": GOOD[:40],
    "too short": GOOD[:-1],
    "a shape without its numbers": GOOD.replace(b"(7,), ", b"(7000000000,), ".ljust(6))[:200],
    "a shape beyond all numbers": np.lib.format.magic(1, 0)
    + b"\x76\x00"
    + f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({10**30},), }}".ljust(118).encode(),
    "the same in another order": np.lib.format.magic(1, 0)
    + b"\x76\x00"
    + f"{{'descr': '<f8', 'fortran_order': True, 'shape': ({10**30},), }}".ljust(118).encode(),
    "an expression": GOOD.replace(b"(7,)", b"f(7)"),
    "objects": GOOD.replace(b"'<f8'", b"'|O' "),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_what_is_no_array_is_an_error(data):
    # The error that a round takes for a reply without its parts; NumPy has many words for it.
    with pytest.raises(ValueError, match=r"\w"):
        to_weights(record(Array("float64", (7,), "numpy.ndarray", data)))


def test_other_kinds_are_errors():
    with pytest.raises(TypeError, match="torch"):
        to_weights(record(Array("float64", (7,), "torch.tensor", GOOD)))
    with pytest.raises(ValueError, match="must be an ArrayRecord"):
        to_weights({"it": EXAMPLES["double"]})
    with pytest.raises(ValueError, match="Object arrays"):
        to_arrays({"it": np.array([{}], dtype=object)})
