"""Every contract error: its type, its message, and that nothing was written or counted."""

import re
from collections import UserList
from fractions import Fraction

import numpy as np
import pytest
import torch

from dpfast import NoiseSource, clip_and_noise

SENTINEL = -77.0
NAN, INF = float("nan"), float("inf")


def grads(rows=3):
    return [torch.ones(rows, 4), torch.ones(rows, 2, 5)]


def sparse():
    return torch.ones(3, 4).to_sparse()


def check_raises(kind, start, changes):
    """The call raises `kind` with a message that begins with `start`; out and step stay."""
    source = NoiseSource(1)
    told = {
        "grad_samples": grads(),
        "max_grad_norm": 1.0,
        "noise_multiplier": 1.0,
        "out": [torch.full((4,), SENTINEL), torch.full((2, 5), SENTINEL)],
        "noise": source,
        **changes,
    }
    out = told["out"]
    samples = told.pop("grad_samples")
    with pytest.raises(kind, match="^" + re.escape(f"clip_and_noise: {start}")):
        clip_and_noise(samples, **told)
    assert source.step == 0
    held = out.values() if isinstance(out, dict) else [] if out is None else out
    for tensor in held:
        if (
            isinstance(tensor, torch.Tensor)
            and tensor.device.type == "cpu"
            and tensor.is_floating_point()
        ):
            assert (tensor == SENTINEL).all()


BAD_GRADS = [
    (TypeError, "grad_samples must be a tensor or a sequence", None),
    (TypeError, "grad_samples must be a tensor or a sequence", "abc"),
    (TypeError, "grad_samples must be a tensor or a sequence", 3),
    (TypeError, "grad_samples must be a tensor or a sequence", (g for g in grads())),
    (TypeError, "grad_samples must be a tensor or a sequence", {torch.ones(3, 4)}),
    (TypeError, "grad_samples must hold tensors, got list", [[1.0, 2.0], [3.0, 4.0]]),
    (TypeError, "grad_samples must hold tensors, got ndarray", [np.ones((3, 4))]),
    (TypeError, "grad_samples must hold tensors, got NoneType", [torch.ones(3, 4), None]),
    (ValueError, "grad_samples must hold at least one tensor", []),
    (ValueError, "grad_samples must hold at least one tensor", {}),
    (TypeError, "grad_samples[0] must be float64", torch.ones(3, 4, dtype=torch.int64)),
    (TypeError, "grad_samples[1] must be float64", [torch.ones(3, 4), torch.ones(3, 4) > 0]),
    (TypeError, "grad_samples[0] must be float64", torch.ones(3, 4, dtype=torch.complex64)),
    (TypeError, "grad_samples[0] must be float64", torch.ones(3, 4).to(torch.float8_e4m3fn)),
    (TypeError, "grad_samples[0] must be dense", sparse()),
    (ValueError, "grad_samples[0] must have shape (B, *param_shape), got ()", torch.tensor(1.0)),
    (ValueError, "grad_samples[1] must have 3 samples", [torch.ones(3, 4), torch.ones(2, 4)]),
    (ValueError, "grad_samples[1] must be on cpu", [torch.ones(3, 4), torch.ones(3, 4).to("meta")]),
]


@pytest.mark.parametrize(("kind", "start", "samples"), BAD_GRADS)
def test_clip_and_noise_refuses_gradients(kind, start, samples):
    check_raises(kind, start, {"grad_samples": samples})


NUMBERS = ("max_grad_norm", "noise_multiplier", "stability_constant", "percentile",
           "expected_batch_size")  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [True, "1", b"1", 1j, object()])
