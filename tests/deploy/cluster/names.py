"""Minimal DNS server over UDP: A records of a table (RFC 1035)."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import cast

PORT = 53
_TYPE_A = 1
_NXDOMAIN = 3
_TTL_S = 1


class NameServer(asyncio.DatagramProtocol):
    """`records` may be replaced at any time. Names are fully qualified, without the final dot."""

    def __init__(self) -> None:
        self.records: Mapping[str, Sequence[str]] = {}
        self._transport: asyncio.DatagramTransport | None = None

    async def start(self, host: str) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_datagram_endpoint(lambda: self, local_addr=(host, PORT))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Python 3.11's transport is not an instance of DatagramTransport.
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        assert self._transport is not None
        self._transport.sendto(self._answer(data), addr)

    def _answer(self, query: bytes) -> bytes:
        name, end = _question(query)
        (kind,) = struct.unpack_from(">H", query, end)
        found = self.records.get(name)
        addresses = found if found and kind == _TYPE_A else ()
        # Authoritative answer; NXDOMAIN only if the name has no records of any type.
        flags = 0x8580 | (_NXDOMAIN if found is None else 0)
        head = query[:2] + struct.pack(">HHHHH", flags, 1, len(addresses), 0, 0)
        # Each record refers to the name in the question, at byte 12.
        answers = (
            struct.pack(">HHHIH", 0xC00C, _TYPE_A, 1, _TTL_S, 4) + socket.inet_aton(address)
            for address in addresses
        )
        return head + query[12 : end + 4] + b"".join(answers)


def _question(query: bytes) -> tuple[str, int]:
    """The requested name in lower case, and the offset of its type."""
    labels = []
    at = 12
    while length := query[at]:
        labels.append(query[at + 1 : at + 1 + length].decode().lower())
        at += 1 + length
    return ".".join(labels), at + 1
