"""Why a call found no orchestrator: what is at that address, by asking it in plain bytes.

gRPC's own words are of its parts (handshakers, sub-channels, streams) and differ by version.
"""

from __future__ import annotations

import socket
from enum import Enum

from outrider.errors import ConfigError
from outrider.replica import split_address

_TIMEOUT_S = 3.0
# A gRPC server without TLS begins with HTTP/2 settings, an HTTP server answers this in words, and
# one with TLS with an alert or the end of the connection.
_QUESTION = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_SETTINGS = 4
_GRPC_SCHEMES = ("unix:", "dns:", "ipv4:", "ipv6:")

_CERTIFICATES = {
    "hostname": "its certificate is for another host name",
    "expired": "its certificate has expired",
    "verify_failed": "its certificate is not signed by the authority in --tls-ca",
    "verify failed": "its certificate is not signed by the authority in --tls-ca",
    "certificate_required": "it wants a certificate of you: --tls-cert and --tls-key",
}


class Found(Enum):
    NO_HOST = "no such host"
    NOBODY = "connection refused"
    SILENT = "no answer"
    PLAIN = "gRPC without TLS"
    HTTP = "an HTTP server"
    TLS = "TLS, or no gRPC"


def check_endpoint(endpoint: str, flag: str = "--endpoint") -> str:
    """The endpoint itself. Raises ConfigError where it is not host:port, saying what is meant."""
    if endpoint.startswith(_GRPC_SCHEMES):
        return endpoint
    scheme, separator, rest = endpoint.partition("://")
    if separator:
        raise ConfigError(
            f"{flag}: {endpoint!r} is a URL; give host and port alone: {rest.strip('/') or scheme}"
        )
    try:
        split_address(endpoint)
    except ValueError:
        raise ConfigError(
            f"{flag}: {endpoint!r} is not host:port, for instance 127.0.0.1:50051"
        ) from None
    return endpoint


def look(endpoint: str) -> Found:
    """What is there; blocks for a few seconds at most."""
    host, port = split_address(endpoint)
    try:
        with socket.create_connection((host.strip("[]"), port), _TIMEOUT_S) as connection:
            connection.settimeout(_TIMEOUT_S)
            connection.sendall(_QUESTION)
            said = connection.recv(64)
    except socket.gaierror:
        return Found.NO_HOST
    except ConnectionRefusedError:
        return Found.NOBODY
    except ConnectionError:  # reset: it understood nothing
        return Found.TLS
    except OSError:  # time-outs and unreachable networks
        return Found.SILENT
    if said.startswith(b"HTTP/"):
        return Found.HTTP
    return Found.PLAIN if len(said) > 3 and said[3] == _SETTINGS else Found.TLS


def unconnected(endpoint: str, said: str, *, has_tls: bool) -> str | None:
    """What is wrong and what to do; None: gRPC is there as it should be, and went away meanwhile.

    `said`: gRPC's words for a failed connection. Blocks for a few seconds at most.
    """
    if endpoint.startswith(_GRPC_SCHEMES):
        return f"nothing answers at {endpoint}"
    found = look(endpoint)
    match found:
        case Found.NO_HOST:
            host = split_address(endpoint)[0]
            return f"nothing answers at {endpoint}: no host is called {host!r}"
        case Found.NOBODY:
            return f"nothing answers at {endpoint}; start it with: outrider up"
        case Found.SILENT:
            return f"nothing answers at {endpoint}: a wrong host, or a firewall between?"
        case Found.HTTP:
            return f"{endpoint} is an HTTP server (metrics?): give the orchestrator's gRPC port"
        case Found.PLAIN:
            return f"{endpoint} does not use TLS: leave out --tls-ca" if has_tls else None
    if not has_tls:
        return f"{endpoint} does not answer without TLS: give --tls-ca"
    words = said.lower()
    why = next((why for words_of, why in _CERTIFICATES.items() if words_of in words), None)
    return f"no TLS with {endpoint}: {why or 'the certificates do not fit (docs/security.md)'}"
