"""PrivacyLedger: append-only, durable, replayed to the same epsilon."""

import fcntl
import json
import math
import os
import subprocess
import sys

import dp_accounting as dp
import pytest

from dpfast import PrivacyError, PrivacyLedger
from dpfast.privacy.accounting import epsilon

DELTA = 1e-5
STEP = dp.PoissonSampledDpEvent(0.1, dp.GaussianDpEvent(1.3))
STATISTICS = dp.GaussianDpEvent(5.0)


def training(ledger, event=STEP, unit="patient", **more):
    return ledger.register(event, privacy_unit=unit, description={"sampling": "poisson"}, **more)


def test_ledger_counts_and_composes(tmp_path):
    ledger = PrivacyLedger(tmp_path / "ledger.jsonl")
    assert ledger.epsilon(DELTA) == 0.0
    step = training(ledger)
    for _ in range(7):
        ledger.record(step)
    ledger.record(training(ledger, STATISTICS))
    assert ledger.epsilon(DELTA) == epsilon([(STEP, 7), (STATISTICS, 1)], DELTA)
    assert ledger.spending(step).steps == 7
    assert training(ledger) == step  # an equal description is the same mechanism


@pytest.mark.parametrize("durable", [True, False])
def test_report_says_what_was_spent_for_whom(tmp_path, durable):
    ledger = PrivacyLedger(tmp_path / "ledger.jsonl" if durable else None)
    ledger.record(training(ledger), steps=3, spends=1)
    report = json.loads(json.dumps(ledger.report(DELTA), allow_nan=False))
    assert report["epsilon"] == epsilon([(STEP, 1)], DELTA)
    assert report["privacy_unit"] == "patient"
    assert report["adjacency"] == "add_or_remove_one"
    assert report["durable"] is durable
    assert report["guarantee"] == "(epsilon, delta)"
    assert report["mechanisms"][0]["description"] == {"sampling": "poisson"}
    assert (report["mechanisms"][0]["steps"], report["mechanisms"][0]["spends"]) == (3, 1)


