"""`alignment`: what it asks first, where its noise comes from, and what it leaves alone."""

import io
import json
import math
import sys

import pytest
import torch
from monai.data import MetaTensor
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from rich.console import Console
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dpfast
from dpfast import NoiseSource, PrivacyError, PrivacyLedger, clip_and_noise
from dpfast.ops.noise_source import default_state
from dpfast.privacy.diagnostics import step
from tests.grad_sample.helpers import energy, random, randomise
from tests.privacy.alignment_helpers import (
    MULTIPLIER,
    RULES,
    align,
    batch_of,
    batches,
    conv_net,
    loss_of,
)

REASON = "non_dp_diagnostics"


class Ledger(PrivacyLedger):
    """Adds what it is told to a list too."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def mark_non_private(self, reason):
        super().mark_non_private(reason)
        self.events.append(reason)


class FullLedger(PrivacyLedger):
    def mark_non_private(self, reason):
        raise OSError("disk full")


def noting(events):
    """A loss and batches that add to the events when they are asked for."""

    def loss(model, batch):
        events.append("loss")
        return loss_of(model, batch)

    def probe():
        events.append("batch")
        yield batch_of(1.0, 2.0)

    return {"loss": loss, "probe": probe()}


# --- what is said of the data ---


def test_alignment_of_private_data_is_noted_before_a_batch_is_asked_for():
    events = []
    ledger = Ledger(events)
    report = align(data="private", ledger=ledger, **noting(events))
    assert events == [REASON, "batch", "loss"]
    assert ledger.epsilon(1e-5) == math.inf
    assert ledger.reasons() == [REASON]
    assert report.non_dp_diagnostics is True
    assert report.to_dict()["non_dp_diagnostics"] is True


@pytest.mark.parametrize("data", ["synthetic", "public"])
def test_alignment_of_other_data_says_so(data):
    report = align(data=data)
    assert (report.data, report.non_dp_diagnostics) == (data, False)


def test_alignment_that_fails_stays_noted():
    def loss(model, batch):
        raise ArithmeticError

    events = []
    with pytest.raises(ArithmeticError):
        align(data="private", ledger=Ledger(events), loss=loss)
    assert events == [REASON]


def test_alignment_computes_nothing_where_the_ledger_cannot_be_written():
    events = []
    with pytest.raises(OSError, match="disk full"):
        align(data="private", ledger=FullLedger(), **noting(events))
    assert events == []


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"data": "private"}, PrivacyError, "ledger must be given with private data"),
        ({"data": "own"}, ValueError, "data must be one of synthetic, public, private, got 'own'"),
        ({"data": None}, TypeError, "data must be a str, got NoneType"),
        ({"data": "public", "ledger": Ledger([])}, ValueError, "ledger belongs to private data"),
        ({"data": "private", "ledger": "x.jsonl"}, TypeError, "ledger must be a PrivacyLedger"),
    ],
)
def test_alignment_refuses_data_that_is_not_spoken_for(settings, error, message):
    events = []
    with pytest.raises(error, match=f"^alignment: {message}"):
        align(**settings, **noting(events))
    assert events == []


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": torch.relu}, TypeError, "model must be a torch.nn.Module"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be finite, >= 1e-30"),
        ({"max_grad_norm": "1"}, TypeError, "max_grad_norm must be a number"),
        ({"noise_multiplier": 0.0}, ValueError, "noise_multiplier must be finite, > 0"),
        ({"rules": "flat"}, TypeError, "rules must be a sequence of names"),
        ({"rules": []}, ValueError, "rules must name at least one rule"),
        ({"rules": ["flat", "flat"]}, ValueError, "rules must name at least one rule, each once"),
        ({"rules": ["none"]}, ValueError, "rules must be one of flat"),
        ({"stability_constants": {"flat": 1.0}}, ValueError, "stability_constants must be one of"),
        (
            {"stability_constants": {"psac": 1.0}, "rules": ["automatic"]},
            ValueError,
            "stability_constants must be one of automatic",
        ),
        ({"stability_constants": {"psac": 0.0}}, ValueError, "stability_constants.psac. must be"),
        ({"groups": "0"}, TypeError, "groups must be a sequence of module names"),
        ({"groups": ["7"]}, ValueError, "groups must be one of 0, 1, 2, 3, 4, got '7'"),
        ({"groups": ["1"]}, ValueError, "groups must each hold a trained parameter, got .'1'."),
        ({"noise": 3}, TypeError, "noise must be a NoiseSource"),
    ],
)
def test_alignment_refuses_settings_before_the_ledger_is_told(settings, error, message):
    events = []
    with pytest.raises(error, match=f"^alignment: {message}"):
        align(data="private", ledger=Ledger(events), **settings, **noting(events))
    assert events == []


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"probe": iter([])}, ValueError, "alignment: batches must hold at least one batch"),
        ({"loss": lambda *_: 1.0}, TypeError, "alignment: loss_of must return a tensor"),
        ({"loss": lambda *a: loss_of(*a).mean()}, PrivacyError, "per-sample loss of shape"),
        ({"foreground_of": lambda _: [1]}, TypeError, "alignment: foreground_of must return a"),
        (
            {"foreground_of": lambda b: b["foreground"][:, 0]},
            ValueError,
            r"amounts >= 0 of shape \(7, classes\), got shape \(7,\)",
        ),
        ({"foreground_of": lambda b: b["foreground"][1:]}, ValueError, r"got shape \(6, 2\)"),
        ({"foreground_of": lambda b: b["foreground"] - 1}, ValueError, "finite amounts >= 0"),
        ({"privacy_unit_ids_of": lambda b: b["patient"][1:]}, ValueError, "privacy_unit_ids"),
    ],
)
def test_alignment_refuses_what_the_callables_give(settings, error, message):
    with pytest.raises(error, match=message):
        align(**settings)


# --- noise ---


def wide_model():
    """Two groups of 1e5 coordinates each, with gradients of about the same size."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1000, 100, bias=False), nn.Linear(100, 1000, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(6.0)
    return model


