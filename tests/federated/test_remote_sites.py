"""Sites that hold their own data, and what is checked before anybody is connected."""

import pytest

pytest.importorskip("flwr")

from dpfast.federated.certificates import make_certificates
from dpfast.federated.deployment import serve, take_part
from dpfast.federated.sites import data_of
from dpfast.federated.training import federate

from .sites import settings, write
from .test_training import Watch

REMOTE = {"kind": "remote", "number": None, "names": ["north", "south"]}


def silent(line):
    pass


def test_each_site_has_all_of_its_own_data(tmp_path):
    own = settings(tmp_path, sites=REMOTE)
    held = data_of(own, "north")
    assert held.num_training["patient"] + held.num_validation["patient"] == 60
    with pytest.raises(ValueError, match=r"name must be of north, south .* got 'west'"):
        data_of(own, "west")


def test_a_share_of_common_data_is_what_a_trial_s_site_has(tmp_path):
    shared = settings(tmp_path)
    held = [data_of(shared, f"site {number}") for number in (1, 2, 3)]
    assert sum(e.num_training["patient"] + e.num_validation["patient"] for e in held) == 60
    with pytest.raises(ValueError, match="name must be of site 1, site 2, site 3, got 'north'"):
        data_of(shared, "north")


def test_one_machine_cannot_run_remote_sites(tmp_path):
    with pytest.raises(ValueError, match="needs `dpfast server`, and `dpfast site`"):
        federate(write(tmp_path, sites=REMOTE), Watch())
    with pytest.raises(ValueError, match="names must be different"):
        settings(tmp_path, sites={**REMOTE, "names": ["a", "a"]})
    with pytest.raises(ValueError, match=r"sites\.names"):
        settings(tmp_path, sites={**REMOTE, "names": ["a"]})


def test_a_server_needs_the_keys_of_its_sites_before_it_starts(tmp_path):
    make_certificates(tmp_path / "keys", ["north", "west"], ["127.0.0.1"])
    file = write(tmp_path, sites=REMOTE)
    with pytest.raises(ValueError, match="must hold the keys of north, south, got north, west"):
        serve(file, Watch(), certificates=tmp_path / "keys/server", host="127.0.0.1", port=1)
    with pytest.raises(ValueError, match=r"must hold SITE\.pub, got none"):
        serve(file, Watch(), certificates=tmp_path, host="127.0.0.1", port=1)
    assert not (tmp_path / "run").exists()


def test_a_site_needs_its_key_and_settings_that_keep_their_promise(tmp_path):
    file = write(tmp_path, sites=REMOTE)
    own = {"certificates": tmp_path, "server": "127.0.0.1:1", "folder": tmp_path / "own"}
    with pytest.raises(ValueError, match=r"must hold ca\.crt, got none"):
        take_part(file, "north", silent, **own)
    loose = write(tmp_path / "loose", sites=REMOTE, privacy={"target_delta": 0.5})
    with pytest.raises(ValueError, match="target_delta must be < 1 /"):
        take_part(loose, "north", silent, **own)
