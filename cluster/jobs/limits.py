"""The bounds that every script of a store works with."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from cluster.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Limits:
    """Raises ConfigError for a value below its least.

    `max_attempts` runs in a row may be lost without a new canvas; the last of them fails the job. A job preempted
    `max_preemptions` times is no victim any more. A waiting job gains a level every `aging_ms`.
    The images of all jobs that have not ended take at most `image_limit_bytes`.
    """

    queue_limit: int = 1000
    retry_after_ms: int = 1000
    lease_ms: int = 5000
    retention_s: int = 3600
    max_attempts: int = 3
    max_preemptions: int = 3
    aging_ms: int = 60_000
    image_limit_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 0 if name == "max_preemptions" else 1
            if value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Of all limits; cluster.config.StateSettings has each under the same name."""
        return tuple(field.name for field in fields(cls))

    @property
    def policy(self) -> str:
        """ARGV[1] of the scripts, as lua/lib/policy.lua reads it."""
        return f"{self.retention_s} {self.max_attempts} {self.max_preemptions} {self.aging_ms} {self.lease_ms}"