def wide_loss(model, x):
    """Of samples that weigh more from one to the next."""
    return energy(model, x) * torch.tensor([0.05, 0.2, 0.8, 3.2])


def wide_gaps():
    """Measured less predicted cos(S + noise, T) of each rule and group, at an SNR of about 1."""
    probe = [random(4, 1000, dtype=torch.float32)]
    common = {"max_grad_norm": 1.0, "data": "synthetic"}
    report = dpfast.alignment(wide_model(), wide_loss, probe, noise_multiplier=0.005, **common)
    gaps = []
    for rule in report.rules.values():
        for sums in (rule.overall, *rule.groups.values()):
            assert 0.3 < sums.signal_to_noise < 2.0
            assert sums.cosine < 0.99
            gaps.append(sums.noisy_cosine - sums.predicted_noisy_cosine)
    return torch.tensor(gaps)


# cos(S + noise, T) moves by at most 2 / sqrt(d) a standard deviation: through the noise along T,
# and through the noise along S in the length of S + noise. 6 of them, 15 figures: p < 1e-7.
WIDE_TOLERANCE = 12 / 1e5**0.5


@pytest.mark.statistical
def test_alignment_measures_the_noisy_cosine_that_it_predicts():
    assert wide_gaps().abs().max() < WIDE_TOLERANCE


@pytest.mark.statistical
@pytest.mark.parametrize("factor", [2 / 3, 3 / 2])
def test_alignment_shows_noise_of_a_wrong_scale_as_a_gap(monkeypatch, factor):
    def wrong(*args, noise_multiplier, **settings):
        return clip_and_noise(*args, noise_multiplier=factor * noise_multiplier, **settings)

    monkeypatch.setattr(step, "clip_and_noise", wrong)
    gaps = wide_gaps()
    assert gaps.abs().min() > WIDE_TOLERANCE
    assert bool((gaps > 0).all()) == (factor < 1)


def noisy_cosines(report):
    return [report.rules[rule].overall.noisy_cosine for rule in RULES]


def test_alignment_takes_no_noise_from_the_process_own_source():
    state = default_state(torch.device("cpu"))
    before = state.clone()
    first, second = noisy_cosines(align()), noisy_cosines(align())
    assert torch.equal(state, before)
    assert default_state(torch.device("cpu")) is state
    assert set(first).isdisjoint(second)


def test_alignment_takes_a_step_of_the_given_noise_for_each_rule_and_batch():
    source = NoiseSource(3)
    first = noisy_cosines(align(noise=source))
    assert source.step == len(RULES) * len(batches())
    assert noisy_cosines(align(noise=NoiseSource(3))) == first
    assert set(noisy_cosines(align(noise=source))).isdisjoint(first)


# --- what stays as it is ---


