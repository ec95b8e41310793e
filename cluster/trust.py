"""What a client shows a cluster, and what it trusts of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from cluster.errors import ConfigError
from cluster.security.files import read_file
from cluster.security.tls import read_authorities, read_pair

Metadata = tuple[tuple[str, str], ...]

_CREDENTIAL = re.compile(r"[!-~]{1,16384}")


@dataclass(frozen=True, slots=True)
class ClientTls:
    """TLS to the routers, by PEM files. Without `ca_file` the system's authorities are trusted.

    `cert_file` and `key_file` are for routers that ask for a client certificate. `server_name` is the name that the
    routers' certificate must be for, where it is not the host that the target names.
    """

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """For one channel: the files are read anew. Raises ConfigError for files that cannot be used."""
        roots = read_authorities("tls.ca_file", self.ca_file) if self.ca_file else None
        if (self.cert_file is None) != (self.key_file is None):
            raise ConfigError("tls.cert_file and tls.key_file: one is set without the other")
        if self.cert_file is None or self.key_file is None:
            return grpc.ssl_channel_credentials(roots)
        chain, key = read_pair("tls", self.cert_file, self.key_file)
        return grpc.ssl_channel_credentials(roots, key, chain)

    @property
    def options(self) -> tuple[tuple[str, str], ...]:
        """Of a channel."""
        return (("grpc.ssl_target_name_override", self.server_name),) if self.server_name else ()


@dataclass(frozen=True, slots=True, repr=False)
class Trust:
    """All of it. `api_key` is a key or a token, or what returns the one that is good now."""

    tls: ClientTls | None = None
    api_key: str | Callable[[], str] | None = None
    credentials: grpc.ChannelCredentials | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for what can be seen to be wrong before the first call."""
        if self.tls is not None:
            if self.credentials is not None:
                raise ConfigError("tls and credentials are both given: leave one of them out")
            self.tls.credentials()
        if isinstance(self.api_key, str):
            self.metadata()

    def metadata(self) -> Metadata:
        """What every call brings along. Raises ConfigError for a credential that no call can carry."""
        if self.api_key is None:
            return ()
        credential = self.api_key if isinstance(self.api_key, str) else self.api_key()
        if not _CREDENTIAL.fullmatch(credential):
            raise ConfigError("the API key is empty, too long, or holds spaces or characters outside of ASCII")
        return (("authorization", f"Bearer {credential}"),)

    def channel(self, target: str, options: list[tuple[str, int | str]]) -> grpc.aio.Channel:
        """A channel to one target. Raises ConfigError for files that cannot be used."""
        if self.tls is not None:
            return grpc.aio.secure_channel(target, self.tls.credentials(), [*options, *self.tls.options])
        if self.credentials is not None:
            return grpc.aio.secure_channel(target, self.credentials, options)
        return grpc.aio.insecure_channel(target, options)


def key_in(path: str) -> str:
    """The credential in a file, without the line end. Raises ConfigError when it cannot be read."""
    return read_file("api_key_file", path).decode(errors="replace").strip()
