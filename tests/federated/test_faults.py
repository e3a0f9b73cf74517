"""What happens when processes and machines fail; real servers, sites and connections."""

import json
import signal

import pytest

pytest.importorskip("flwr")

from dpfast.federated.certificates import make_certificates

from .processes import Federation, rounds, until
from .sites import write

pytestmark = pytest.mark.slow
NAMES = ["site 1", "site 2"]
# A round takes a few seconds, so that there is a middle of it.
SLOW_ROUNDS = {
    "data": {"patients": 300},
    "sites": {"number": 2},
    "training": {"local_epochs": 2},
    "federation": {"rounds": 3},
}
QUICK = {"sites": {"number": 2}, "federation": {"rounds": 2}}


def planned(federation, whole):
    """Steps of a run that nothing happened to, by site."""
    return {name: whole.steps(name) for name in federation.names}


def report_of(federation):
    return json.loads((federation.run / "report.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Steps by site where nothing happens."""
    from dpfast.federated.training import federate
    from dpfast.privacy import PrivacyLedger

    from .test_training import Watch

    folder = tmp_path_factory.mktemp("whole")
    federate(write(folder, **SLOW_ROUNDS), Watch())
    return {
        name: PrivacyLedger.read(folder / f"run/sites/{name}/ledger.jsonl").spending(0).steps
        for name in NAMES
    }


def test_site_killed_in_mid_round_comes_back_and_the_run_goes_on(tmp_path, undisturbed):
    with Federation(tmp_path, write(tmp_path, **SLOW_ROUNDS), NAMES) as federation:
        server, first = federation.serve(), federation.join("site 1")
        second = federation.join("site 2")
        until(lambda: len(rounds(federation.run)) == 1, 200, server)
        before = federation.steps("site 2")
        # In the middle: some steps of round 2 are counted.
        until(lambda: federation.steps("site 2") > before, 100, second)
        second.kill()
        # The server learns of it, changes nothing and ends with the reason.
        assert server.wait(200) == 2, server.said
        assert "round 2 must have 2 sites' updates, got 1 (site 2: " in server.said
        assert len(rounds(federation.run)) == 1
        server, second = federation.serve(), federation.join("site 2")
        assert server.wait(200) == 0, server.said
        assert "going on after round 1" in server.said
        assert [line["round"] for line in rounds(federation.run)] == [1, 2, 3]
        # Nothing was spent twice by who had finished, and nobody spent more than planned.
        assert {name: federation.steps(name) for name in NAMES} == undisturbed
        assert first.process.poll() is None


def test_run_goes_on_without_a_site_that_is_lost_if_so_told(tmp_path):
    changes = {**SLOW_ROUNDS, "federation": {"rounds": 2, "min_sites": 1}}
    with Federation(tmp_path, write(tmp_path, **changes), NAMES) as federation:
        server, second = federation.serve("--reply", "60"), federation.join("site 2")
        federation.join("site 1")
        until(lambda: len(rounds(federation.run)) == 1, 200, server)
        second.kill()
        assert server.wait(300) == 0, server.said
        last = rounds(federation.run)[1]["sites"]
        assert last["site 1"]["status"] == "trained"
        assert last["site 2"]["status"] == "failed"


def test_site_that_never_answers_is_waited_for_no_longer_than_agreed(tmp_path):
    changes = {**QUICK, "federation": {"rounds": 2, "min_sites": 1}}
    with Federation(tmp_path, write(tmp_path, **changes), NAMES) as federation:
        server, second = federation.serve("--reply", "20"), federation.join("site 2")
        federation.join("site 1")
        until(lambda: len(rounds(federation.run)) == 1, 200, server)
        # Its connection lives on, and its work stands still.
        second.process.send_signal(signal.SIGSTOP)
        try:
            assert server.wait(200) == 0, server.said
        finally:
            second.process.send_signal(signal.SIGCONT)
        last = rounds(federation.run)[1]["sites"]["site 2"]
        assert (last["status"], last["reason"]) == ("failed", "no reply")


def test_server_killed_between_rounds_goes_on_and_nobody_pays_twice(tmp_path, undisturbed):
    with Federation(tmp_path, write(tmp_path, **SLOW_ROUNDS), NAMES) as federation:
        server = federation.serve()
        sites = [federation.join(name) for name in NAMES]
        until(lambda: len(rounds(federation.run)) == 1, 200, server)
        server.kill()
        server = federation.serve()
        assert server.wait(300) == 0, server.said
        assert "going on after round 1" in server.said
        assert {name: federation.steps(name) for name in NAMES} == undisturbed
        assert all(site.process.poll() is None for site in sites)
        assert report_of(federation)["privacy"]["guarantee"] == "(epsilon, delta)"


def test_unregistered_site_is_not_let_in(tmp_path):
    with Federation(tmp_path, write(tmp_path, **QUICK), NAMES) as federation:
        make_certificates(tmp_path / "other", ["site 2"], ["127.0.0.1"])
        stranger = tmp_path / "stranger"
        stranger.mkdir()
        # The right authority, so that it can connect, and a key that nobody knows.
        (stranger / "ca.crt").write_bytes((federation.keys / "site 2/ca.crt").read_bytes())
        (stranger / "site.key").write_bytes((tmp_path / "other/site 2/site.key").read_bytes())
        server = federation.serve("--join", "30")
        federation.join("site 1")
        second = federation.join("site 2", "--join", "10", keys=stranger)
        assert second.wait(100) == 2
        assert "must let site 2 in" in second.said
        assert server.wait(100) == 2
        assert "got none of site 2" in server.said
        assert not (federation.run / "rounds.jsonl").exists()
        assert not (tmp_path / "own/site 2/checkpoint.pt").exists()


def test_server_with_a_certificate_of_somebody_else_is_not_spoken_to(tmp_path):
    with Federation(tmp_path, write(tmp_path, **QUICK), NAMES) as federation:
        make_certificates(tmp_path / "other", NAMES, ["127.0.0.1"])
        server = federation.serve("--join", "30")
        sites = [
            federation.join(name, "--join", "10", keys=tmp_path / "other" / name) for name in NAMES
        ]
        for name, site in zip(NAMES, sites, strict=True):
            assert site.wait(150) == 2, site.said
            assert f"must let {name} in" in site.said
            assert not (tmp_path / "own" / name / "checkpoint.pt").exists()
        assert server.wait(100) == 2
        assert "got none of site 1, site 2" in server.said
