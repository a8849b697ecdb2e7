"""Certificates, keys and authorities in PEM files, for servers and for clients.

Checks that they can be used together before anybody is given them. Knows nothing of gRPC.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime

from outrider.errors import ConfigError
from outrider.security.files import WatchedFiles, read_file

_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
# Tags of DER.
_VERSION, _UTC_TIME = 0xA0, 0x17


@dataclass(frozen=True)
class Pem:
    """PEM texts; None where the settings name no file. Shows nothing of itself in logs."""

    ca: bytes | None = field(repr=False)
    cert: bytes | None = field(repr=False)
    key: bytes | None = field(repr=False)


def watched_pem(
    *, ca: str | None, cert: str | None, key: str | None, ca_name: str, cert_name: str
) -> WatchedFiles[Pem]:
    """Paths, and the names of their settings. Raises ConfigError."""

    def read() -> Pem:
        return Pem(
            ca=_authorities(ca, ca_name) if ca is not None else None,
            cert=_certificate(cert, key, cert_name) if cert is not None else None,
            key=read_file(key, cert_name) if key is not None else None,
        )

    return WatchedFiles([path for path in (ca, cert, key) if path is not None], read)


def _authorities(path: str, name: str) -> bytes:
    content = read_file(path, name)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(
            cadata=content.decode("ascii")
        )
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"{name}: {path} holds no PEM certificate: {error}") from None
    return content


def _certificate(path: str, key: str | None, name: str) -> bytes:
    content = read_file(path, name)
    try:
        # A key that needs a password is refused: there is nobody to ask.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path, key, password=lambda: b"-")
    except (ssl.SSLError, OSError, ValueError) as error:
        raise ConfigError(
            f"{name}: {path} and {key} are no certificate and its key: {error}"
        ) from None
    return content


def expires_at(pem: bytes) -> float:
    """End of the first certificate's validity, Unix time. Raises ValueError."""
    text = pem.decode("ascii")
    first = text[text.index(_BEGIN) : text.index(_END) + len(_END)]
    return der_expires_at(ssl.PEM_cert_to_DER_cert(first))


def der_expires_at(der: bytes) -> float:
    """As `expires_at`, of a certificate in DER. Raises ValueError, LookupError."""
    certificate = _parts(der)
    fields = _parts(certificate[0][1])
    # Certificate: its body first. Body: an explicit version or none, serial number, algorithm,
    # issuer, validity.
    body = _parts(fields[0][1])
    validity = body[4 if body[0][0] == _VERSION else 3]
    tag, value = _parts(validity[1])[1]
    layout = "%y%m%d%H%M%SZ" if tag == _UTC_TIME else "%Y%m%d%H%M%SZ"
    end = datetime.strptime(value.decode("ascii"), layout).replace(tzinfo=UTC)
    return end.timestamp()


def _parts(der: bytes) -> list[tuple[int, bytes]]:
    """Tags and contents of DER values, one after the other."""
    found, at = [], 0
    while at < len(der):
        tag, size, at = der[at], der[at + 1], at + 2
        if size & 0x80:
            num = size & 0x7F
            size, at = int.from_bytes(der[at : at + num], "big"), at + num
        found.append((tag, der[at : at + size]))
        at += size
    return found
