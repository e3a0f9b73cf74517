"""PrivacyEngine: what is refused before any data is read, and misuse in the loop."""

import math

import pytest
import torch
from torch import nn

from dpfast import PrivacyEngine, PrivacyError
from tests.privacy.helpers import linear, loader_of, make, train, vectors

DELTA = 1e-5


# --- what is refused, before any data is read ---


class Unread(torch.utils.data.Dataset):
    """A data set that must not be read."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        raise AssertionError("private data was read")


def unread(**more):
    return torch.utils.data.DataLoader(Unread(), batch_size=4, **more)


def batchnorm():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


def parallel():
    return nn.DataParallel(linear())


def batch_loss(out, target):
    return ((out - target) ** 2).mean()


def coupled_loss(out, target):
    return ((out - target) ** 2).flatten(1).sum(1) * out.mean()


def good_loss(out, target):
    return ((out - target) ** 2).flatten(1).sum(1)


class NotEmpty(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = linear()

    def forward(self, x):
        if not len(x):
            raise ValueError("no samples")
        return self.inner(x)


PROBE = (torch.randn(3, 6), torch.randn(3, 1))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"module": batchnorm()}, PrivacyError, "mixes the samples"),
        ({"module": parallel()}, PrivacyError, "must not be wrapped, got DataParallel"),
        ({"module": linear().requires_grad_(False)}, ValueError, "requires grad"),
        ({"module": "net"}, TypeError, "module must be a torch.nn.Module"),
        ({"optimizer": "sgd"}, TypeError, "optimizer must be a torch.optim.Optimizer"),
        ({"criterion": batch_loss, "probe": PROBE}, PrivacyError, "one number per sample"),
        ({"criterion": coupled_loss, "probe": PROBE}, PrivacyError, "refuse_coupling: "),
        ({"criterion": good_loss}, ValueError, "criterion and probe must be given together"),
        ({"probe": PROBE}, ValueError, "criterion and probe must be given together"),
        (
            {"module": NotEmpty(), "criterion": good_loss, "probe": PROBE},
            PrivacyError,
            "must take a batch of 0 samples",
        ),
        ({"noise_multiplier": -1.0}, ValueError, "noise_multiplier must be"),
        ({"noise_multiplier": math.nan}, ValueError, "noise_multiplier must be"),
        ({"noise_multiplier": True}, TypeError, "noise_multiplier must be a number"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be"),
        ({"max_grad_norm": math.inf}, ValueError, "max_grad_norm must be"),
        ({"max_grad_norm": [1.0, 1.0]}, ValueError, "one value for each of the 1 trained"),
        ({"clipping": "flatt"}, ValueError, "clipping must be one of"),
        ({"clipping": torch.ones(4)}, TypeError, "clipping must be a rule's name"),
        ({"mechanism": "none"}, ValueError, "mechanism must be one of gaussian, laplace"),
        ({"norm": "l3"}, ValueError, "norm must be one of"),
        ({"privacy_unit": "site"}, ValueError, "privacy_unit must be one of"),
        ({"privacy_unit": "patient"}, PrivacyError, "needs privacy_unit_ids"),
        ({"privacy_unit_ids": [1] * 20}, ValueError, "did you mean"),
        ({"max_samples_per_unit": 3}, ValueError, "max_samples_per_unit must be None"),
        ({"sampling": "shuffled"}, ValueError, "sampling must be one of"),
        ({"sample_rate": 0.0}, ValueError, "sample_rate must be"),
        ({"sample_rate": 1.5}, ValueError, "sample_rate must be"),
        ({"max_batch_size": 0}, ValueError, "max_batch_size must be >= 1"),
        ({"max_batch_size": 2.0}, TypeError, "max_batch_size must be an int"),
        ({"max_batch_size": 9, "mechanism": "laplace"}, ValueError, "max_batch_size must be None"),
        (
            {"max_batch_size": 9, "sampling": "shuffled_unamplified"},
            ValueError,
            "max_batch_size must be None",
        ),
        ({"loss_reduction": "none"}, ValueError, "loss_reduction must be one of"),
        ({"physical_batch_size": 0}, ValueError, "physical_batch_size must be >= 1"),
        ({"strategy": "best"}, ValueError, "strategy must be one of"),
        ({"poisson_sampling": False}, TypeError, "poisson_sampling"),
    ],
)
def test_bad_setting_is_an_error_before_any_data_is_read(tmp_path, settings, error, message):
    path = tmp_path / "ledger.jsonl"
    engine = PrivacyEngine(ledger=path)
    before = path.read_bytes()
    model = settings.pop("module", linear())
    params = model.parameters() if isinstance(model, nn.Module) else linear().parameters()
    settings = {
        "optimizer": torch.optim.SGD(params, lr=0.1), "noise_multiplier": 1.0, "max_grad_norm": 1.0,
        "data_loader": unread(), **settings,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        engine.make_private(module=model, **settings)
    assert path.read_bytes() == before


def test_accountant_without_a_bound_is_refused():
    engine = PrivacyEngine(accountant="rdp")
    with pytest.raises(ValueError, match="accountant 'rdp' has no bound for"):
        make(unread(), engine=engine, mechanism="laplace")
    assert engine.ledger.mechanisms == ()


def test_layer_that_mixes_samples_is_refused_when_it_is_put_into_training_mode():
    model = batchnorm().eval()
    for param in model[1].parameters():
        param.requires_grad_(False)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    *_, loader = make(unread(), model=model, optimizer=optimizer)
    model.train()
    with pytest.raises(PrivacyError, match="mixes the samples"):
        next(iter(loader))
    assert torch.overrides._get_current_function_mode() is None


def test_good_setting_reads_no_data_either():
    engine = PrivacyEngine()
    model = linear()
    engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=unread(),
        noise_multiplier=1.0, max_grad_norm=1.0, criterion=good_loss, probe=PROBE,
    )  # fmt: skip
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"accountant": "gdp"}, ValueError, "accountant must be one of pld, rdp"),
        ({"noise": 7}, TypeError, "noise must be a NoiseSource"),
        ({"ledger": 7}, TypeError, "path must be a path"),
        ({"secure_mode": True}, TypeError, "secure_mode"),
    ],
)
def test_bad_engine_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        PrivacyEngine(**arguments)


def test_optimizer_must_hold_the_trained_parameters_and_no_others():
    model, other = nn.Sequential(linear(), nn.Linear(1, 1)), linear()
    both = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    with pytest.raises(PrivacyError, match="would be trained without privacy"):
        make(unread(), model=model, optimizer=both)
    part = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"1\.weight is not in it"):
        make(unread(), model=model, optimizer=part)
    with pytest.raises(PrivacyError, match="got LBFGS"):
        make(unread(), model=model, optimizer=torch.optim.LBFGS(model.parameters()))
    _, _, used, _ = make(unread(), model=model)
    with pytest.raises(PrivacyError, match="optimizer is private already"):
        make(unread(), model=model, optimizer=used)


def test_engine_makes_one_run_private():
    engine, *_ = make(unread())
    with pytest.raises(PrivacyError, match="an engine makes one run private"):
        make(unread(), engine=engine)
    with pytest.raises(RuntimeError, match="after make_private"):
        PrivacyEngine().report(DELTA)


# --- misuse in the loop releases nothing ---


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (lambda model, x: model(x).mean().backward(), PrivacyError, "needs the per-sample loss"),
        (lambda model, x: None, RuntimeError, "before backward was called"),
        (
            lambda model, x: model(torch.cat([x, x]))[:, 0].sum().backward(),
            PrivacyError,
            "one entry for each sample of the batch",
        ),
    ],
)
def test_misuse_in_the_loop_is_an_error_and_releases_nothing(body, error, message):
    engine, model, optimizer, loader = make(loader_of(vectors(20), batch_size=20))
    before = model.weight.clone()

    def loop():
        for (x,) in loader:
            body(model, x)
            optimizer.step()

    with pytest.raises(error, match=message):
        loop()
    assert engine.steps == 0
    assert torch.equal(model.weight, before)


def test_gradient_from_outside_the_loop_is_refused():
    _, model, optimizer, loader = make(loader_of(vectors(20)))
    train(model, optimizer, loader)
    optimizer.step()  # the released gradient once more: post-processing
    optimizer.zero_grad()
    model(vectors(3))[:, 0].sum().backward()
    before = model.weight.clone()
    with pytest.raises(PrivacyError, match="a gradient that the engine did not release"):
        optimizer.step()
    assert torch.equal(model.weight, before)
    optimizer.add_param_group({"params": linear().parameters()})
    optimizer.param_groups[1]["params"][0].grad = torch.ones(1, 6)
    optimizer.param_groups[0]["params"][0].grad = None
    with pytest.raises(PrivacyError, match="a gradient that the engine did not release"):
        optimizer.step()


def test_ledger_that_cannot_be_written_stops_the_release(tmp_path):
    path = tmp_path / "ledger.jsonl"
    engine, model, optimizer, loader = make(
        loader_of(vectors(20)), engine=PrivacyEngine(ledger=path)
    )
    train(model, optimizer, loader)
    before, drawn = model.weight.clone(), engine._noise.step
    with open(path, "ab") as file:
        file.write(b"x")
    with pytest.raises(PrivacyError, match="changed by somebody else"):
        train(model, optimizer, loader)
    assert torch.equal(model.weight, before)
    assert engine._noise.step == drawn
