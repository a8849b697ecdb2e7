"""Security of a gRPC server: TLS credentials, access interceptors, the health port.

Certificate files are checked at each new connection. A new certificate needs no restart, and open
streams continue.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import structlog

from outrider.runtime.client_identity import IdentityInterceptor
from outrider.runtime.interceptors import AccessInterceptor, Reason
from outrider.security.files import WatchedFiles
from outrider.security.pem import Pem, expires_at, watched_pem
from outrider.settings.addresses import is_loopback
from outrider.settings.security import ServerSettings, TierSettings
from outrider.telemetry import catalogue as metrics
from outrider.telemetry.exposition import Reading

log = structlog.get_logger()


@dataclass(frozen=True)
class ServerProtection:
    """`credentials` None: no TLS. `health_port` None: no health port; 0: any free port.

    `certificates`: the certificate files in use, by purpose.
    """

    credentials: grpc.ServerCredentials | None = None
    interceptors: Sequence[AccessInterceptor] = ()
    health_port: int | None = None
    certificates: Mapping[str, str] = field(default_factory=dict)

    def readings(
        self,
        rejected_later: Mapping[str, int] | None = None,
        redis_certificate: float | None = None,
    ) -> Iterator[Reading]:
        """Metrics: rejected calls by reason, and expiry of certificates. May run on any thread.

        `rejected_later`: calls rejected after the interceptors, by a method. `redis_certificate`:
        expiry of Redis' certificate.
        """
        counts = [interceptor.refusals.by_reason for interceptor in self.interceptors]
        at_interceptors = {
            reason.value: sum(count[reason.value] for count in counts) for reason in Reason
        }
        yield Reading.by(metrics.CALLS_REFUSED, {**at_interceptors, **(rejected_later or {})})
        expiries: dict[str, float] = {}
        if redis_certificate is not None:
            expiries["redis"] = redis_certificate
        for use, path in self.certificates.items():
            with contextlib.suppress(OSError, ValueError, LookupError):  # file is being replaced
                expiries[use] = expires_at(Path(path).read_bytes())
        yield Reading.by(metrics.CERTIFICATE_EXPIRES_AT, expiries)


UNPROTECTED = ServerProtection()


def tier_protection(settings: TierSettings, host: str) -> ServerProtection:
    """For a model service: accepts only clients with one of the names. Raises ConfigError."""
    interceptors = []
    if settings.tls_client_ca is not None:
        interceptors.append(IdentityInterceptor(settings.client_names))
    elif not is_loopback(host):
        log.warning("open_to_all", host=host, why="tls_client_ca is not set: anyone may connect")
    return _protection(settings, interceptors, None)


def server_protection(
    settings: ServerSettings,
    interceptors: Sequence[AccessInterceptor],
    client_cert: str | None = None,
) -> ServerProtection:
    """For a server with other access checks than client names. Raises ConfigError.

    `client_cert`: the certificate file that it presents to other servers.
    """
    return _protection(settings, interceptors, client_cert)


def _protection(
    settings: ServerSettings, interceptors: Sequence[AccessInterceptor], client_cert: str | None
) -> ServerProtection:
    files = {"server": settings.tls_cert, "client": client_cert}
    certificates = {use: path for use, path in files.items() if path is not None}
    return ServerProtection(
        _credentials(settings), interceptors, settings.health_port, certificates
    )


def server_files(settings: ServerSettings) -> WatchedFiles[Pem] | None:
    """Certificate, key and clients' CA of a server; None: no TLS. Raises ConfigError."""
    if settings.tls_cert is None:
        return None
    return watched_pem(
        ca=settings.tls_client_ca,
        cert=settings.tls_cert,
        key=settings.tls_key,
        ca_name="tls_client_ca",
        cert_name="tls_cert",
    )


def _credentials(settings: ServerSettings) -> grpc.ServerCredentials | None:
    files = server_files(settings)
    if files is None:
        return None

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        """Called on gRPC's threads at each handshake; costs three stat calls."""
        return _configuration(files) if files.refresh() else None

    return grpc.dynamic_ssl_server_credentials(
        _configuration(files),
        renewed,  # type: ignore[arg-type]  # None: unchanged
        require_client_authentication=settings.tls_client_ca is not None,
    )


def _configuration(files: WatchedFiles[Pem]) -> grpc.ServerCertificateConfiguration:
    pem = files.current
    assert pem.key is not None, "settings have both or neither"
    assert pem.cert is not None, "settings have both or neither"
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], pem.ca)
