"""Certificates for both ends of a connection, checked when they are read and read again when they change."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from cluster.errors import ConfigError
from cluster.security.files import Reloaded, read_file
from cluster.security.settings import InternalTlsSettings, TlsSettings


@dataclass(frozen=True, slots=True)
class Pem:
    """A key with its certificate chain, and the authorities that the other end's certificate must come from, if any.

    All are PEM. The key is left out of the representation, so that no log can hold it.
    """

    key: bytes
    chain: bytes
    authorities: bytes | None

    def __repr__(self) -> str:
        return "Pem(...)"


class ServerTls:
    """What a server shows, and whom it lets in. New connections get what the files hold when they arrive."""

    def __init__(self, settings: TlsSettings | InternalTlsSettings) -> None:
        """Raises ConfigError, which names the setting, for files that no connection could be made with."""
        self._files = _files_of(settings)

    def credentials(self) -> grpc.ServerCredentials:
        """For one server. A client certificate is demanded where the settings name who signs them."""
        given = self._files.current()

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            before, given = given, self._files.current()
            return None if given is before else _configuration(given)

        demanded = given.authorities is not None
        # None stands for no change, which the type stubs do not know.
        return grpc.dynamic_ssl_server_credentials(_configuration(given), changed, demanded)  # type: ignore[arg-type]


class PeerTls:
    """The other end of the same: how routers dial replicas.

    All processes of a cluster show certificates for one name, wherever they run, and that is the name checked.
    """

    def __init__(self, settings: InternalTlsSettings) -> None:
        """Raises ConfigError, which names the setting, for files that no connection could be made with."""
        self._files = _files_of(settings)
        self.options = (("grpc.ssl_target_name_override", settings.server_name),)

    def current(self) -> Pem:
        """What new connections are made with; another object when the files have changed."""
        return self._files.current()


def channel_credentials(pem: Pem) -> grpc.ChannelCredentials:
    """For a channel that shows `pem` and trusts its authorities."""
    return grpc.ssl_channel_credentials(pem.authorities, pem.key, pem.chain)


def read_authorities(setting: str, path: str) -> bytes:
    """The certificates in a file, as they are. Raises ConfigError when there is none or one cannot be read."""
    text = read_file(setting, path)
    _certificates(setting, path, text)
    return text


def read_pair(setting: str, cert_file: str, key_file: str) -> tuple[bytes, bytes]:
    """A certificate chain and its key. Raises ConfigError when they do not belong together, or not now.

    `setting` is the section that holds `cert_file` and `key_file`.
    """
    chain, key = read_file(f"{setting}.cert_file", cert_file), read_file(f"{setting}.key_file", key_file)
    leaf = _certificates(f"{setting}.cert_file", cert_file, chain)[0]
    try:
        private = load_pem_private_key(key, password=None)
    except (ValueError, TypeError):
        # What the library says could hold a piece of the file.
        raise ConfigError(f"{setting}.key_file: {key_file} holds no private key in PEM without a password") from None
    if _spki(private.public_key()) != _spki(leaf.public_key()):
        raise ConfigError(f"{setting}.key_file: {key_file} is not the key of the certificate in {cert_file}")
    now = datetime.now(UTC)
    if now >= leaf.not_valid_after_utc:
        raise ConfigError(f"{setting}.cert_file: {cert_file} expired at {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    if now < leaf.not_valid_before_utc:
        begins = f"{leaf.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        raise ConfigError(f"{setting}.cert_file: {cert_file} is not valid before {begins}")
    return chain, key


def _files_of(settings: TlsSettings | InternalTlsSettings) -> Reloaded[Pem]:
    if isinstance(settings, InternalTlsSettings):
        section, name, authorities = "security.internal_tls", "ca_file", settings.ca_file
    else:
        section, name, authorities = "security.tls", "client_ca_file", settings.client_ca_file or ""

    def load() -> Pem:
        chain, key = read_pair(section, settings.cert_file, settings.key_file)
        return Pem(key, chain, read_authorities(f"{section}.{name}", authorities) if authorities else None)

    named = (settings.cert_file, settings.key_file, authorities)
    return Reloaded(tuple(path for path in named if path), load)


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.chain)], root_certificates=pem.authorities)


def _certificates(setting: str, path: str, text: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(text)
    except ValueError:
        raise ConfigError(f"{setting}: {path} holds no certificate in PEM") from None


def _spki(key: object) -> bytes:
    """A public key by its bytes: the kinds of key that the library knows share no type."""
    return bytes(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))  # type: ignore[attr-defined]
