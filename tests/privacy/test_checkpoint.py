"""Checkpoints, and processes killed at any moment: nothing under-counted, no noise used twice."""

import contextlib
import hashlib
import itertools
import json
import os
import random
import signal
import time

import dp_accounting
import pytest
import torch

import dpfast
from dpfast import (
    NoiseSource,
    NoisyHistogram,
    PrivacyEngine,
    PrivacyError,
    PrivacyLedger,
    PrivateQuantile,
)
from dpfast.privacy import steps as private_steps
from dpfast.privacy.accounting import TrainingStep, epsilon
from tests.privacy.helpers import linear, loader_of, make, train, vectors

DELTA = 1e-5
X = vectors(40)


def start(ledger=None, noise=None, **settings):
    engine = PrivacyEngine(ledger=ledger, noise=noise)
    return make(loader_of(X, batch_size=10), engine=engine, **settings)


def test_seeded_run_goes_on_from_a_checkpoint_bit_for_bit():
    settings = {"threshold": PrivateQuantile()}
    engine, model, optimizer, loader = start(noise=NoiseSource(3), **settings)
    train(model, optimizer, loader)
    saved = {
        "engine": engine.state_dict(),
        "model": {k: v.clone() for k, v in model.state_dict().items()},
    }
    train(model, optimizer, loader)
    again, other, other_optimizer, other_loader = start(noise=NoiseSource(3), **settings)
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["engine"])
    train(other, other_optimizer, other_loader)
    assert torch.equal(model.weight, other.weight)
    assert again.steps == engine.steps == 8
    assert again.max_grad_norm == engine.max_grad_norm
    assert again.get_epsilon(DELTA) == engine.get_epsilon(DELTA)


@pytest.mark.parametrize("threshold", [None, PrivateQuantile(), NoisyHistogram()])
@pytest.mark.parametrize("durable", [True, False])
def test_state_goes_through_torch_save_and_holds_no_secret(tmp_path, threshold, durable):
    ledger = tmp_path / "ledger.jsonl" if durable else None
    engine, model, optimizer, loader = start(ledger, threshold=threshold)
    train(model, optimizer, loader)
    torch.save(engine.state_dict(), tmp_path / "engine.pt")
    state = torch.load(tmp_path / "engine.pt", weights_only=True)
    key = engine._noise._key()
    assert key.hex() not in json.dumps(state)
    bound, steps = engine.max_grad_norm, engine.steps
    del engine, model, optimizer, loader
    again, model, optimizer, loader = start(ledger, threshold=threshold)
    again.load_state_dict(state)
    assert again.max_grad_norm == bound
    assert again.steps == steps == 4
    assert again._noise._key() != key
    train(model, optimizer, loader)
    assert again.get_epsilon(DELTA) == epsilon([(TrainingStep(1.0, 0.25, 40).event(), 8)], DELTA)


def test_steps_after_the_checkpoint_stay_counted(tmp_path):
    engine, model, optimizer, loader = start(tmp_path / "ledger.jsonl")
    train(model, optimizer, loader)
    state = engine.state_dict()
    for (x,) in itertools.islice(loader, 3):
        model(x)[:, 0].sum().backward()
        optimizer.step()
    del engine, model, optimizer, loader
    again, *_ = start(tmp_path / "ledger.jsonl")
    again.load_state_dict(state)
    assert again.steps == 7


