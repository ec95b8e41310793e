"""Quotas as the scripts read them: a row for each tenant that has one, and one under "" for all others."""

from __future__ import annotations

import math

from cluster.security.settings import QuotaSettings, QuotasSettings


def quota_rows(quotas: QuotasSettings) -> dict[str, str]:
    """Tenant -> "<running canvases> <queued jobs> <requests a second> <burst>", with "-" for no limit.

    Where nobody has a limit there is no row, and a job costs Redis what it costs without quotas.
    """
    rows = {"": _row(quotas.default), **{tenant: _row(quotas.of(tenant)) for tenant in quotas.tenants}}
    return {} if set(rows.values()) == {_row(QuotaSettings())} else rows


def _row(quota: QuotaSettings) -> str:
    burst = quota.burst
    if burst is None and quota.requests_per_s is not None:
        burst = max(1, math.ceil(quota.requests_per_s))
    limits = (quota.running_canvases, quota.queued_jobs, quota.requests_per_s, burst)
    return " ".join("-" if limit is None else f"{limit:.14g}" for limit in limits)
