"""Options of gRPC channels, and maximum sizes of messages. Imports nothing: clients use it too."""

from __future__ import annotations

# Received by servers. A request at every limit of docs/reference/limits.md has 18.8 MiB, of which
# 15.3 are 4,000,000 characters of four bytes. To receive and reject a text of 64 MiB takes 150 to
# 190 ms of the event loop's thread, one of 19 MiB 35 to 41, one over the limit 12 (1 KiB: 6).
MAX_REQUEST_BYTES = 20 << 20
MAX_MESSAGE_BYTES = 64 << 20
_MESSAGE_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *_MESSAGE_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 200),
    # Also gRPC's minimum time for a connection attempt, handshake included.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
# Between the tiers: streams with heartbeats (outrider.runtime.heartbeat) and calls with deadlines.
TIER_CHANNEL_OPTIONS = _CHANNEL_OPTIONS
# For clients: a ping every five minutes, which servers and proxies accept by default.
CLIENT_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *_CHANNEL_OPTIONS,
    ("grpc.keepalive_time_ms", 305_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
)