def test_clip_and_noise_refuses_what_is_no_number(name, value):
    changes = {name: value}
    if name == "stability_constant":
        changes["clipping"] = "psac"
    if name == "percentile":
        changes |= {"max_grad_norm": None, "return_stats": True}
    check_raises(TypeError, f"{name} must be a number, got {type(value).__name__}", changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name, values in {
            "max_grad_norm": (0.0, -1.0, -0.0, NAN, INF, -INF, 9e-31, 1.1e30, Fraction(-1, 3)),
            "noise_multiplier": (-1.0, -5e-324, NAN, INF, 1.1e30),
            "stability_constant": (0.0, -1.0, NAN, INF, 9e-31, 1.1e30),
            "percentile": (-1e-9, 100.0001, NAN, INF),
            "expected_batch_size": (0, 0.0, -1, NAN, INF, 1.1e30),
        }.items()
        for value in values
    ],
)
def test_clip_and_noise_refuses_number_out_of_range(name, value):
    changes = {name: value}
    if name == "stability_constant":
        changes["clipping"] = "psac"
    if name == "percentile":
        changes |= {"max_grad_norm": None, "return_stats": True}
    check_raises(ValueError, f"{name} must be finite, ", changes)


def test_clip_and_noise_refuses_number_too_large_for_a_float():
    check_raises(ValueError, "max_grad_norm must be finite, ", {"max_grad_norm": 10**400})
    check_raises(
        ValueError, "expected_batch_size must be finite, ", {"expected_batch_size": 10**400}
    )


def test_clip_and_noise_message_tells_the_received_value():
    with pytest.raises(ValueError, match=r"got -1\.0$"):
        clip_and_noise(grads(), max_grad_norm=-1.0, noise_multiplier=1.0)
    with pytest.raises(ValueError, match=r"got 'Flat'$"):
        clip_and_noise(grads(), max_grad_norm=1.0, noise_multiplier=1.0, clipping="Flat")


@pytest.mark.parametrize("name", ["clipping", "mechanism", "norm", "unit_reduction"])
@pytest.mark.parametrize(
    ("kind", "value"), [(ValueError, "Flat"), (ValueError, ""), (TypeError, 1), (TypeError, ["l2"])]
)
def test_clip_and_noise_refuses_unknown_names(name, kind, value):
    rule = "must be one of" if kind is ValueError else "must be a str"
    check_raises(kind, f"{name} {rule}", {name: value})


@pytest.mark.parametrize("name", ["clipping", "mechanism", "unit_reduction"])
def test_clip_and_noise_refuses_none_as_a_name(name):
    check_raises(TypeError, f"{name} must be a str", {name: None})


@pytest.mark.parametrize("name", ["accumulate", "return_stats"])
@pytest.mark.parametrize("value", [1, 0, None, "yes", torch.tensor(True)])
def test_clip_and_noise_refuses_flags_that_are_no_bool(name, value):
    check_raises(TypeError, f"{name} must be a bool", {name: value})


def test_clip_and_noise_refuses_misspelt_settings():
    with pytest.raises(TypeError, match="noise_mutliplier"):
        clip_and_noise(grads(), max_grad_norm=1.0, noise_mutliplier=1.0)
    with pytest.raises(TypeError, match="noise_multiplier"):
        clip_and_noise(grads(), max_grad_norm=1.0)
    with pytest.raises(TypeError, match="positional"):
        clip_and_noise(grads(), 1.0, 1.0)


