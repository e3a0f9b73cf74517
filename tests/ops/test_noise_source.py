"""NoiseSource: no (key, step) is used twice, whatever is done with the source."""

import copy
import json
import pickle
import subprocess
import sys
import tempfile
import threading

import pytest
import torch

from dpfast import NoiseSource, PrivacyError, clip_and_noise

ZERO = torch.zeros(1, 64)


def draw(source=None, grads=ZERO):
    return clip_and_noise(grads, max_grad_norm=1.0, noise_multiplier=1.0, noise=source)


def same(a, b):
    """Whether the noise is the same; independent noise agrees in no element."""
    if torch.equal(a, b):
        return True
    assert (a != b).float().mean() > 0.9
    return False


# --- seeds and keys ---


def test_noise_source_repeats_with_the_same_seed():
    a, b = NoiseSource(5), NoiseSource(5)
    first = [draw(a) for _ in range(3)]
    assert all(same(x, draw(b)) for x in first)
    assert not same(first[0], first[1])
    assert not same(first[0], draw(NoiseSource(6)))


@pytest.mark.parametrize("seed", [0, 1, 2**64, 10**40])
def test_noise_source_takes_any_seed_that_is_not_negative(seed):
    assert same(draw(NoiseSource(seed)), draw(NoiseSource(seed)))


def test_noise_source_is_secure_only_without_a_seed():
    assert NoiseSource().secure
    assert not NoiseSource(0).secure
    assert not same(draw(NoiseSource()), draw(NoiseSource()))


@pytest.mark.parametrize("seed", [True, 1.0, "1", b"1", [1], torch.tensor(1)])
def test_noise_source_refuses_seeds_of_wrong_type(seed):
    with pytest.raises(TypeError, match="NoiseSource: seed must be an int or None"):
        NoiseSource(seed)


def test_noise_source_refuses_negative_seed_without_telling_it():
    with pytest.raises(ValueError, match="NoiseSource: seed must be >= 0") as error:
        NoiseSource(-1234)
    assert "1234" not in str(error.value)


def test_noise_source_repr_shows_no_key():
    for source in (NoiseSource(), NoiseSource(77)):
        words = [str(w) for w in source.state_on(torch.device("cpu"))[:4].tolist()]
        assert not any(word in repr(source) for word in [*words, "77"])


def test_noise_default_source_differs_between_calls():
    assert not same(draw(), draw())


# --- steps ---


def test_noise_source_counts_noisy_calls_only():
    source = NoiseSource(1)
    draw(source)
    clip_and_noise(ZERO, max_grad_norm=1.0, noise_multiplier=0.0, noise=source)
    clip_and_noise(ZERO, max_grad_norm=1.0, noise_multiplier=0.0, mechanism="none", noise=source)
    assert source.step == 1
    draw(source, ZERO[:0])
    assert source.step == 2


@pytest.mark.parametrize("secure", [True, False])
def test_noise_source_serves_no_step_twice_to_concurrent_threads(secure):
    source = NoiseSource() if secure else NoiseSource(1)
    results = [[] for _ in range(8)]
    ready = threading.Barrier(8)

    def work(mine):
        ready.wait()
        mine.extend(draw(source) for _ in range(50))

    threads = [threading.Thread(target=work, args=(mine,)) for mine in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    drawn = torch.stack([out for mine in results for out in mine])
    assert source.step == len(drawn) == 400
    assert all(len(drawn[:, j].unique()) == 400 for j in range(3))


def test_noise_default_source_serves_no_step_twice_to_concurrent_threads():
    # In a process of its own, so that the first use of the default source is the race.
    code = """
import threading, torch
from dpfast import clip_and_noise
results, ready, zero = [], threading.Barrier(8), torch.zeros(1, 8)
def work():
    ready.wait()
    for _ in range(20):
        results.append(clip_and_noise(zero, max_grad_norm=1.0, noise_multiplier=1.0))
threads = [threading.Thread(target=work) for _ in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
drawn = torch.stack(results)
assert len(drawn[:, 0].unique()) == len(drawn) == 160
"""
    # Elsewhere than in the source folder, which would hide an installed package.
    subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, cwd=tempfile.gettempdir()
    )


# --- checkpoints ---


def test_noise_source_seeded_state_goes_on_bit_for_bit():
    source = NoiseSource(9)
    draw(source)
    state = json.loads(json.dumps(source.state_dict()))
    expected = [draw(source) for _ in range(2)]
    other = NoiseSource(1)
    other.load_state_dict(state)
    assert other.step == 1
    assert all(same(draw(other), e) for e in expected)
    assert other.step == 3


def test_noise_source_seeded_state_may_go_forward_on_its_own_key():
    source = NoiseSource(9)
    later = NoiseSource(9)
    draw(later), draw(later)
    source.load_state_dict(later.state_dict())
    assert same(draw(source), draw(later))
    source.load_state_dict(source.state_dict())
    assert source.step == 3


