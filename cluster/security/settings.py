"""The settings of section `security`. All of it is off unless it is set; docs/security.md tells how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from cluster.security.identity import TENANT_RULE, is_tenant

FileName = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
# Only signatures that a public key checks: with a shared secret every router could make tokens.
Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TlsSettings(_Frozen):
    """The public port over TLS: PEM files, read again when they change. `client_ca_file`: callers need certificates."""

    cert_file: FileName
    key_file: FileName
    client_ca_file: FileName | None = None


class InternalTlsSettings(_Frozen):
    """Mutual TLS from routers to replicas. Each shows `cert_file`, signed by `ca_file` and made for `server_name`."""

    cert_file: FileName
    key_file: FileName
    ca_file: FileName
    server_name: Annotated[str, Field(min_length=1, max_length=253)] = "easel-internal"


class JwtSettings(_Frozen):
    """Tokens of an issuer. `key_file` holds its public keys, as a PEM or a JSON Web Key Set; every token must expire.

    `tenant_claim` names the claim that holds the tenant, `admin_claim` the one that is true for those who run the
    cluster.
    """

    key_file: FileName
    issuer: Annotated[str, Field(min_length=1)]
    audience: Annotated[str, Field(min_length=1)]
    algorithms: Annotated[tuple[Algorithm, ...], Field(min_length=1)] = ("RS256", "ES256")
    tenant_claim: Annotated[str, Field(min_length=1)] = "tenant"
    admin_claim: Annotated[str, Field(min_length=1)] = "easel_admin"
    leeway_s: Annotated[float, Field(ge=0, le=300)] = 10.0


class QuotaSettings(_Frozen):
    """What one tenant may have at once. None: no limit; of a tenant's own quota, that of `default`.

    `burst` is how many requests may come together within `requests_per_s`; None: those of one second, at least one.
    `streams` counts open calls at one router, and needs credentials: without them nobody knows who calls.
    """

    running_canvases: Count | None = None
    queued_jobs: Count | None = None
    requests_per_s: Annotated[float, Field(gt=0, le=1_000_000)] | None = None
    burst: Count | None = None
    streams: Count | None = None

    def over(self, default: QuotaSettings) -> QuotaSettings:
        """These limits, and those of `default` where this has none."""
        own = {name: value for name, value in self.model_dump().items() if value is not None}
        return default.model_copy(update=own)


class QuotasSettings(_Frozen):
    """`default` is for every tenant by itself; `tenants` are those that have another."""

    default: QuotaSettings = QuotaSettings()
    tenants: Mapping[str, QuotaSettings] = {}

    def of(self, tenant: str) -> QuotaSettings:
        """The limits of one tenant."""
        own = self.tenants.get(tenant)
        return self.default if own is None else own.over(self.default)


class SecuritySettings(_Frozen):
    """With `api_keys_file` or `jwt` every call but a health check needs a credential, and works in its tenant."""

    tls: TlsSettings | None = None
    internal_tls: InternalTlsSettings | None = None
    api_keys_file: FileName | None = None
    jwt: JwtSettings | None = None
    quotas: QuotasSettings = QuotasSettings()

    @field_validator("quotas")
    @classmethod
    def _names_of_tenants(cls, quotas: QuotasSettings) -> QuotasSettings:
        for tenant in quotas.tenants:
            if not is_tenant(tenant):
                raise ValueError(f"{tenant!r} names no tenant: {TENANT_RULE}")
        return quotas