BAD_BOUNDS = [
    (ValueError, "max_grad_norm must be given", {"max_grad_norm": None}),
    (ValueError, "max_grad_norm must have 2 entries, got 1", {"max_grad_norm": [1.0]}),
    (ValueError, "max_grad_norm must have 2 entries, got 3", {"max_grad_norm": (1.0, 1.0, 1.0)}),
    (ValueError, "max_grad_norm must have 2 entries, got 0", {"max_grad_norm": []}),
    (ValueError, "max_grad_norm must be finite", {"max_grad_norm": [1.0, 0.0]}),
    (TypeError, "max_grad_norm must be a number", {"max_grad_norm": [1.0, True]}),
    (TypeError, "max_grad_norm must be a number", {"max_grad_norm": [1.0, torch.tensor(1.0)]}),
    (ValueError, "max_grad_norm must have shape (2,)", {"max_grad_norm": torch.ones(3)}),
    (ValueError, "max_grad_norm must have shape", {"max_grad_norm": torch.ones(1, 2)}),
    (TypeError, "max_grad_norm must be float64", {"max_grad_norm": torch.tensor(1)}),
    (TypeError, "max_grad_norm must be float64", {"max_grad_norm": torch.tensor(True)}),
    (ValueError, "max_grad_norm must be on cpu", {"max_grad_norm": torch.ones(2, device="meta")}),
    (ValueError, "max_grad_norm must be finite", {"max_grad_norm": torch.tensor(0.0)}),
    (ValueError, "max_grad_norm must be finite", {"max_grad_norm": torch.tensor(-1.0)}),
    (ValueError, "max_grad_norm must be finite", {"max_grad_norm": torch.tensor(NAN)}),
    (ValueError, "max_grad_norm must be finite", {"max_grad_norm": torch.tensor([1.0, INF])}),
    (ValueError, "max_grad_norm must be 1 with normalized",
     {"clipping": "normalized", "max_grad_norm": 0.5}),
    (ValueError, "max_grad_norm must be 1 with normalized",
     {"clipping": "normalized", "max_grad_norm": [1.0, 0.5]}),
    (ValueError, "max_grad_norm must be the number 1 with normalized",
     {"clipping": "normalized", "max_grad_norm": torch.tensor(1.0)}),
    (ValueError, "stability_constant belongs to", {"stability_constant": 0.1}),
    (ValueError, "stability_constant belongs to",
     {"stability_constant": 0.1, "clipping": torch.ones(3)}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "start", "changes"), BAD_BOUNDS)
def test_clip_and_noise_refuses_bounds(kind, start, changes):
    check_raises(kind, start, changes)


@pytest.mark.parametrize("bound", [{"a": 1.0}, {"a": 1.0, "c": 1.0}, {"a": 1.0, "b": 1, "c": 1}])
def test_clip_and_noise_refuses_bounds_of_other_keys(bound):
    samples = dict(zip("ab", grads(), strict=True))
    start = "max_grad_norm must have the keys of grad_samples"
    check_raises(ValueError, start, {"grad_samples": samples, "out": None, "max_grad_norm": bound})
    check_raises(ValueError, start, {"max_grad_norm": bound})
    check_raises(
        TypeError,
        "max_grad_norm must be a mapping",
        {"grad_samples": samples, "out": None, "max_grad_norm": [1.0, 1.0]},
    )


BAD_NOISE = [
    (ValueError, "noise_multiplier must be 0 with mechanism none", {"mechanism": "none"}),
    (TypeError, "noise must be a NoiseSource, got int", {"noise": 1}),
    (TypeError, "noise must be a NoiseSource, got Generator", {"noise": torch.Generator()}),
    (ValueError, "group_noise_weights must be one of", {"group_noise_weights": "equals"}),
    (TypeError, "group_noise_weights must be equal, proportional or", {"group_noise_weights": 1.0}),
    (ValueError, "group_noise_weights needs one max_grad_norm", {"group_noise_weights": [1.0, 2]}),
    (ValueError, "group_noise_weights needs one max_grad_norm",
     {"group_noise_weights": "proportional"}),
    (ValueError, "group_noise_weights must have 2 entries",
     {"group_noise_weights": [1.0], "max_grad_norm": [1.0, 1.0]}),
    (ValueError, "group_noise_weights must be finite",
     {"group_noise_weights": [1.0, 0.0], "max_grad_norm": [1.0, 1.0]}),
    (ValueError, "group_noise_weights must be finite",
     {"group_noise_weights": [1.0, NAN], "max_grad_norm": [1.0, 1.0]}),
    (TypeError, "group_noise_weights must be a number",
     {"group_noise_weights": [1.0, True], "max_grad_norm": [1.0, 1.0]}),
    (TypeError, "group_noise_weights must be",
     {"group_noise_weights": None, "max_grad_norm": [1.0, 1.0]}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "start", "changes"), BAD_NOISE)