def test_ledger_is_replayed_to_the_same_epsilon(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = PrivacyLedger(path)
    step = training(ledger)
    for _ in range(5):
        ledger.record(step)
    ledger.plan({"target_epsilon": 3.0})
    before = ledger.report(DELTA)
    del ledger
    again = PrivacyLedger(path)
    assert again.report(DELTA) == before
    assert again.plans == ({"target_epsilon": 3.0},)
    again.record(training(again))
    assert again.spending(step).steps == 6


def test_file_is_json_lines_written_before_record_returns(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = PrivacyLedger(path)
    step = training(ledger)
    for count in range(1, 4):
        ledger.record(step)
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        assert sum(entry["type"] == "release" for entry in entries) == count
    assert entries[0]["type"] == "header"
    assert path.stat().st_mode & 0o077 == 0


def test_reasons_make_epsilon_infinite_and_keep_the_conditional_one():
    ledger = PrivacyLedger()
    step = training(ledger, reasons=["percentile_paper"])
    assert ledger.epsilon(DELTA) == 0.0  # nothing released yet
    ledger.record(step)
    report = ledger.report(DELTA)
    assert ledger.epsilon(DELTA) == math.inf
    assert report["epsilon"] is None
    assert report["guarantee"] == "none"
    assert report["reasons"] == ["percentile_paper"]
    assert report["conditional_epsilon"] == epsilon([(STEP, 1)], DELTA)


def test_non_private_use_is_never_forgotten(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = PrivacyLedger(path)
    ledger.record(training(ledger))
    ledger.mark_non_private("non_dp_diagnostics")
    ledger.record(training(ledger))
    del ledger
    again = PrivacyLedger(path)
    assert again.epsilon(DELTA) == math.inf
    assert again.report(DELTA)["reasons"] == ["non_dp_diagnostics"]
    assert again.epsilon(DELTA, conditional=True) == epsilon([(STEP, 2)], DELTA)


def test_one_privacy_unit_for_all_entries():
    ledger = PrivacyLedger()
    training(ledger)
    with pytest.raises(PrivacyError, match="privacy_unit must be 'patient'"):
        training(ledger, unit="sample")


# --- the file ---


def written(path, releases=3):
    ledger = PrivacyLedger(path)
    step = training(ledger)
    for _ in range(releases):
        ledger.record(step)
    del ledger
    return path.read_bytes()


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_line_cut_short_by_a_crash_is_dropped(tmp_path, cut):
    path = tmp_path / "ledger.jsonl"
    data = written(path)
    path.write_bytes(data[:-cut])
    ledger = PrivacyLedger(path)
    assert ledger.spending(0).steps == 2
    ledger.record(0)
    del ledger
    assert PrivacyLedger(path).spending(0).steps == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[:2] + lines[3:],  # a release removed
        lambda lines: [lines[0], lines[1].replace(b"1.3", b"9.9"), *lines[2:]],
        lambda lines: lines[1:],  # no header
        lambda lines: [*lines[:3], b"{}\n", *lines[3:]],
        lambda lines: [b"nonsense\n", *lines],
        lambda lines: [*lines, lines[-1]],
    ],
)
def test_changed_file_is_refused_and_left_alone(tmp_path, change):
    path = tmp_path / "ledger.jsonl"
    changed = b"".join(change(written(path).splitlines(keepends=True)))
    path.write_bytes(changed)
    with pytest.raises(PrivacyError, match="PrivacyLedger: line"):
        PrivacyLedger(path)
    assert path.read_bytes() == changed


def test_file_changed_while_open_is_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = PrivacyLedger(path)
    step = training(ledger)
    with open(path, "ab") as file:
        file.write(b"x")
    with pytest.raises(PrivacyError, match="changed by somebody else"):
        ledger.record(step)
    assert ledger.spending(step).steps == 0


def test_ledger_has_one_writer(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = PrivacyLedger(path)
    path.read_bytes()  # closing this descriptor gives the lock away; the next entry takes it back
    step = training(ledger)
    code = f"import dpfast; dpfast.PrivacyLedger({str(path)!r})"
    # Elsewhere: the repository's source folder would hide the installed package.
    command = [sys.executable, "-c", code]
    other = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "in use by another process" in other.stderr
    child = os.fork()
    if child == 0:
        try:
            ledger.record(step)
        except PrivacyError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    ledger.record(step)
    again = PrivacyLedger(path)  # within the process, whoever opened it last
    with pytest.raises(PrivacyError, match="opened again in this process"):
        ledger.record(step)
    again.record(step)
    assert (ledger.spending(step).steps, again.spending(step).steps) == (1, 2)
    again.close()
    with pytest.raises(PrivacyError, match="was closed"):
        again.record(step)


def test_ledger_that_cannot_be_written_counts_nothing(tmp_path, monkeypatch):
    ledger = PrivacyLedger(tmp_path / "ledger.jsonl")
    step = training(ledger)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            ledger.record(step)
    # The line may or may not be on the disk: this ledger takes no more, the next one reads it.
    with pytest.raises(PrivacyError, match="changed by somebody else"):
        ledger.record(step)


def test_errors_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="path must be a path or None, got int"):
        PrivacyLedger(3)
    with pytest.raises(OSError, match="no_such_folder"):
        PrivacyLedger(tmp_path / "no_such_folder" / "ledger.jsonl")
    ledger = PrivacyLedger()
    for bad in ((0, 1, 1), (-1, 1, 1)):
        with pytest.raises(ValueError, match="mechanism must be registered"):
            ledger.record(bad[0])
    step = training(ledger)
    for more in ({"steps": 0}, {"spends": -1}):
        with pytest.raises(ValueError, match="steps >= 1 and spends >= 0"):
            ledger.record(step, **more)
    assert ledger.epsilon(DELTA) == 0.0


# --- reading only ---


def test_reading_leaves_file_and_lock_alone(tmp_path):
    path = tmp_path / "ledger.jsonl"
    data = written(path)
    path.chmod(0o400)
    ledger = PrivacyLedger.read(str(path))
    assert ledger.epsilon(DELTA) == epsilon([(STEP, 3)], DELTA)
    assert ledger.report(DELTA)["privacy_unit"] == "patient"
    assert ledger.path == path
    path.chmod(0o600)
    assert PrivacyLedger(path).spending(0).steps == 3  # nobody holds a lock
    assert path.read_bytes() == data


def test_line_that_is_not_whole_is_not_read_and_stays(tmp_path):
    path = tmp_path / "ledger.jsonl"
    cut = written(path)[:-5]
    path.write_bytes(cut)
    assert PrivacyLedger.read(path).spending(0).steps == 2
    assert path.read_bytes() == cut


def test_ledger_is_read_while_another_process_writes_it(tmp_path):
    path = tmp_path / "ledger.jsonl"
    code = f"""
import dp_accounting, dpfast
ledger = dpfast.PrivacyLedger({str(path)!r})
step = ledger.register(dp_accounting.GaussianDpEvent(2.0), privacy_unit="sample", description={{}})
while input():
    ledger.record(step)
    print("recorded", flush=True)
"""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, text=True, bufsize=1, cwd=tmp_path
    ) as writer:
        for count in range(1, 4):
            writer.stdin.write("go\n")
            assert writer.stdout.readline() == "recorded\n"
            assert PrivacyLedger.read(path).spending(0).steps == count
            with pytest.raises(PrivacyError, match="in use by another process"):
                PrivacyLedger(path)
        writer.stdin.write("\n")
        assert writer.wait(60) == 0


