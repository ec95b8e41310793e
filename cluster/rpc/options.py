"""gRPC settings that a server and its callers must agree on."""

from __future__ import annotations

from collections.abc import Sequence

# grpc itself refuses what is larger than this, with a bare status. Below it the edge refuses what is above
# the configured limit, with a field violation.
HARD_LIMIT_BYTES = 16 * 2**20

_KEEPALIVE_MS = 20_000
_KEEPALIVE_TIMEOUT_MS = 10_000
_MAX_METADATA_BYTES = 32 * 1024

Options = Sequence[tuple[str, int]]


def connection_age(age_s: int, grace_s: int) -> Options:
    """Settings of a server that closes connections `age_s` after they were made; 0 is never.

    What streams by then has `grace_s` to end. Both are as grpc takes them: it spreads ages by 10 % to either side.
    """
    if age_s == 0:
        return []
    return [("grpc.max_connection_age_ms", 1000 * age_s), ("grpc.max_connection_age_grace_ms", 1000 * grace_s)]


def limit_options(max_connections: int, max_streams_per_connection: int) -> Options:
    """How many callers a server takes: a connection too many is closed, a stream too many waits in its client."""
    return [
        ("grpc.max_allowed_incoming_connections", max_connections),
        ("grpc.max_concurrent_streams", max_streams_per_connection),
    ]


def server_options(max_request_bytes: int, share_port: bool = False) -> Options:
    """Settings of an Easel server; `max_request_bytes` is the limit that its EdgeInterceptor enforces.

    With `share_port` other servers may bind the same port, and the kernel spreads new connections over all of them.
    """
    return [
        ("grpc.max_receive_message_length", max(HARD_LIMIT_BYTES, 2 * max_request_bytes)),
        ("grpc.max_send_message_length", -1),
        # With SO_REUSEPORT a second server binds the same port without an error and takes half of the calls. Routers of
        # one cluster answer alike, so that is what they want: a new one serves before the old one leaves, and no caller
        # is refused in between. Any other server must fail when its port is taken.
        ("grpc.so_reuseport", int(share_port)),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        # Without these a server takes its own clients' keepalive for an attack and closes the connection.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
    ]


def channel_options() -> Options:
    """Settings of a channel to an Easel server: a dead peer is noticed in 30 s, even on a silent stream."""
    return [
        # Else all channels of a process to one address share a connection, and thereby one of the routers behind it.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", HARD_LIMIT_BYTES),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.max_pings_without_data", 0),
        # The first call after a router came back must not wait for the usual back-off of a second and more.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]