def test_clip_and_noise_refuses_noise_settings(kind, start, changes):
    check_raises(kind, start, changes)


PERCENTILE = {"percentile": 50, "max_grad_norm": None, "return_stats": True}
BAD_PERCENTILE = [
    ("max_grad_norm must be None with percentile", {"max_grad_norm": 1.0}),
    ("percentile must not be given with clipping none", {"clipping": "none"}),
    ("percentile must not be given with clipping normalized", {"clipping": "normalized"}),
    ("percentile must not be given with clipping custom", {"clipping": torch.ones(3)}),
    ("percentile must not be given with accumulate", {"accumulate": True}),
    ("percentile needs at least one sample", {"grad_samples": grads(0)}),
    ("percentile publishes a threshold", {"return_stats": False}),
    ("group_noise_weights needs one max_grad_norm", {"group_noise_weights": [1.0, 1.0]}),
]


@pytest.mark.parametrize(("start", "changes"), BAD_PERCENTILE)
def test_clip_and_noise_refuses_percentile(start, changes):
    check_raises(ValueError, start, {**PERCENTILE, **changes})


IDS = torch.tensor([1, 1, 2])
BAD_UNITS = [
    (TypeError, "privacy_unit_ids must be a tensor", {"privacy_unit_ids": [1, 1, 2]}),
    (TypeError, "privacy_unit_ids must be int64", {"privacy_unit_ids": IDS.int()}),
    (TypeError, "privacy_unit_ids must be int64", {"privacy_unit_ids": IDS.float()}),
    (ValueError, "privacy_unit_ids must have shape (3,)", {"privacy_unit_ids": IDS[:2]}),
    (ValueError, "privacy_unit_ids must have shape (3,)", {"privacy_unit_ids": IDS[:, None]}),
    (ValueError, "privacy_unit_ids must be on cpu", {"privacy_unit_ids": IDS.to("meta")}),
    (ValueError, "clipping must have shape (3,)", {"clipping": torch.ones(2)}),
    (ValueError, "clipping must have shape (3,)", {"clipping": torch.ones(4)}),
    (ValueError, "clipping must have shape (3,)", {"clipping": torch.tensor(1.0)}),
    (TypeError, "clipping must be float64", {"clipping": torch.ones(3).long()}),
    (ValueError, "clipping must be on cpu", {"clipping": torch.ones(3, device="meta")}),
    (TypeError, "norms must be a tensor", {"norms": [1.0, 1.0, 1.0]}),
    (TypeError, "norms must be float64 or float32", {"norms": torch.ones(3).half()}),
    (ValueError, "norms must have shape (3,)", {"norms": torch.ones(2)}),
    (ValueError, "norms must have shape (3,)", {"norms": torch.ones(1, 3)}),
    (ValueError, "norms must have shape (2, 3)",
     {"norms": torch.ones(3), "max_grad_norm": [1.0, 1.0]}),
    (ValueError, "norms must be on cpu", {"norms": torch.ones(3, device="meta")}),
    (ValueError, "clipping must have shape",
     {"clipping": torch.ones(4), "privacy_unit_ids": IDS}),
    (ValueError, "privacy_unit_ids has more distinct units",
     {"clipping": torch.ones(1), "privacy_unit_ids": IDS}),
    (ValueError, "privacy_unit_ids has more distinct units",
     {"norms": torch.ones(1), "privacy_unit_ids": IDS}),
    (ValueError, "norms must have shape (2,)",
     {"clipping": torch.ones(2), "norms": torch.ones(3), "privacy_unit_ids": IDS}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "start", "changes"), BAD_UNITS)
