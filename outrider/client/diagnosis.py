"""Diagnosis of a failed connection: probes the address and reports what is wrong there.

gRPC's own error texts name its internal parts (handshakers, subchannels, streams) and differ by
version. To gRPC, a server that requires a client certificate looks like one that hangs up. So the
probe connects itself, with TLS if the client uses TLS. It blocks for a few seconds at most.
"""

from __future__ import annotations

import socket
import ssl
from enum import Enum
from typing import TYPE_CHECKING

from outrider.replica import split_address
from outrider.settings.addresses import GRPC_SCHEMES

if TYPE_CHECKING:
    from outrider.client.channel import Access

_TIMEOUT_S = 3.0
# HTTP/2 preface and empty settings. A gRPC server without TLS replies with HTTP/2 settings, an HTTP
# server with an HTTP/1 response, and a TLS server with an alert or the end of the connection.
_PROBE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_SETTINGS = 4
_TLS_ALERT = b"\x15"

# OpenSSL's verification codes.
_NOT_YET_VALID, _EXPIRED, _HOST_MISMATCH, _ADDRESS_MISMATCH = 9, 10, 62, 64
_CERTIFICATE = {
    _NOT_YET_VALID: "its certificate is not valid yet: check the clocks",
    _EXPIRED: "its certificate has expired",
    _HOST_MISMATCH: "its certificate is for another host name",
    _ADDRESS_MISMATCH: "its certificate is for another host name",
}
_OTHER_AUTHORITY = "its certificate is not signed by the authority in --tls-ca"
_REQUIRES_CERTIFICATE = "it requires a client certificate: give --tls-cert and --tls-key"
_REFUSES_CERTIFICATE = "it refuses the certificate in --tls-cert"
_NOT_GRPC = "it is not a gRPC server (an HTTPS server?)"
# TLS alerts about the client's certificate.
_CERTIFICATE_ALERTS = (
    "UNKNOWN_CA",
    "BAD_CERTIFICATE",
    "CERTIFICATE_UNKNOWN",
    "CERTIFICATE_EXPIRED",
)


class Diagnosis(Enum):
    """What a probe found at an address."""

    NO_HOST = "no such host"
    REFUSED = "connection refused"
    TIMED_OUT = "no response"
    PLAIN = "gRPC without TLS"
    HTTP = "an HTTP server"
    TLS = "TLS"
    HANGS_UP = "closes every connection"


def probe(endpoint: str) -> Diagnosis:
    """Probes the address without TLS. Blocks."""
    try:
        with _connected(endpoint) as connection:
            response = _response(connection)
    except OSError as error:
        return _unreachable(error)
    if response.startswith(b"HTTP/"):
        return Diagnosis.HTTP
    if _is_grpc(response):
        return Diagnosis.PLAIN
    has_tls = response.startswith(_TLS_ALERT) or _offers_tls(endpoint)
    return Diagnosis.TLS if has_tls else Diagnosis.HANGS_UP


def connection_fault(endpoint: str, access: Access | None = None) -> str | None:
    """What is wrong at the address and what to do; None: a gRPC server responds there. Blocks.

    `access`: the client's TLS settings; without `tls_ca` the client uses no TLS.
    """
    has_tls = access is not None and access.tls_ca is not None
    match probe(endpoint):
        case Diagnosis.NO_HOST:
            host = split_address(_host_port(endpoint))[0]
            return f"nothing answers at {endpoint}: no host is called {host!r}"
        case Diagnosis.REFUSED:
            return f"nothing answers at {endpoint}; start it with: outrider up"
        case Diagnosis.TIMED_OUT:
            return f"nothing answers at {endpoint}: a wrong host, or a firewall in between?"
        case Diagnosis.HTTP:
            return f"{endpoint} is an HTTP server (metrics?): give the orchestrator's gRPC port"
        case Diagnosis.HANGS_UP:
            return (
                f"{endpoint} closes connections without an answer: not a gRPC server, or a proxy "
                "with no server behind it"
            )
        case Diagnosis.PLAIN:
            return f"{endpoint} does not use TLS: leave out --tls-ca" if has_tls else None
    if access is None or not has_tls:
        return f"{endpoint} does not answer without TLS: give --tls-ca"
    why = _handshake_fault(endpoint, access)
    return None if why is None else f"no TLS with {endpoint}: {why}"


