"""Certificates and keys: of a server for TLS, and one for each site to be known by."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote, unquote

from dpfast.segmentation._extras import needs_extra

with needs_extra("dpfast certificates", extra="federated"):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

__all__ = ["CA", "SERVER_CERTIFICATE", "SERVER_KEY", "SITE_KEY", "make_certificates", "site_keys"]

CA, SERVER_CERTIFICATE, SERVER_KEY = "ca.crt", "server.pem", "server.key"
SITE_KEY = "site.key"
_PUBLIC = ".pub"


def make_certificates(
    folder: Path, sites: Sequence[str], hosts: Sequence[str], *, days: int = 365
) -> None:
    """Make what a trial needs: an authority, the server's certificate, a key for each site.

    folder/server is for the server alone: its certificate and key, and the sites' public keys.
    folder/SITE is for that site alone: its private key, and the authority's certificate. The
    authority's own key is thrown away, so that nobody can make another certificate with it. A real
    federation has an authority, and each site makes its own key.

    Args:
      folder: new or empty.
      sites: names.
      hosts: names and IP addresses by which sites reach the server.
      days: after which the certificates end.

    Raises:
      ValueError: the folder holds something, or a bad argument.
    """
    function = "make_certificates"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{function}: folder must be new or empty, got {folder}")
    if not sites or not hosts or days < 1:
        raise ValueError(f"{function}: sites and hosts must not be empty, and days >= 1")
    if len(set(sites)) < len(sites) or "server" in sites:
        raise ValueError(f"{function}: sites must be different names, none of them 'server'")
    begin = datetime.datetime.now(datetime.timezone.utc)
    end = begin + datetime.timedelta(days=days)
    authority_key, authority = _authority(begin, end)
    certificate_key = ec.generate_private_key(ec.SECP384R1())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_name("dpfast server"))
        .issuer_name(authority.subject)
        .public_key(certificate_key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectAlternativeName([_host(each) for each in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    pem = serialization.Encoding.PEM
    server = folder / "server"
    (server / "sites").mkdir(parents=True)
    (server / CA).write_bytes(authority.public_bytes(pem))
    (server / SERVER_CERTIFICATE).write_bytes(certificate.public_bytes(pem))
    _write_secret(server / SERVER_KEY, _private(certificate_key, openssh=False))
    for name in sites:
        key = ec.generate_private_key(ec.SECP384R1())
        own = folder / _file_name(name)
        own.mkdir()
        (own / CA).write_bytes(authority.public_bytes(pem))
        _write_secret(own / SITE_KEY, _private(key, openssh=True))
        public = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        (server / "sites" / f"{_file_name(name)}{_PUBLIC}").write_bytes(public + b"\n")


def site_keys(folder: Path) -> dict[str, Path]:
    """Public keys by site, of a server's folder.

    Raises:
      ValueError: there are none.
    """
    found = {
        unquote(file.name.removesuffix(_PUBLIC)): file
        for file in sorted((folder / "sites").glob(f"*{_PUBLIC}"))
    }
    if not found:
        raise ValueError(f"site_keys: {folder / 'sites'} must hold SITE{_PUBLIC}, got none")
    return found


def _authority(
    begin: datetime.datetime, end: datetime.datetime
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name("dpfast authority")
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=False,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=True,
                crl_sign=True,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .sign(key, hashes.SHA384())
    )
    return key, certificate


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private(key: ec.EllipticCurvePrivateKey, *, openssh: bool) -> bytes:
    kinds = serialization.PrivateFormat
    return key.private_bytes(
        serialization.Encoding.PEM,
        kinds.OpenSSH if openssh else kinds.PKCS8,
        serialization.NoEncryption(),
    )


def _write_secret(path: Path, content: bytes) -> None:
    """For its owner's eyes from the first moment."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def _file_name(site: str) -> str:
    return quote(site, safe=" ").replace(".", "%2E")