def test_clip_and_noise_refuses_units_weights_and_norms(kind, start, changes):
    check_raises(kind, start, changes)


def full(*shape, **more):
    return torch.full(shape, SENTINEL, **more)


BAD_OUT = [
    (ValueError, "out must be given with accumulate", {"out": None, "accumulate": True}),
    (ValueError, "out must have the structure", {"out": [full(4)]}),
    (ValueError, "out must have the structure", {"out": full(4)}),
    (ValueError, "out must have the structure", {"out": {"a": full(4), "b": full(2, 5)}}),
    (TypeError, "out must hold tensors", {"out": [full(4), None]}),
    (TypeError, "out must be a tensor or a sequence", {"out": 3}),
    (ValueError, "out[0] must have shape (4,)", {"out": [full(5), full(2, 5)]}),
    (ValueError, "out[1] must have shape (2, 5)", {"out": [full(4), full(10)]}),
    (TypeError, "out[0] must be float32", {"out": [full(4, dtype=torch.float64), full(2, 5)]}),
    (TypeError, "out[1] must be float32", {"out": [full(4), full(2, 5, dtype=torch.float16)]}),
    (ValueError, "out[1] must be on cpu", {"out": [full(4), full(2, 5, device="meta")]}),
    (ValueError, "out[0] must not require grad",
     {"out": [full(4, requires_grad=True), full(2, 5)]}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "start", "changes"), BAD_OUT)
def test_clip_and_noise_refuses_out(kind, start, changes):
    if isinstance(changes["out"], int):
        with pytest.raises(kind, match=re.escape(start)):
            clip_and_noise(grads(), max_grad_norm=1.0, noise_multiplier=1.0, out=3)
    else:
        check_raises(kind, start, changes)


def test_clip_and_noise_refuses_float32_out_for_float64_gradients():
    samples = [g.double() for g in grads()]
    check_raises(TypeError, "out[0] must be float64", {"grad_samples": samples})


def test_clip_and_noise_refuses_out_that_shares_memory():
    start = "out must not share memory"
    base = torch.full((40,), SENTINEL)
    twice = [base[:4], base[3:13].view(2, 5)]
    check_raises(ValueError, start, {"out": twice})
    samples = [base[:12].view(3, 4), base[10:40].view(3, 2, 5)]
    check_raises(ValueError, start, {"grad_samples": samples, "out": [base[:4], full(2, 5)]})
    check_raises(
        ValueError, start, {"grad_samples": samples, "out": [full(4), base[30:].view(2, 5)]}
    )
    one = full(4)
    check_raises(ValueError, start, {"grad_samples": [torch.ones(3, 4)] * 2, "out": [one, one]})


def test_clip_and_noise_refuses_out_whose_elements_share_memory():
    for out in (full(1).expand(4), full(5).as_strided((4,), (0,))):
        check_raises(ValueError, "out", {"out": [out, full(2, 5)]})
    overlapping = full(6).as_strided((2, 5), (1, 1))
    check_raises(ValueError, "out", {"out": [full(4), overlapping]})


def test_clip_and_noise_takes_neighbouring_memory():
    base = torch.full((42,), SENTINEL)
    samples = [torch.ones(3, 4), torch.ones(3, 2, 5)]
    clip_and_noise(
        samples, max_grad_norm=1.0, noise_multiplier=0.0, out=[base[:4], base[4:14].view(2, 5)]
    )
    assert (base[:14] != SENTINEL).all()
    assert (base[14:] == SENTINEL).all()


def test_clip_and_noise_takes_any_real_number_and_any_sequence():
    for number in (1, Fraction(1, 2), np.float64(0.5), np.float32(0.5), np.int64(1)):
        clip_and_noise(grads(), max_grad_norm=number, noise_multiplier=number)
    out = clip_and_noise(UserList(grads()), max_grad_norm=UserList([1.0, 2]), noise_multiplier=0)
    assert len(out) == 2
