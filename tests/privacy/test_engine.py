"""PrivacyEngine: what is guaranteed, to whom, and what is refused."""

import copy
import gc
import json
import math
import weakref

import dp_accounting as dp
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from torch import nn

import dpfast
from dpfast import NoiseSource, PrivacyEngine, PrivacyError, PrivacyLedger
from tests.privacy.helpers import linear, loader_of, make, train, vectors

DELTA = 1e-5
G, L = dp.GaussianDpEvent, dp.LaplaceDpEvent
IDS = [i // 4 for i in range(40)]


def by_hand(event, count):
    accountant = PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    return accountant.compose(dp.SelfComposedDpEvent(event, count)).get_epsilon(DELTA)


# --- epsilon ---


@pytest.mark.parametrize(
    ("settings", "event"),
    [
        ({}, dp.PoissonSampledDpEvent(0.1, G(1.0))),
        ({"noise_multiplier": 2.0}, dp.PoissonSampledDpEvent(0.1, G(2.0))),
        ({"sample_rate": 0.25}, dp.PoissonSampledDpEvent(0.25, G(1.0))),
        (
            {"privacy_unit": "patient", "privacy_unit_ids": IDS},
            dp.PoissonSampledDpEvent(0.4, G(1.0)),
        ),
        ({"max_batch_size": 10}, dp.TruncatedSubsampledGaussianDpEvent(40, 0.1, 10, 1.0)),
        ({"mechanism": "laplace"}, dp.PoissonSampledDpEvent(0.1, L(1.0))),
        (
            {"mechanism": "laplace", "norm": "l2"},
            dp.PoissonSampledDpEvent(0.1, G(math.sqrt(2 / math.pi))),
        ),
        ({"max_grad_norm": [0.5]}, dp.PoissonSampledDpEvent(0.1, G(1.0))),
        (
            {"threshold": dpfast.PrivateQuantile(count_noise=3.0)},
            dp.PoissonSampledDpEvent(0.1, G(1.0)),
        ),
        ({"clipping": "automatic"}, dp.PoissonSampledDpEvent(0.1, G(1.0))),
        ({"physical_batch_size": 2}, dp.PoissonSampledDpEvent(0.1, G(1.0))),
    ],
)
def test_epsilon_is_that_of_the_steps_taken(settings, event):
    engine, model, optimizer, loader = make(loader_of(vectors(40), batch_size=4), **settings)
    assert engine.get_epsilon(DELTA) == 0.0
    train(model, optimizer, loader)
    assert engine.steps == len(loader)
    assert engine.get_epsilon(DELTA) == by_hand(event, len(loader))


def test_unamplified_epsilon_counts_epochs():
    engine, model, optimizer, loader = make(
        loader_of(vectors(40), batch_size=4), sampling="shuffled_unamplified"
    )
    train(model, optimizer, loader, epochs=3)
    assert engine.steps == 30
    assert engine.get_epsilon(DELTA) == by_hand(G(1.0), 3)
    for (x,) in loader:  # an epoch that is broken off counts whole
        model(x)[:, 0].sum().backward()
        optimizer.step()
        break
    assert engine.get_epsilon(DELTA) == by_hand(G(1.0), 4)


def test_releases_about_the_same_data_compose():
    ledger = PrivacyLedger()
    statistics = ledger.register(G(5.0), privacy_unit="sample", description={"release": "sizes"})
    ledger.record(statistics)
    for z in (1.0, 2.0):
        _, model, optimizer, loader = make(
            loader_of(vectors(40)), engine=PrivacyEngine(ledger=ledger), noise_multiplier=z
        )
        train(model, optimizer, loader)
    training = [dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(0.1, G(z)), 10) for z in (1.0, 2.0)]
    assert ledger.epsilon(DELTA) == pytest.approx(
        by_hand(dp.ComposedDpEvent([G(5.0), *training]), 1), rel=1e-9
    )


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_target_epsilon_is_met_and_not_exceeded(accountant):
    engine = PrivacyEngine(accountant=accountant)
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    *_, loader = engine.make_private_with_epsilon(
        module=model, optimizer=optimizer, data_loader=loader_of(vectors(40), batch_size=8),
        target_epsilon=2.0, target_delta=DELTA, epochs=3, max_grad_norm=1.0,
    )  # fmt: skip
    assert engine.max_steps == 15
    train(model, optimizer, loader, epochs=3)
    assert 1.99 < engine.get_epsilon(DELTA) <= 2.0
    with pytest.raises(PrivacyError, match="the budget is spent"):
        train(model, optimizer, loader)
    assert engine.steps == 15


