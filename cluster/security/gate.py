"""From what a call brings along to who calls."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.errors import Unauthenticated
from cluster.security.api_keys import PREFIX, ApiKeys
from cluster.security.identity import OPEN, Identity
from cluster.security.settings import SecuritySettings
from cluster.security.tokens import Tokens

_SEND = "send `authorization: Bearer CREDENTIAL` in the call's metadata"


class Gate:
    """Knows every credential that the settings allow. Without any, everybody is let in."""

    def __init__(self, settings: SecuritySettings) -> None:
        """Raises ConfigError for files that cannot be used."""
        self._keys = ApiKeys(settings.api_keys_file) if settings.api_keys_file else None
        self._tokens = Tokens(settings.jwt) if settings.jwt else None

    @property
    def is_open(self) -> bool:
        """True where no credential is asked for."""
        return self._keys is None and self._tokens is None

    def identify(self, authorization: Sequence[str]) -> Identity:
        """Who calls with these values of the `authorization` metadata. Raises Unauthenticated."""
        if self.is_open:
            return OPEN
        if len(authorization) != 1:
            found = "no credential" if not authorization else f"{len(authorization)} credentials"
            raise Unauthenticated(f"{found}: {_SEND}")
        scheme, _, credential = authorization[0].partition(" ")
        credential = credential.strip()
        if scheme.lower() != "bearer" or not credential:
            raise Unauthenticated(f"the credential is not of scheme Bearer: {_SEND}")
        if credential.startswith(PREFIX) and self._keys is not None:
            return self._keys.identify(credential)
        if self._tokens is None:
            raise Unauthenticated("the API key is not known")
        return self._tokens.identify(credential)