def test_noise_source_seeded_refuses_to_rewind():
    source = NoiseSource(9)
    old = source.state_dict()
    draw(source)
    with pytest.raises(PrivacyError, match="NoiseSource"):
        source.load_state_dict(old)
    assert source.step == 1


def test_noise_source_secure_state_holds_no_key_and_goes_on_with_fresh_noise():
    source = NoiseSource()
    draw(source)
    draw(source)
    state = source.state_dict()
    assert set(state) == {"format", "secure", "step"}
    for word in source.state_on(torch.device("cpu"))[:4].tolist():
        key = word.to_bytes(8, "little", signed=True)
        assert str(word) not in repr(state)
        assert key.hex() not in repr(state)
    first, second = NoiseSource(), NoiseSource()
    first.load_state_dict(state)
    second.load_state_dict(state)
    assert first.secure
    assert first.step == second.step == 2
    drawn = [draw(source), draw(first), draw(second)]
    assert first.step == 3
    for i, a in enumerate(drawn):
        assert not any(same(a, b) for b in drawn[:i])
    source.load_state_dict(state)  # back in steps, but never on the same key
    assert source.step == 2
    assert not same(draw(source), drawn[0])


@pytest.mark.parametrize("seed", [None, 1])
def test_noise_source_refuses_state_of_the_other_kind(seed):
    source, other = NoiseSource(seed), NoiseSource(1 if seed is None else None)
    with pytest.raises(PrivacyError, match="secure and a seeded"):
        source.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    "damage",
    [
        {"format": "dpfast.NoiseSource/2"},
        {"format": None},
        {"secure": 0},
        {"step": -1},
        {"step": 1.0},
        {"step": True},
        {"step": "1"},
        {"key": "00"},
        {"key": "zz" * 32},
        {"key": None},
        {"key": 3},
    ],
)
def test_noise_source_refuses_damaged_state_unchanged(damage):
    source = NoiseSource(1)
    draw(source)
    with pytest.raises(ValueError, match="NoiseSource: state"):
        source.load_state_dict({**source.state_dict(), **damage})
    assert source.step == 1
    expected = NoiseSource(1)
    draw(expected)
    assert same(draw(source), draw(expected))


@pytest.mark.parametrize("missing", ["format", "secure", "step", "key"])
def test_noise_source_refuses_incomplete_state(missing):
    source = NoiseSource(1)
    state = source.state_dict()
    del state[missing]
    with pytest.raises(ValueError, match="NoiseSource: state"):
        source.load_state_dict(state)


@pytest.mark.parametrize("state", [None, [], "state", 3])
def test_noise_source_refuses_what_is_no_state(state):
    with pytest.raises(ValueError, match="NoiseSource: state"):
        NoiseSource(1).load_state_dict(state)


@pytest.mark.parametrize("step", [2**63, 2**64, 10**30])
def test_noise_source_refuses_step_beyond_its_counter(step):
    source = NoiseSource(1)
    with pytest.raises(ValueError, match="NoiseSource: state"):
        source.load_state_dict({**source.state_dict(), "step": step})


# --- copies and children ---


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps])
def test_noise_source_refuses_to_be_copied(seed, copier):
    with pytest.raises(PrivacyError, match="NoiseSource: cannot be"):
        copier(NoiseSource(seed))
    with pytest.raises(PrivacyError, match="NoiseSource: cannot be"):
        copier({"noise": NoiseSource(seed)}) if copier is not copy.copy else copier(
            NoiseSource(seed)
        )


FORK = """
import os, sys, warnings, torch
warnings.simplefilter("ignore")
from dpfast import NoiseSource, clip_and_noise
torch.set_num_threads(THREADS)
zero = torch.zeros(1, 300_000 if THREADS > 1 else 8)
def draw(source):
    out = clip_and_noise(zero, max_grad_norm=1.0, noise_multiplier=1.0, noise=source)
    return out[0:1].tolist() + [0 if source is None else source.step]
source = NoiseSource()
draw(None), draw(source)
read, write = os.pipe()
child = os.fork()
if child == 0:
    os.write(write, repr([draw(None), draw(source), draw(NoiseSource())]).encode())
    os._exit(0)
os.waitpid(child, 0)
theirs = eval(os.read(read, 10_000))
ours = [draw(None), draw(source), draw(NoiseSource())]
assert all(t[0] != o[0] for t, o in zip(theirs, ours)), (theirs, ours)
assert len({x[0] for x in theirs + ours}) == 6
assert ours[1][1] == 2, ours
assert theirs[1][1] >= 1
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("threads", [1, 2])
def test_noise_source_gives_a_forked_child_other_noise(threads):
    # With two threads the pool's threads are lost in the child, which must start its own.
    code = FORK.replace("THREADS", str(threads))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=tempfile.gettempdir())
