"""Certificates, private keys and CA certificates in PEM files, checked to fit together.

Also reads when a certificate expires. gRPC credentials are made of them in
`outrider.runtime.server_security` and `outrider.client.channel`.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime

from outrider.errors import ConfigError
from outrider.security.files import WatchedFiles, read_file

_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
# DER tags.
_VERSION, _UTC_TIME = 0xA0, 0x17


@dataclass(frozen=True)
class Pem:
    """PEM texts; None: the settings name no file. The texts are not part of `repr`."""

    ca: bytes | None = field(repr=False)
    cert: bytes | None = field(repr=False)
    key: bytes | None = field(repr=False)


def watched_pem(
    *, ca: str | None, cert: str | None, key: str | None, ca_name: str, cert_name: str
) -> WatchedFiles[Pem]:
    """PEM files, reloaded when they change. Raises ConfigError that names the setting.

    `ca`, `cert`, `key`: paths; `ca_name`, `cert_name`: the settings' names.
    """

    def read() -> Pem:
        return Pem(
            ca=_ca_certificates(ca, ca_name) if ca is not None else None,
            cert=_certificate(cert, key, cert_name) if cert is not None else None,
            key=read_file(key, cert_name) if key is not None else None,
        )

    return WatchedFiles([path for path in (ca, cert, key) if path is not None], read)


def _ca_certificates(path: str, name: str) -> bytes:
    content = read_file(path, name)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(
            cadata=content.decode("ascii")
        )
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"{name}: {path} is not a PEM certificate: {error}") from None
    return content


def _certificate(path: str, key: str | None, name: str) -> bytes:
    content = read_file(path, name)
    try:
        # An encrypted key is refused: nobody can enter its password.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path, key, password=lambda: b"-")
    except (ssl.SSLError, OSError, ValueError) as error:
        raise ConfigError(
            f"{name}: {path} and {key} are not a certificate and its key: {error}"
        ) from None
    return content


def expires_at(pem: bytes) -> float:
    """End of validity of the first certificate, Unix time. Raises ValueError, LookupError."""
    text = pem.decode("ascii")
    first = text[text.index(_BEGIN) : text.index(_END) + len(_END)]
    return der_expires_at(ssl.PEM_cert_to_DER_cert(first))


def der_expires_at(der: bytes) -> float:
    """Like `expires_at`, for one certificate in DER."""
    certificate = _parts(der)
    fields = _parts(certificate[0][1])
    # RFC 5280: a Certificate begins with tbsCertificate, which has: an optional version, serial
    # number, signature algorithm, issuer, validity.
    body = _parts(fields[0][1])
    validity = body[4 if body[0][0] == _VERSION else 3]
    tag, value = _parts(validity[1])[1]
    layout = "%y%m%d%H%M%SZ" if tag == _UTC_TIME else "%Y%m%d%H%M%SZ"
    end = datetime.strptime(value.decode("ascii"), layout).replace(tzinfo=UTC)
    return end.timestamp()


def _parts(der: bytes) -> list[tuple[int, bytes]]:
    """Tags and contents of consecutive DER values."""
    found, at = [], 0
    while at < len(der):
        tag, size, at = der[at], der[at + 1], at + 2
        if size & 0x80:
            num = size & 0x7F
            size, at = int.from_bytes(der[at : at + num], "big"), at + num
        found.append((tag, der[at : at + size]))
        at += size
    return found