def test_reading_in_the_same_process_leaves_the_lock_with_the_writer(tmp_path):
    path = tmp_path / "ledger.jsonl"
    written(path)
    ledger = PrivacyLedger(path)
    ledger.record(0)
    assert PrivacyLedger.read(path).spending(0).steps == 4
    child = os.fork()
    if child == 0:
        with open(path, "ab") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    ledger.close()
    assert PrivacyLedger.read(path).spending(0).steps == 4


def test_ledger_that_is_read_takes_no_entries(tmp_path):
    path = tmp_path / "ledger.jsonl"
    data = written(path)
    ledger = PrivacyLedger.read(path)
    for append in (
        lambda: ledger.record(0),
        lambda: training(ledger, STATISTICS),
        lambda: ledger.plan({"target_epsilon": 3.0}),
        lambda: ledger.mark_non_private("non_dp_diagnostics"),
    ):
        with pytest.raises(PrivacyError, match="is open for reading only"):
            append()
    assert ledger.spent() == [(STEP, 3)]
    assert path.read_bytes() == data


def test_only_a_whole_ledger_is_read(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with pytest.raises(FileNotFoundError):
        PrivacyLedger.read(path)
    assert not path.exists()
    path.touch()
    with pytest.raises(PrivacyError, match="must begin with its header, it is empty"):
        PrivacyLedger.read(path)
    path.unlink()
    data = written(path)
    path.write_bytes(data.replace(b"1.3", b"9.9"))
    with pytest.raises(PrivacyError, match="PrivacyLedger: line 2"):
        PrivacyLedger.read(path)
    path.write_bytes(data)
    ledger = PrivacyLedger(path)
    assert PrivacyLedger.read(path).spent() == ledger.spent()
    ledger.record(0)  # reading took nothing from the writer
    with pytest.raises(TypeError, match="path must be a path, got NoneType"):
        PrivacyLedger.read(None)


# --- checkpoints ---


def test_checkpoint_never_rewinds_a_ledger(tmp_path):
    ledger = PrivacyLedger(tmp_path / "ledger.jsonl")
    step = training(ledger)
    ledger.record(step)
    state = ledger.state_dict()
    ledger.record(step)
    ledger.load_state_dict(json.loads(json.dumps(state)))
    assert ledger.spending(step).steps == 2


@pytest.mark.parametrize("durable", [True, False])
def test_checkpoint_is_carried_over_once_into_a_new_ledger(tmp_path, durable):
    old = PrivacyLedger()
    old.record(training(old), steps=4, spends=4)
    old.mark_non_private("non_dp_diagnostics")
    old.plan({"target_epsilon": 2.0})
    state = old.state_dict()
    new = PrivacyLedger(tmp_path / "new.jsonl" if durable else None)
    training(new)  # a fresh engine has registered its mechanism by now
    for _ in range(2):
        new.load_state_dict(state)
        assert new.spent() == old.spent()
        assert new.plans == old.plans
    new.record(0)
    new.load_state_dict(state)  # the same checkpoint again, after a crash
    assert new.spending(0).steps == 5
    old.record(0)
    with pytest.raises(PrivacyError, match="belongs to ledger"):
        new.load_state_dict(old.state_dict())


def test_checkpoint_of_lost_entries_or_of_another_run_is_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = PrivacyLedger(path)
    step = training(ledger)
    old = path.read_bytes()
    ledger.record(step)
    state = ledger.state_dict()
    del ledger
    path.write_bytes(old)  # a backup was put back
    behind = PrivacyLedger(path)
    with pytest.raises(PrivacyError, match="has lost entries"):
        behind.load_state_dict(state)
    other = PrivacyLedger()
    other.record(training(other))
    with pytest.raises(PrivacyError, match="has entries of its own"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="state must be of format"):
        other.load_state_dict({})


def test_a_ledger_that_takes_no_entries_says_so_before_one(tmp_path):
    path = tmp_path / "ledger.jsonl"
    for ledger in (PrivacyLedger(), PrivacyLedger(path)):
        ledger.check_writable()
    with pytest.raises(PrivacyError, match="open for reading only"):
        PrivacyLedger.read(path).check_writable()
    ledger.close()
    with pytest.raises(PrivacyError, match="was closed"):
        ledger.check_writable()
    other = PrivacyLedger(path)
    path.write_bytes(path.read_bytes() + b"{}\n")
    with pytest.raises(PrivacyError, match="changed by somebody else"):
        other.check_writable()