class Restless(nn.Module):
    """A module whose forward pass counts in place, and assigns a buffer anew."""

    def __init__(self):
        super().__init__()
        self.net = conv_net()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("last", torch.full((2,), 3.0))

    def forward(self, x):
        self.calls += 1
        self.last = torch.ones(5)
        return self.net(x)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_alignment_leaves_the_model_as_it_is(training, fails):
    model = Restless().train(training)
    calls = []
    for name, param in model.named_parameters():
        param.grad = None if "bias" in name else torch.ones_like(param)
    params = {n: (p, p._version, p.detach().clone(), p.grad) for n, p in model.named_parameters()}
    versions = {n: p.grad._version for n, p in model.named_parameters() if p.grad is not None}
    buffers = {n: (b, b.clone()) for n, b in model.named_buffers()}

    def loss(model, batch):
        losses = loss_of(model, batch)
        calls.append((model.training, float(model.calls)))
        if fails:
            raise ArithmeticError
        return losses

    if fails:
        with pytest.raises(ArithmeticError):
            align(model, loss=loss)
    else:
        align(model, loss=loss)
    assert calls == [(training, 1.0), (training, 2.0)][: 1 if fails else 2]
    assert model.training is training
    for name, param in model.named_parameters():
        before, version, value, grad = params[name]
        assert param is before
        assert param._version == version
        assert torch.equal(param, value)
        assert param.grad is grad
        assert grad is None or (grad._version == versions[name] and bool((grad == 1).all()))
    for name, buffer in model.named_buffers():
        before, value = buffers[name]
        assert buffer is before
        assert torch.equal(buffer, value)
    assert not model.net[0].weight._backward_hooks


class LargestDouble(TorchDispatchMode):
    """The number of elements of the largest float64 tensor made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            self.largest = max(self.largest, result.untyped_storage().nbytes() // 8)
        return result


def test_alignment_widens_one_row_of_one_parameter_at_a_time():
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 20)).float()
    with LargestDouble() as made:
        dpfast.alignment(
            model, energy, [random(16, 30, dtype=torch.float32)],
            max_grad_norm=1.0, noise_multiplier=1.0, data="synthetic",
        )  # fmt: skip
    assert made.largest == 30 * 40


# --- reading ---


@pytest.mark.parametrize("size", [1.0, 1e-7, 1e7])
def test_alignment_table_compares_the_rules_within_80_columns(size):
    report = align(
        data="private",
        ledger=Ledger([]),
        loss=lambda *batch: size * loss_of(*batch),
        noise_multiplier=MULTIPLIER / size,
    )
    output = io.StringIO()
    Console(file=output, width=80).print(report.table())
    lines = output.getvalue().splitlines()
    assert "private data, NOT PRIVATE" in lines[0]
    assert "…" not in output.getvalue()
    assert max(len(line) for line in lines) <= 80
    for rule in RULES:
        (row,) = (line.split() for line in lines if line.split()[:1] == [rule])
        figures, sums = report.rules[rule], report.rules[rule].overall
        shares = [sums.cosine, sums.sine, sums.noisy_cosine, sums.predicted_noisy_cosine]
        assert row[1:6] == [f"{share:.3f}" for share in (*shares, figures.fraction_clipped)]
        sizes = [sums.norm_ratio, sums.signal_to_noise, sum(figures.effective_units) / 2]
        assert row[6:] == [f"{size:.3g}" for size in sizes]


def test_alignment_takes_batches_and_losses_of_monai():
    torch.manual_seed(0)
    model = UNet(2, 1, 3, (4, 8), (2,), norm="instance")
    loss = dpfast.per_sample_loss(DiceCELoss(to_onehot_y=True, softmax=True))
    label = MetaTensor(torch.randint(3, (4, 1, 16, 16)).float())
    label[0][label[0] == 2] = 0
    report = align(
        model,
        [{"image": MetaTensor(torch.randn(4, 1, 16, 16)), "label": label}],
        loss=lambda model, batch: loss(model(batch["image"]), batch["label"]),
        groups=["model.0", "model.2"],
        foreground_of=lambda batch: torch.stack(
            [(batch["label"] == k).flatten(1).double().mean(1) for k in (1, 2)], 1
        ),
    )
    assert [split.units for split in report.classes] == [4, 3]
    assert list(report.rules["psac"].groups) == ["model.0", "model.2", "(rest)"]
    assert all(0.5 < rule.overall.cosine <= 1.0 for rule in report.rules.values())
    json.dumps(report.to_dict(), allow_nan=False)


def test_alignment_of_what_no_rule_clips_is_exact():
    sums = align(max_grad_norm=1e6, rules=["flat"]).rules["flat"].overall
    assert (sums.cosine, sums.sine, sums.norm_ratio) == (1.0, 0.0, 1.0)


def test_alignment_takes_any_model_with_parameters_of_its_own():
    report = align(randomise(nn.Conv2d(1, 2, 3).double()), rules=["flat"])
    assert list(report.rules["flat"].groups) == ["weight", "bias"]
    assert sys.modules["dpfast.privacy.diagnostics.alignment"].alignment is dpfast.alignment