def test_target_counts_what_the_ledger_holds():
    def multiplier(ledger):
        engine = PrivacyEngine(ledger=ledger)
        model = linear()
        engine.make_private_with_epsilon(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=loader_of(vectors(40), batch_size=20), target_epsilon=2.0,
            target_delta=DELTA, epochs=2, max_grad_norm=1.0,
        )  # fmt: skip
        return engine.ledger.plans[-1]["noise_multiplier"]

    used = PrivacyLedger()
    used.record(used.register(G(3.0), privacy_unit="sample", description={}))
    assert multiplier(used) > 1.05 * multiplier(PrivacyLedger())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target_delta": 0.03}, "target_delta must be < 1 / 40"),
        ({"target_delta": 0.0}, "target_delta must be finite, > 0"),
        ({"target_epsilon": 0.0}, "target_epsilon must be"),
        ({"epochs": 0}, "epochs must be >= 1"),
    ],
)
def test_bad_target_is_refused(changed, message):
    settings = {"target_epsilon": 2.0, "target_delta": DELTA, "epochs": 1, **changed}
    model = linear()
    with pytest.raises(ValueError, match=message):
        PrivacyEngine().make_private_with_epsilon(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=loader_of(vectors(40)), max_grad_norm=1.0, **settings,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "settings", "reason"),
    [
        ({"noise": NoiseSource(1)}, {}, "seeded noise"),
        ({}, {"noise_multiplier": 0.0}, "noise_multiplier 0"),
        ({}, {"clipping": "none"}, "clipping none"),
    ],
)
def test_setting_without_a_guarantee_makes_epsilon_infinite(engine, settings, reason):
    engine, model, optimizer, loader = make(
        loader_of(vectors(20)), engine=PrivacyEngine(**engine), **settings
    )
    train(model, optimizer, loader)
    report = json.loads(json.dumps(engine.report(DELTA), allow_nan=False))
    assert engine.get_epsilon(DELTA) == math.inf
    assert report["guarantee"] == "none"
    assert reason in report["reasons"][0]


def test_report_says_who_is_protected():
    for settings, words in (
        ({}, "Patients are not protected"),
        ({"privacy_unit": "patient", "privacy_unit_ids": IDS}, "one patient are protected"),
    ):
        engine, *_ = make(loader_of(vectors(40)), **settings)
        report = json.loads(json.dumps(engine.report(DELTA), allow_nan=False))
        assert words in report["protects"]
        assert words in report["mechanisms"][0]["description"]["protects"]
        assert report["adjacency"] == "add_or_remove_one"
        assert report["mechanisms"][0]["description"]["sampling"] == "poisson"


# --- sensitivity ---


def clipped_sum(x, ids, **settings):
    """The sum of one step in which every unit takes part, without noise."""
    count = len(set(ids)) if settings.get("privacy_unit") == "patient" else len(x)
    ids = ids if settings.get("privacy_unit") == "patient" else None
    _, model, optimizer, loader = make(
        loader_of(x, batch_size=count), noise_multiplier=0.0, loss_reduction="sum",
        max_grad_norm=1.5, privacy_unit_ids=ids, **settings,
    )  # fmt: skip
    return train(model, optimizer, loader)[-1].double()


