"""JSON Web Tokens of an issuer that the cluster trusts, checked with the public keys in a mounted file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import jwt
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from cluster.errors import ConfigError, Unauthenticated
from cluster.security.files import Reloaded, read_file
from cluster.security.identity import TENANT_RULE, Identity, is_tenant
from cluster.security.settings import JwtSettings

SETTING = "security.jwt.key_file"
# Public keys by their ids; one without an id stands under "".
Keys = Mapping[str, Any]

# What callers are told. The library's own words can hold pieces of a token.
_REASONS: tuple[tuple[type[jwt.PyJWTError], str], ...] = (
    (jwt.ExpiredSignatureError, "the token has expired"),
    (jwt.ImmatureSignatureError, "the token is not valid yet"),
    (jwt.InvalidAudienceError, "the token is for another audience"),
    (jwt.InvalidIssuerError, "the token is of another issuer"),
    (jwt.InvalidAlgorithmError, "the token is signed by an algorithm that is not allowed"),
    (jwt.InvalidSignatureError, "the token's signature is wrong"),
)


class Tokens:
    """Checks tokens of one issuer. The file of keys may change at any time."""

    def __init__(self, settings: JwtSettings) -> None:
        """Raises ConfigError for a file that cannot be read or holds no public key."""
        self._settings = settings
        path = settings.key_file
        self._keys = Reloaded((path,), lambda: parse_public_keys(read_file(SETTING, path), path))

    def identify(self, token: str) -> Identity:
        """Whose token it is. Raises Unauthenticated, whose message holds nothing of it."""
        settings = self._settings
        try:
            claims = jwt.decode(
                token,
                self._key_for(token),
                algorithms=list(settings.algorithms),
                audience=settings.audience,
                issuer=settings.issuer,
                leeway=settings.leeway_s,
                options={"require": ["exp", "iss", "aud", settings.tenant_claim]},
            )
        except jwt.MissingRequiredClaimError as error:
            raise Unauthenticated(f"the token lacks the claim {error.claim!r}") from None
        except (jwt.PyJWTError, ValueError, TypeError) as error:
            raise Unauthenticated(_reason(error)) from None
        tenant = claims[settings.tenant_claim]
        if not isinstance(tenant, str) or not is_tenant(tenant):
            raise Unauthenticated(f"the token's claim {settings.tenant_claim!r} names no tenant: {TENANT_RULE}")
        return Identity(tenant, admin=claims.get(settings.admin_claim) is True)

    def _key_for(self, token: str) -> Any:  # noqa: ANN401 - each kind of key has a type of its own
        keys = self._keys.current()
        named = jwt.get_unverified_header(token).get("kid")
        if len(keys) == 1 and (named is None or "" in keys):
            return next(iter(keys.values()))
        if not isinstance(named, str) or named not in keys:
            raise Unauthenticated("the token is signed by a key that is not known")
        return keys[named]


def parse_public_keys(text: bytes, path: str) -> Keys:
    """The public keys in a PEM or in a JSON Web Key Set. Raises ConfigError when there is none."""
    made: Callable[[bytes], Keys] = _from_pem if text.lstrip().startswith(b"-----") else _from_set
    try:
        keys = made(text)
    except (jwt.PyJWTError, ValueError, TypeError, KeyError, AttributeError):
        keys = {}
    if not keys:
        raise ConfigError(f"{SETTING}: {path} holds no public key: neither a PEM nor a JSON Web Key Set")
    return keys


def _from_pem(text: bytes) -> Keys:
    return {"": load_pem_public_key(text)}


def _from_set(text: bytes) -> Keys:
    rows = [row for row in json.loads(text)["keys"] if row.get("use", "sig") == "sig" and row.get("kty") != "oct"]
    return {str(row.get("kid", "")): jwt.PyJWK.from_dict(row) for row in rows}


def _reason(error: Exception) -> str:
    return next((text for kind, text in _REASONS if isinstance(error, kind)), "the token cannot be read")
