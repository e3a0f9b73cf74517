"""The figures of `alignment` against a computation that is as plain as they come."""

import json
import math

import pytest
import scipy.stats
import torch
from torch import nn

from dpfast import NoiseSource
from dpfast.grad_sample.planner import Route
from dpfast.privacy.diagnostics import figures
from tests.grad_sample.helpers import forced, random
from tests.privacy.alignment_helpers import (
    CONSTANTS,
    LEVELS,
    RULES,
    SEED,
    align,
    assert_alike,
    batch_of,
    batches,
    conv_net,
    loss_of,
    plain_report,
)

DEFAULT_GROUPS = {"0": ["0.weight"], "2": ["2.weight", "2.bias"], "4": ["4.weight", "4.bias"]}


def test_alignment_equals_the_plain_computation():
    found = align(
        noise=NoiseSource(SEED), foreground_of=lambda batch: batch["foreground"]
    ).to_dict()
    expected = plain_report(conv_net(), batches(), DEFAULT_GROUPS)
    assert_alike(found, expected)
    # The probe shows what it is meant to show.
    assert 0 < expected["rules"]["flat"]["fraction_clipped"] < 1
    assert all(expected["rules"][rule]["overall"]["sine"] > 0.01 for rule in RULES)


def test_alignment_by_patient_equals_the_plain_computation_on_means():
    found = align(
        noise=NoiseSource(SEED),
        foreground_of=lambda batch: batch["foreground"],
        privacy_unit_ids_of=lambda batch: batch["patient"],
    ).to_dict()
    expected = plain_report(conv_net(), batches(), DEFAULT_GROUPS, by_patient=True)
    assert expected["units"] == 4 + 3
    assert_alike(found, expected)


def test_alignment_takes_groups_and_constants_of_the_caller():
    model = nn.ModuleDict({"encoder": conv_net()[:3], "head": conv_net()[3:]})
    forward = nn.Sequential(*model["encoder"], *model["head"])
    constants = {"psac": 0.5, "automatic": 0.3}
    found = align(
        model,
        loss=lambda _, batch: loss_of(forward, batch),
        groups=["encoder", "encoder.2"],
        stability_constants=constants,
        noise=NoiseSource(SEED),
        foreground_of=lambda batch: batch["foreground"],
    )
    groups = {
        "encoder": ["0.weight"], "encoder.2": ["2.weight", "2.bias"],
        "(rest)": ["4.weight", "4.bias"],
    }  # fmt: skip
    expected = plain_report(conv_net(), batches(), groups, constants={**CONSTANTS, **constants})
    assert_alike(found.to_dict(), expected)


def test_alignment_in_single_precision_is_off_by_its_gradients_rounding_alone():
    single = [{n: v.float() if n != "patient" else v for n, v in b.items()} for b in batches()]
    # 2^-24 in every weight of the model and every activation, through three layers.
    relative = 2e-4
    found = align(conv_net(torch.float32), single).to_dict()
    expected = align().to_dict()
    for report in (found, expected):
        for rule in report["rules"].values():
            for rows in (rule["overall"], *rule["groups"].values(), *rule["batches"]):
                del rows["noisy_cosine"]
    assert_alike(found, expected, relative=relative)


def test_alignment_sums_in_double_where_single_precision_would_not_do():
    signs = torch.tensor([1.0, -1.0]).repeat_interleave(32)
    x = 1e4 * random(1, 50, dtype=torch.float32) + random(64, 50, seed=2, dtype=torch.float32)
    with forced(Route.RECOMPUTE):  # as it may choose to, unless it is told to keep
        report = align(
            nn.Linear(50, 50, bias=False),
            [x],
            loss=lambda model, x: signs * model(x).sum(1),
        )
    # g_b = sign_b 1 x_b^T: the sum grows to 32e4 before the large parts cancel.
    total = (signs[:, None].double() * x.double()).sum(0)
    expected = float(total.square().sum() / x.double().square().sum())
    assert report.diversity == [pytest.approx(expected, rel=1e-6)]


def test_alignment_figures_of_units_do_not_depend_on_the_split_into_batches():
    whole = batch_of(0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 0.05)
    parts = [{n: v[rows] for n, v in whole.items()} for rows in (slice(0, 3), slice(3, 7))]
    one, two = align(probe=[whole]), align(probe=parts)
    assert_alike(two.norm_quantiles, one.norm_quantiles, relative=1e-12)
    for rule in RULES:
        assert_alike(two.rules[rule].weight_quantiles, one.rules[rule].weight_quantiles)
        assert two.rules[rule].fraction_clipped == one.rules[rule].fraction_clipped
    # A sum is a step's: its figures are taken batch by batch, and averaged.
    singles = [align(probe=[part]) for part in parts]
    assert two.diversity == [single.diversity[0] for single in singles]
    assert len(one.diversity) == 1
    for rule in RULES:
        cosines = [single.rules[rule].overall.cosine for single in singles]
        assert [batch.cosine for batch in two.rules[rule].batches] == cosines
        assert two.rules[rule].overall.cosine == pytest.approx(sum(cosines) / 2, rel=1e-12)
        assert abs(two.rules[rule].overall.cosine - one.rules[rule].overall.cosine) > 1e-3


def test_alignment_leaves_out_a_unit_that_is_not_finite():
    whole, bad = batch_of(0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 0.05), batch_of(*[1.0] * 7)
    for name in ("image", "scale", "foreground"):
        whole[name], bad[name] = whole[name][:6].clone(), whole[name][:7].clone()
    bad["image"][6] = math.nan
    foreground_of = {"foreground_of": lambda batch: batch["foreground"]}
    found = align(probe=[bad], noise=NoiseSource(1), **foreground_of).to_dict()
    expected = align(probe=[whole], noise=NoiseSource(1), **foreground_of).to_dict()
    assert (found.pop("nonfinite_units"), expected.pop("nonfinite_units")) == (1, 0)
    assert found["units"] == 6
    assert_alike(found, expected, relative=1e-12)


@pytest.mark.parametrize("scales", [(0.0, 0.0), ()], ids=["zero gradients", "no samples"])
def test_alignment_has_none_where_a_figure_is_not_defined(scales):
    report = align(probe=[batch_of(*scales)], foreground_of=lambda batch: batch["foreground"])
    for rule in RULES:
        sums = report.rules[rule].overall
        assert (sums.cosine, sums.sine, sums.norm_ratio, sums.noisy_cosine) == (None,) * 4
        assert sums.signal_to_noise == 0.0
    assert (report.spearman, report.diversity) == (None, [None])
    assert report.units == len(scales)
    assert len(report.norm_quantiles) == (len(LEVELS) if scales else 0)
    json.dumps(report.to_dict(), allow_nan=False)
    assert report.table().row_count == len(RULES)


@pytest.mark.parametrize("seed", range(5))
def test_spearman_equals_scipy_with_ties(seed):
    left, right = random(2, 30, seed=seed).mul(2).round() + torch.arange(30) // 10
    expected = scipy.stats.spearmanr(left.numpy(), right.numpy()).statistic
    assert figures.spearman(left, right) == pytest.approx(expected, rel=1e-12)


def test_spearman_of_nothing_that_differs_is_not_defined():
    assert figures.spearman(torch.ones(3), random(3)) is None
    assert figures.spearman(random(0), random(0)) is None


def test_bins_keep_equal_values_together():
    values = torch.tensor([1.0] * 6 + [2.0, 3.0, 4.0], dtype=torch.float64)
    assert [values[mask].tolist() for mask in figures._bins(values, 3)] == [
        [1.0] * 6,
        [2.0, 3.0, 4.0],
    ]
