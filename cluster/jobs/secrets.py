"""What opens Redis besides its URL: a user, a password in a mounted file, and certificates.

All of it is read when a connection is made, so that what was rotated counts from the next one on. Redis keeps a
connection whose password has changed since.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, SSLConnection
from redis.credentials import CredentialProvider

from cluster.config import StateSettings
from cluster.errors import ConfigError
from cluster.security.files import Reloaded, read_file
from cluster.security.tls import read_authorities, read_pair

_TLS_SCHEMES = ("rediss", "rediss+sentinel")


class PasswordFile(CredentialProvider):
    """The user and what the file holds, without the line end; while it cannot be used, what it held last."""

    def __init__(self, username: str | None, path: str) -> None:
        """Raises ConfigError when the file cannot be read or is empty."""
        self._username = username
        self._password = Reloaded((path,), lambda: _password(path))

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """For one connection."""
        password = self._password.current()
        return (self._username, password) if self._username else (password,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        """The same: a mounted file is read in no time."""
        return self.get_credentials()


def _password(path: str) -> str:
    password = read_file("state.password_file", path).decode(errors="surrogateescape").strip("\r\n")
    if not password:
        raise ConfigError(f"state.password_file: {path} is empty")
    return password


class FreshTlsConnection(SSLConnection):
    """A connection over TLS that reads its certificates whenever it connects; redis-py would do so once."""

    def _connection_arguments(self) -> Mapping[str, Any]:
        self.ssl_context.context = None
        return super()._connection_arguments()


def pool(url: str, **options: Any) -> BlockingConnectionPool:  # noqa: ANN401 - what redis-py takes
    """The pool for a redis://, rediss:// or unix:// URL. Raises ValueError for another."""
    if url.startswith("rediss://"):
        # The class that redis-py derives from the URL goes before one that is given.
        made = BlockingConnectionPool.from_url(url, **options)
        made.connection_class = FreshTlsConnection
        return made
    return BlockingConnectionPool.from_url(url, **options)


def options_of(state: StateSettings) -> dict[str, Any]:
    """What `connect` needs besides the URL. Raises ConfigError, which names the setting, for what cannot be used."""
    return {**_login(state), **_tls(state)}


def _login(state: StateSettings) -> dict[str, Any]:
    if state.password_file is None:
        if state.username is not None:
            raise ConfigError(f"state.username is {state.username!r}: it needs state.password_file")
        return {}
    if "@" in urlsplit(state.url).netloc or "password=" in state.url.replace("sentinel_password=", ""):
        raise ConfigError("state.password_file: state.url holds a user or a password already; leave one of them out")
    return {"credential_provider": PasswordFile(state.username, state.password_file)}


def _tls(state: StateSettings) -> dict[str, Any]:
    given = {"ca_file": state.ca_file, "cert_file": state.cert_file, "key_file": state.key_file}
    first = next((name for name, path in given.items() if path is not None), None)
    if first is None:
        return {}
    if urlsplit(state.url).scheme not in _TLS_SCHEMES:
        raise ConfigError(f"state.{first}: it is for a state.url of rediss:// or rediss+sentinel://")
    if (state.cert_file is None) != (state.key_file is None):
        raise ConfigError("state.cert_file and state.key_file: one is set without the other")
    if state.cert_file is not None and state.key_file is not None:
        read_pair("state", state.cert_file, state.key_file)
    if state.ca_file is not None:
        read_authorities("state.ca_file", state.ca_file)
    named = {"ssl_ca_certs": state.ca_file, "ssl_certfile": state.cert_file, "ssl_keyfile": state.key_file}
    return {name: path for name, path in named.items() if path is not None}
