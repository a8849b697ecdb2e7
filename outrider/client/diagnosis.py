"""Diagnosis of a failed connection: probes the address and says what is wrong there.

gRPC's own error texts name its parts (handshakers, sub-channels, streams) and differ by version.
A server that requires a client certificate looks to gRPC like one that hangs up. So the probe
connects itself, with TLS where the client uses TLS. Blocks for a few seconds at most.
"""

from __future__ import annotations

import socket
import ssl
from enum import Enum
from typing import TYPE_CHECKING

from outrider.errors import ConfigError
from outrider.replica import split_address

if TYPE_CHECKING:
    from outrider.client.channel import Access

_TIMEOUT_S = 3.0
# A gRPC server without TLS answers this with HTTP/2 settings, an HTTP server in words, and one with
# TLS with an alert or the end of the connection.
_QUESTION = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_SETTINGS = 4
_TLS_ALERT = b"\x15"
_GRPC_SCHEMES = ("unix:", "dns:", "ipv4:", "ipv6:")

# By OpenSSL's verification codes.
_NOT_YET_VALID, _EXPIRED, _HOST_MISMATCH, _ADDRESS_MISMATCH = 9, 10, 62, 64
_CERTIFICATE = {
    _NOT_YET_VALID: "its certificate is not valid yet: check the clocks",
    _EXPIRED: "its certificate has expired",
    _HOST_MISMATCH: "its certificate is for another host name",
    _ADDRESS_MISMATCH: "its certificate is for another host name",
}
_OTHER_AUTHORITY = "its certificate is not signed by the authority in --tls-ca"
_WANTS_CERTIFICATE = "it requires a client certificate: give --tls-cert and --tls-key"
_REFUSES_CERTIFICATE = "it refuses the certificate in --tls-cert"
# Alerts of a server about the client's certificate.
_REFUSALS = ("UNKNOWN_CA", "BAD_CERTIFICATE", "CERTIFICATE_UNKNOWN", "CERTIFICATE_EXPIRED")


class Diagnosis(Enum):
    NO_HOST = "no such host"
    NOBODY = "connection refused"
    SILENT = "no answer"
    PLAIN = "gRPC without TLS"
    HTTP = "an HTTP server"
    TLS = "TLS"
    HANGS_UP = "closes every connection"


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


def look(endpoint: str) -> Diagnosis:
    """What is there, asked without TLS."""
    try:
        with _connected(endpoint) as connection:
            said = _answer(connection)
    except OSError as error:
        return _unreachable(error)
    if said.startswith(b"HTTP/"):
        return Diagnosis.HTTP
    if _is_grpc(said):
        return Diagnosis.PLAIN
    return (
        Diagnosis.TLS
        if said.startswith(_TLS_ALERT) or _speaks_tls(endpoint)
        else Diagnosis.HANGS_UP
    )


def unconnected(endpoint: str, access: Access | None = None) -> str | None:
    """What is wrong and what to do; None: gRPC answers there as it should.

    `access`: how the client connects; without its `tls_ca` the client uses no TLS.
    """
    has_tls = access is not None and access.tls_ca is not None
    found = look(endpoint)
    match found:
        case Diagnosis.NO_HOST:
            host = split_address(_host_port(endpoint))[0]
            return f"nothing answers at {endpoint}: no host is called {host!r}"
        case Diagnosis.NOBODY:
            return f"nothing answers at {endpoint}; start it with: outrider up"
        case Diagnosis.SILENT:
            return f"nothing answers at {endpoint}: a wrong host, or a firewall between?"
        case Diagnosis.HTTP:
            return f"{endpoint} is an HTTP server (metrics?): give the orchestrator's gRPC port"
        case Diagnosis.HANGS_UP:
            return (
                f"{endpoint} closes connections without an answer: no gRPC server, or a proxy with "
                "no server behind it"
            )
        case Diagnosis.PLAIN:
            return f"{endpoint} does not use TLS: leave out --tls-ca" if has_tls else None
    if access is None or not has_tls:
        return f"{endpoint} does not answer without TLS: give --tls-ca"
    why = _handshake_fault(endpoint, access)
    return None if why is None else f"no TLS with {endpoint}: {why}"


def _speaks_tls(endpoint: str) -> bool:
    """Whether it takes part in a TLS handshake, whatever its certificate."""
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
    """Of a TLS handshake as the client makes it, and the first bytes after it; None: all is well.

    In TLS 1.3 a server judges the client's certificate after the client's part of the handshake.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as gRPC
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
                return "it is no gRPC server (an HTTPS server?)"
            said = _answer(secure)
    except ssl.SSLCertVerificationError as error:
        return _CERTIFICATE.get(error.verify_code, _OTHER_AUTHORITY)
    except ssl.SSLError as error:
        return _alert(error.reason or str(error), has_certificate=access.tls_cert is not None)
    except OSError:
        return "it closes the connection before TLS is set up"
    if not said:  # gRPC's own servers send no alert
        about = _REFUSES_CERTIFICATE if access.tls_cert is not None else _WANTS_CERTIFICATE
        return f"it closes the connection once TLS is set up; probably {about}"
    return None if _is_grpc(said) else "it is no gRPC server (an HTTPS server?)"


def _answer(connection: socket.socket) -> bytes:
    """Its first bytes; empty where it hangs up."""
    try:
        connection.sendall(_QUESTION)
        return connection.recv(64)
    except ConnectionError:
        return b""


def _alert(reason: str, *, has_certificate: bool) -> str:
    if "CERTIFICATE_REQUIRED" in reason:
        return _WANTS_CERTIFICATE
    if any(refusal in reason for refusal in _REFUSALS):
        return _REFUSES_CERTIFICATE if has_certificate else _WANTS_CERTIFICATE
    if "EOF" in reason:
        return "it closes the connection before TLS is set up"
    return f"TLS failed: {reason.lower().replace('_', ' ')}"


def _is_grpc(said: bytes) -> bool:
    return len(said) > 3 and said[3] == _SETTINGS


def _host_port(endpoint: str) -> str:
    """Of an endpoint with one of gRPC's schemes, but unix, or without."""
    if endpoint.startswith(_GRPC_SCHEMES):
        return endpoint.partition(":")[2].rpartition("/")[2]
    return endpoint


def _connected(endpoint: str) -> socket.socket:
    """Raises OSError."""
    if endpoint.startswith("unix:"):
        path = endpoint.removeprefix("unix:").removeprefix("//")
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(_TIMEOUT_S)
        connection.connect(path)
        return connection
    try:
        host, port = split_address(_host_port(endpoint))
    except ValueError as error:  # gRPC's schemes may leave out the port
        raise OSError(str(error)) from error
    connection = socket.create_connection((host.strip("[]"), port), _TIMEOUT_S)
    connection.settimeout(_TIMEOUT_S)
    return connection


def _unreachable(error: OSError) -> Diagnosis:
    if isinstance(error, socket.gaierror):
        return Diagnosis.NO_HOST
    if isinstance(error, ConnectionRefusedError | FileNotFoundError):
        return Diagnosis.NOBODY
    return Diagnosis.SILENT  # time-outs and unreachable networks
