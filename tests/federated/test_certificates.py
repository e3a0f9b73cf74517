"""Certificates and keys of a trial."""

import datetime
import stat

import pytest

pytest.importorskip("flwr")

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from typer.testing import CliRunner

from dpfast.cli.app import app
from dpfast.federated.certificates import make_certificates, site_keys


def test_everybody_gets_their_own_and_nobody_else_s(tmp_path):
    make_certificates(tmp_path / "c", ["north", "a/b"], ["localhost", "10.0.0.7"])
    server, north = tmp_path / "c/server", tmp_path / "c/north"
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["a%2Fb", "north", "server"]
    assert sorted(p.name for p in north.iterdir()) == ["ca.crt", "site.key"]
    assert sorted(p.name for p in server.iterdir()) == [
        "ca.crt",
        "server.key",
        "server.pem",
        "sites",
    ]
    for secret in (server / "server.key", north / "site.key"):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    keys = site_keys(server)
    assert set(keys) == {"north", "a/b"}
    private = load_ssh_private_key((north / "site.key").read_bytes(), None)
    public = load_ssh_public_key(keys["north"].read_bytes())
    assert private.public_key().public_numbers() == public.public_numbers()


def test_server_s_certificate_is_the_authority_s_for_these_hosts(tmp_path):
    make_certificates(tmp_path / "c", ["north"], ["localhost", "10.0.0.7"], days=3)
    authority, server = (
        x509.load_pem_x509_certificate((tmp_path / "c/server" / name).read_bytes())
        for name in ("ca.crt", "server.pem")
    )
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(each) for each in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    lasting = server.not_valid_after_utc - server.not_valid_before_utc
    assert lasting == datetime.timedelta(days=3)


@pytest.mark.parametrize(
    ("sites", "hosts", "message"),
    [
        ([], ["localhost"], "must not be empty"),
        (["a"], [], "must not be empty"),
        (["a", "a"], ["localhost"], "different names"),
        (["server"], ["localhost"], "none of them 'server'"),
    ],
)
def test_bad_arguments_leave_nothing(tmp_path, sites, hosts, message):
    with pytest.raises(ValueError, match=message):
        make_certificates(tmp_path / "c", sites, hosts)
    assert not (tmp_path / "c").exists()


def test_command_does_not_touch_a_folder_that_holds_something(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = CliRunner().invoke(app, ["certificates", str(tmp_path), "--site", "a"])
    assert done.exit_code == 2
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    done = CliRunner().invoke(app, ["certificates", str(tmp_path / "c"), "--site", "a"])
    assert done.exit_code == 0
    assert (tmp_path / "c/a/site.key").is_file()
