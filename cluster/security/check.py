"""A look at every file that the settings name, before anything is started with them."""

from __future__ import annotations

from cluster.security.gate import Gate
from cluster.security.settings import SecuritySettings
from cluster.security.tls import PeerTls, ServerTls


def check_files(settings: SecuritySettings) -> None:
    """Raises ConfigError, which names the setting, for a file that no router or replica could start with."""
    Gate(settings)
    if settings.tls is not None:
        ServerTls(settings.tls)
    if settings.internal_tls is not None:
        PeerTls(settings.internal_tls)