@pytest.mark.parametrize("slices", [1, 5, 40])
@pytest.mark.parametrize("clipping", ["flat", "automatic", "auto_v", "psac"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_patient_with_any_number_of_slices_moves_the_sum_by_the_bound(slices, clipping, reduction):
    others, slices_of_one = vectors(12), 100.0 * vectors(1).expand(slices, -1)
    x, ids = torch.cat([others, slices_of_one]), [i // 3 for i in range(12)] + [99] * slices
    settings = {"privacy_unit": "patient", "clipping": clipping, "unit_reduction": reduction}
    moved = clipped_sum(x, ids, **settings) - clipped_sum(others, ids[:12], **settings)
    assert 1.0 < float(moved.norm()) <= 1.5 * (1 + 1e-6)


def test_patient_is_not_protected_by_sample_level_units():
    others, slices = vectors(12), 100.0 * vectors(1).expand(40, -1)
    moved = clipped_sum(torch.cat([others, slices]), []) - clipped_sum(others, [])
    assert float(moved.norm()) == pytest.approx(40 * 1.5, rel=1e-5)


@pytest.mark.parametrize(("mechanism", "std"), [("gaussian", 0.7), ("laplace", 0.7 * 2**0.5)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_noise_has_the_stated_scale_whatever_the_batch_holds(mechanism, std, reduction):
    width = 40_000
    for norm in (0.0, 1e6):
        x = norm * vectors(8, width, norm=1.0)
        model = nn.Linear(width, 1, bias=False)
        _, model, optimizer, loader = make(
            loader_of(x, batch_size=4), model=model, noise_multiplier=0.7, max_grad_norm=1.0,
            mechanism=mechanism, norm="l2", loss_reduction=reduction,
        )  # fmt: skip
        grad = train(model, optimizer, loader)[-1]
        divisor = 4 if reduction == "mean" else 1
        assert float(grad.std()) == pytest.approx(std / divisor, rel=0.03)


# --- optimizers, schedulers, precision ---


@pytest.mark.parametrize(
    "kind",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
        lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.RMSprop(p, lr=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
        lambda p: torch.optim.NAdam(p, lr=0.1),
    ],
)
@pytest.mark.parametrize("physical_batch_size", [None, 3])
def test_any_optimizer_steps_with_the_private_gradient(kind, physical_batch_size):
    model = linear()
    twin = copy.deepcopy(model)
    optimizer, twin_optimizer = kind(model.parameters()), kind(twin.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    twin_schedule = torch.optim.lr_scheduler.StepLR(twin_optimizer, 1, 0.5)
    _, model, optimizer, loader = make(
        loader_of(vectors(20), batch_size=5), model=model, optimizer=optimizer,
        physical_batch_size=physical_batch_size,
    )  # fmt: skip
    for _ in range(3):
        for grad in train(model, optimizer, loader):
            if grad is not None:
                twin.weight.grad = grad
                twin_optimizer.step()
        schedule.step()
        twin_schedule.step()
    torch.testing.assert_close(model.weight, twin.weight, rtol=0, atol=0)


def test_closure_is_called_once_inside_the_step():
    calls = []
    engine, model, optimizer, loader = make(loader_of(vectors(20)))
    for (x,) in loader:

        def closure(x=x):
            optimizer.zero_grad()
            loss = model(x)[:, 0]
            loss.sum().backward()
            calls.append(len(x))
            return loss.sum()

        loss = optimizer.step(closure)
        assert loss.shape == ()
    assert len(calls) == engine.steps == 5


def test_engine_does_not_keep_what_it_released():
    _, model, optimizer, loader = make(loader_of(vectors(8)))
    train(model, optimizer, loader)
    released = weakref.ref(model.weight.grad)
    optimizer.step()  # the released gradient once more: post-processing
    gc.disable()
    try:
        model.weight.grad = None
        assert released() is None
    finally:
        gc.enable()
    model.weight.grad = torch.ones_like(model.weight)
    with pytest.raises(PrivacyError, match="did not release"):
        optimizer.step()


def test_module_and_optimizer_come_back_as_they_were():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.ReLU(inplace=True))
    keys = list(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters())
    engine = PrivacyEngine()
    back = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader_of(torch.randn(8, 1, 8, 8)),
        noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    assert back[0] is model
    assert back[1] is optimizer
    train(model, optimizer, back[2], loss=lambda out: out.flatten(1).sum(1))
    assert list(model.state_dict()) == keys
    again = copy.deepcopy(model)
    assert list(again.state_dict()) == keys
    torch.optim.Adam(again.parameters()).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_have_the_dtype_of_their_parameters(dtype):
    model = linear().to(dtype)
    _, model, optimizer, loader = make(loader_of(vectors(12).to(dtype)), model=model)
    assert all(grad.dtype == dtype for grad in train(model, optimizer, loader))


def test_autocast_works_inside_the_loop():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 1))
    engine, model, optimizer, loader = make(loader_of(torch.randn(16, 1, 8, 8)), model=model)
    for (x,) in loader:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x)[:, 0].float()
        loss.sum().backward()
        optimizer.step()
    assert engine.steps == 4
    assert model[0].weight.grad.dtype == torch.float32


def test_frozen_parameters_stay_as_they_are():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 1))
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    *_, loader = make(loader_of(vectors(20)), model=model, optimizer=optimizer)
    train(model, optimizer, loader)
    assert torch.equal(model[0].weight, before)
    model[0].requires_grad_(True)
    with pytest.raises(PrivacyError, match="trained parameters changed"):
        train(model, optimizer, loader)