def test_checkpoint_of_other_settings_is_refused():
    engine, *_ = start()
    state = engine.state_dict()
    for changed in ({"noise_multiplier": 2.0}, {"max_grad_norm": 0.5}, {"sample_rate": 0.1}):
        other, *_ = start(**changed)
        with pytest.raises(PrivacyError, match=r"made with other settings: .* was .* and is"):
            other.load_state_dict(state)
    patients, *_ = start(privacy_unit="patient", privacy_unit_ids=[i // 2 for i in range(40)])
    with pytest.raises(PrivacyError, match="privacy_unit was 'sample' and is 'patient'"):
        patients.load_state_dict(state)
    for damaged in ({}, [], {"format": "other"}):
        with pytest.raises(ValueError, match="state must be of format"):
            engine.load_state_dict(damaged)


def with_target(ledger):
    engine, model = PrivacyEngine(ledger=ledger), linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    *_, loader = engine.make_private_with_epsilon(
        module=model, optimizer=optimizer, data_loader=loader_of(X, batch_size=10),
        target_epsilon=3.0, target_delta=DELTA, epochs=3, max_grad_norm=1.0,
    )  # fmt: skip
    return engine, model, optimizer, loader


def test_interrupted_run_keeps_its_noise_and_its_budget(tmp_path):
    path = tmp_path / "ledger.jsonl"
    engine, model, optimizer, loader = with_target(path)
    noise = engine.ledger.plans[0]["noise_multiplier"]
    train(model, optimizer, loader)
    next(iter(loader))  # drawn and never stepped: costs nothing
    for (x,) in itertools.islice(loader, 2):
        model(x)[:, 0].sum().backward()
        optimizer.step()
    del engine, model, optimizer, loader
    again, model, optimizer, loader = with_target(path)
    assert [plan["noise_multiplier"] for plan in again.ledger.plans] == [noise]
    assert (again.steps, again.max_steps) == (6, 12)
    train(model, optimizer, loader)
    assert len(train(model, optimizer, loader)) == 2  # the budget ends within the epoch
    assert again.steps == 12
    assert again.get_epsilon(DELTA) <= 3.0
    with pytest.raises(PrivacyError, match="the budget is spent"):
        train(model, optimizer, loader)


def test_a_release_after_the_start_is_not_forgotten_when_the_run_goes_on(tmp_path):
    path = tmp_path / "ledger.jsonl"

    def release(noise):
        ledger = PrivacyLedger(path)
        event = dp_accounting.GaussianDpEvent(noise)
        ledger.record(ledger.register(event, privacy_unit="sample", description={"z": noise}))

    release(5.0)  # the noise is chosen with this in mind
    with_target(path)
    _, model, optimizer, loader = with_target(path)
    train(model, optimizer, loader)
    release(2.0)
    with pytest.raises(PrivacyError, match="must cover what the ledger counts beside this run"):
        with_target(path)
    assert PrivacyLedger.read(path).epsilon(DELTA) < 3.0


# --- killed processes ---

STEPS, EVERY = 400, 7


def child(folder):
    """Train to STEPS steps, from the last checkpoint on; note each key and step before its use."""
    torch.set_num_threads(1)
    notes = os.open(folder / "noise.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    real = private_steps.clip_and_noise

    def noting(*args, noise, noise_multiplier, **more):
        key = hashlib.sha256(noise._key()).hexdigest()[:16]
        if noise_multiplier:
            os.write(notes, f"{key} {noise.step}\n".encode())
        return real(*args, noise=noise, noise_multiplier=noise_multiplier, **more)

    private_steps.clip_and_noise = noting
    engine, model, optimizer, loader = start(folder / "ledger.jsonl")
    done = 0
    if (folder / "checkpoint.pt").exists():
        saved = torch.load(folder / "checkpoint.pt", weights_only=True)
        engine.load_state_dict(saved["engine"])
        model.load_state_dict(saved["model"])
        done = saved["done"]
    while done < STEPS:
        for (x,) in loader:
            model(x)[:, 0].sum().backward()
            optimizer.step()
            done += 1
            if done % EVERY == 0 or done == STEPS:
                state = {"engine": engine.state_dict(), "model": model.state_dict(), "done": done}
                torch.save(state, folder / "new.pt")
                os.replace(folder / "new.pt", folder / "checkpoint.pt")
            if done == STEPS:
                break


def run_child(folder, *, draws=None, seconds=0.0):
    """The exit status of a child that is killed so long after so many draws of noise, or never."""
    before = len(drawn_by(folder))
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            child(folder)
            status = 0
        os._exit(status)
    if draws is not None:
        give_up = time.monotonic() + 60
        while len(drawn_by(folder)) < before + draws and time.monotonic() < give_up:
            time.sleep(2e-4)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def drawn_by(folder):
    """Each use of the noise so far: a key's fingerprint and its step."""
    notes = folder / "noise.txt"
    return notes.read_text().splitlines() if notes.exists() else []


def counted(folder):
    ledger = dpfast.PrivacyLedger(folder / "ledger.jsonl")
    return ledger.spending(0).steps if ledger.mechanisms else 0


def test_killed_runs_never_count_too_little_and_never_use_noise_twice(tmp_path):
    train(*start()[1:])  # what the first step sets up, the children inherit
    rng = random.Random(4)
    lost = 0
    for _ in range(20):
        # A step takes a millisecond or a few.
        status = run_child(tmp_path, draws=rng.randrange(12), seconds=rng.uniform(0, 0.005))
        assert status == -signal.SIGKILL
        assert counted(tmp_path) >= len(drawn_by(tmp_path))
        saved = tmp_path / "checkpoint.pt"
        done = torch.load(saved, weights_only=True)["done"] if saved.exists() else 0
        lost = counted(tmp_path) - done
    assert 0 < done < STEPS
    assert lost > 0
    assert run_child(tmp_path) == 0
    drawn = drawn_by(tmp_path)
    assert len(set(drawn)) == len(drawn)
    # What the ledger holds beyond the uninterrupted run's steps is what was interrupted.
    total = counted(tmp_path)
    assert len(drawn) <= total == STEPS + lost
    event = TrainingStep(1.0, 0.25, 40).event()
    ledger = dpfast.PrivacyLedger(tmp_path / "ledger.jsonl")
    assert ledger.epsilon(DELTA) == epsilon([(event, STEPS + lost)], DELTA)
