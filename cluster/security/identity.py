"""Who calls: a tenant, and whether it is one of those who run the cluster."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cluster.errors import PermissionDenied

TENANT_RULE = "allowed are 1 to 64 letters, digits, '.', '_' and '-'"
_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")


def is_tenant(name: str) -> bool:
    """True for a name that a credential can have for its tenant."""
    return _TENANT.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Identity:
    """What a credential stands for. One that is not `scoped` is nobody's: the cluster asks for no credentials.

    A scoped caller's jobs are stored under "<tenant>/<job id>". No job id that a request names can hold a slash, so
    every tenant has ids of its own, and none can spell another's. Callers never see the prefix.
    """

    tenant: str
    admin: bool
    scoped: bool = True

    @property
    def index(self) -> str:
        """The tenant whose jobs this caller lists; "" for all that belong to none."""
        return self.tenant if self.scoped else ""

    def tenant_of(self, named: str) -> str:
        """The tenant of a request that names one or none. Raises PermissionDenied for another than the credential's."""
        if not self.scoped:
            return named
        if named not in ("", self.tenant):
            shown = named if len(named) <= 40 else named[:40] + "..."
            allowed = f"leave it empty, or send {self.tenant!r}"
            raise PermissionDenied(f"tenant: {shown!r} is not the tenant of the credential; {allowed}")
        return self.tenant

    def stored(self, job_id: str) -> str:
        """The id under which a job of this caller is stored."""
        return f"{self.tenant}/{job_id}" if self.scoped else job_id

    def shown(self, stored_id: str) -> str:
        """A stored id as this caller knows it."""
        return stored_id.removeprefix(f"{self.tenant}/") if self.scoped else stored_id

    def retold(self, text: str) -> str:
        """A message with the ids of this caller's jobs as the caller knows them."""
        if not self.scoped:
            return text
        return re.sub(rf"(?<![\w./:-]){re.escape(self.tenant)}/(?=[\w.:-])", "", text)

    def require_admin(self, what: str) -> None:
        """Raises PermissionDenied unless the credential is one of those who run the cluster."""
        if not self.admin:
            raise PermissionDenied(f"{what} needs a credential that is marked admin")


# Of a cluster without credentials: everybody may do everything, and says by the request whom a job is for.
OPEN = Identity(tenant="", admin=True, scoped=False)
