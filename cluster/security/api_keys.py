"""API keys: how they are made, and the file that knows them by their digests.

A key is easel_<id>_<secret> with 256 random bits, so one SHA-256 is enough: there is nothing to guess. A line of the
file is

    <id> <tenant> sha256:<digest of the whole key, hex> [admin] [until=YYYY-MM-DD]

and what follows a # is a comment. The id is no secret: it finds the line, and names the key for people.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime

from cluster.core import Violation
from cluster.errors import ConfigError, InvalidRequest, Unauthenticated
from cluster.security.files import Reloaded, read_file
from cluster.security.identity import TENANT_RULE, Identity, is_tenant

PREFIX = "easel_"
SETTING = "security.api_keys_file"
_KEY = re.compile(r"easel_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")
_ID = re.compile(r"[0-9a-f]{12}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_UNKNOWN = "the API key is not known"


@dataclass(frozen=True, slots=True)
class KnownKey:
    """A line of the file. `until` is the last day, in UTC, on which the key is good."""

    digest: bytes
    identity: Identity
    until: date | None


def new_key(tenant: str, *, admin: bool = False, until: date | None = None) -> tuple[str, str]:
    """A new key, and its line for the file. Raises InvalidRequest for what no tenant can be called."""
    if not is_tenant(tenant):
        raise InvalidRequest([Violation("tenant", f"is {tenant!r}; {TENANT_RULE}")])
    key_id = secrets.token_hex(6)
    key = f"{PREFIX}{key_id}_{secrets.token_urlsafe(32)}"
    words = [key_id, tenant, f"sha256:{_digest(key).hex()}"]
    words += ["admin"] * admin + ([] if until is None else [f"until={until.isoformat()}"])
    return key, " ".join(words)


class ApiKeys:
    """The keys of one file, which may change at any time."""

    def __init__(self, path: str) -> None:
        """Raises ConfigError for a file that cannot be read, or a line in it that is none."""
        self._keys = Reloaded((path,), lambda: parse_keys(read_file(SETTING, path), path))

    def identify(self, key: str) -> Identity:
        """Whose key it is. Raises Unauthenticated, whose message does not hold it."""
        match = _KEY.fullmatch(key)
        known = self._keys.current().get(match[1]) if match else None
        # Compared in constant time also when there is nothing to compare with.
        same = hmac.compare_digest(_digest(key), known.digest if known else bytes(32))
        if known is None or not same:
            raise Unauthenticated(_UNKNOWN)
        if known.until is not None and datetime.now(UTC).date() > known.until:
            raise Unauthenticated(f"the API key was good until {known.until.isoformat()}")
        return known.identity


def parse_keys(text: bytes, path: str) -> Mapping[str, KnownKey]:
    """The keys of a file by their ids. Raises ConfigError, which names the line but does not show it."""
    found: dict[str, KnownKey] = {}
    for number, line in enumerate(text.decode(errors="replace").splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        key = _known(words)
        if key is None or words[0] in found:
            wrong = "repeats an id" if words[0] in found else "is no line that `easel keys new` prints"
            raise ConfigError(f"{SETTING}: {path}: line {number} {wrong}")
        found[words[0]] = key
    return found


def _known(words: list[str]) -> KnownKey | None:
    key_id, tenant, digest = [*words, "", ""][:3]
    match = _DIGEST.fullmatch(digest)
    marks, until = words[3:], None
    if marks and marks[-1].startswith("until="):
        try:
            until = date.fromisoformat(marks.pop().removeprefix("until="))
        except ValueError:
            return None
    if not _ID.fullmatch(key_id) or not is_tenant(tenant) or match is None or marks not in ([], ["admin"]):
        return None
    return KnownKey(bytes.fromhex(match[1]), Identity(tenant, admin=bool(marks)), until)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="replace")).digest()
