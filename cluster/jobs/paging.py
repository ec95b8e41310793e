"""Page tokens of the job list: opaque to callers, the arrival sequence that a page ended with to us."""

from __future__ import annotations

import base64
import binascii
import re

from cluster.core import Violation
from cluster.errors import InvalidRequest

MAX_PAGE_SIZE = 1000
_SEQUENCE = re.compile(rb"v1:([0-9]{1,16})")


def token_of(sequence: str) -> str:
    """The token of a page that ended with `sequence`; empty for the last page, whose sequence is empty."""
    return base64.urlsafe_b64encode(b"v1:" + sequence.encode()).decode() if sequence else ""


def cursor_of(page_token: str) -> str:
    """Where a page starts, as lua/list.lua reads it. Raises InvalidRequest for a token that is not ours."""
    if not page_token:
        return "+inf"
    try:
        match = _SEQUENCE.fullmatch(base64.urlsafe_b64decode(page_token.encode("ascii")))
    except (binascii.Error, ValueError):
        match = None
    if match is None:
        shown = page_token[:40]
        raise InvalidRequest([Violation("page_token", f"is {shown!r}; give the token of the page before, or none")])
    return f"({match[1].decode()}"


def checked_page_size(page_size: int) -> int:
    """`page_size` when it is allowed; InvalidRequest otherwise."""
    if 1 <= page_size <= MAX_PAGE_SIZE:
        return page_size
    raise InvalidRequest([Violation("page_size", f"is {page_size}; 1 to {MAX_PAGE_SIZE} are allowed")])
