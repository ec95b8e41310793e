"""Certificates for tests: an authority, and what it signs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, as PEM."""

    chain: bytes
    key: bytes

    def write(self, folder: Path, name: str = "tls") -> dict[str, str]:
        """Into two files of a folder; returns them as the settings name them."""
        folder.mkdir(parents=True, exist_ok=True)
        files = {"cert_file": folder / f"{name}.crt", "key_file": folder / f"{name}.key"}
        for path, text in zip(files.values(), (self.chain, self.key), strict=True):
            path.write_bytes(text)
        return {setting: str(path) for setting, path in files.items()}


class Authority:
    """Signs certificates for the names that a test needs."""

    def __init__(self, name: str = "authority") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named(name)
        basic = x509.BasicConstraints(ca=True, path_length=None)
        builder = _builder(self._name, self._name, self._key.public_key(), 0, 30)
        self._certificate = builder.add_extension(basic, critical=True).sign(self._key, hashes.SHA256())

    @property
    def pem(self) -> bytes:
        return self._certificate.public_bytes(Encoding.PEM)

    def write(self, path: Path) -> str:
        path.write_bytes(self.pem)
        return str(path)

    def issue(self, name: str, *names: str, from_days: float = -1, to_days: float = 1) -> Issued:
        """A certificate of `name` for hosts `names`, this machine if none are given."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(_named(name), self._name, key.public_key(), from_days, to_days)
        hosts: list[x509.GeneralName] = [x509.DNSName(host) for host in names or ("localhost",)]
        if not names:
            hosts.append(x509.IPAddress(ip_address("127.0.0.1")))
        builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        signed = builder.sign(self._key, hashes.SHA256())
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return Issued(signed.public_bytes(Encoding.PEM), private)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, from_days: float, to_days: float
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=from_days, minutes=-1))
        .not_valid_after(now + timedelta(days=to_days))
    )