def _offers_tls(endpoint: str) -> bool:
    """Whether the server takes part in a TLS handshake; its certificate is not checked."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with _connected(endpoint) as plain, context.wrap_socket(plain):
            return True
    except ssl.SSLError as error:
        reason = error.reason or ""
        return "ALERT" in reason or "HANDSHAKE_FAILURE" in reason
    except OSError:
        return False


def _handshake_fault(endpoint: str, access: Access) -> str | None:
    """What goes wrong in the client's TLS handshake or directly after it; None: nothing.

    In TLS 1.3 a server checks the client's certificate after the client has finished the handshake.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as gRPC does
    context.set_alpn_protocols(["h2"])
    try:
        context.load_verify_locations(access.tls_ca)
        if access.tls_cert is not None:
            context.load_cert_chain(access.tls_cert, access.tls_key)
        host = None if endpoint.startswith("unix:") else split_address(_host_port(endpoint))[0]
        with (
            _connected(endpoint) as plain,
            context.wrap_socket(plain, server_hostname=(host or "localhost").strip("[]")) as secure,
        ):
            if secure.selected_alpn_protocol() != "h2":
                return _NOT_GRPC
            response = _response(secure)
    except ssl.SSLCertVerificationError as error:
        return _CERTIFICATE.get(error.verify_code, _OTHER_AUTHORITY)
    except ssl.SSLError as error:
        return _alert(error.reason or str(error), has_certificate=access.tls_cert is not None)
    except OSError:
        return "it closes the connection before TLS is set up"
    if not response:  # gRPC's servers send no alert
        about = _REFUSES_CERTIFICATE if access.tls_cert is not None else _REQUIRES_CERTIFICATE
        return f"it closes the connection once TLS is set up; probably {about}"
    return None if _is_grpc(response) else _NOT_GRPC


def _response(connection: socket.socket) -> bytes:
    """First bytes of the response to the probe; empty if the server closes the connection."""
    try:
        connection.sendall(_PROBE)
        return connection.recv(64)
    except ConnectionError:
        return b""


def _alert(reason: str, *, has_certificate: bool) -> str:
    if "CERTIFICATE_REQUIRED" in reason:
        return _REQUIRES_CERTIFICATE
    if any(refusal in reason for refusal in _CERTIFICATE_ALERTS):
        return _REFUSES_CERTIFICATE if has_certificate else _REQUIRES_CERTIFICATE
    if "EOF" in reason:
        return "it closes the connection before TLS is set up"
    return f"TLS failed: {reason.lower().replace('_', ' ')}"


def _is_grpc(response: bytes) -> bool:
    """Whether the response is an HTTP/2 frame of settings: its fourth byte is the frame's type."""
    return len(response) > 3 and response[3] == _SETTINGS


def _host_port(endpoint: str) -> str:
    """The endpoint without its gRPC scheme, if it has one. Not for unix:."""
    if endpoint.startswith(GRPC_SCHEMES):
        return endpoint.partition(":")[2].rpartition("/")[2]
    return endpoint


def _connected(endpoint: str) -> socket.socket:
    """A connected socket. Raises OSError; gaierror also for a name that no host can have."""
    if endpoint.startswith("unix:"):
        path = endpoint.removeprefix("unix:").removeprefix("//")
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(_TIMEOUT_S)
        connection.connect(path)
        return connection
    try:
        host, port = split_address(_host_port(endpoint))
    except ValueError as error:  # with gRPC's schemes the port is optional
        raise OSError(str(error)) from error
    try:
        connection = socket.create_connection((host.strip("[]"), port), _TIMEOUT_S)
    except UnicodeError as error:  # from Python's IDNA codec: empty or long labels
        raise socket.gaierror(str(error)) from error
    connection.settimeout(_TIMEOUT_S)
    return connection


def _unreachable(error: OSError) -> Diagnosis:
    if isinstance(error, socket.gaierror):
        return Diagnosis.NO_HOST
    if isinstance(error, ConnectionRefusedError | FileNotFoundError):
        return Diagnosis.REFUSED
    return Diagnosis.TIMED_OUT  # timeouts and unreachable networks
