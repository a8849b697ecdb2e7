"""What protects a gRPC server: its credentials, who is let in, the probes' own port.

Certificates are looked at for each connection that begins, so that new ones need no restart and
streams that are open go on. Knows no service.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import structlog

from outrider.runtime.client_identity import IdentityInterceptor
from outrider.runtime.interceptors import AccessInterceptor, Reason
from outrider.security.files import WatchedFiles
from outrider.security.pem import Pem, expires_at, watched_pem
from outrider.settings.security import ServerSettings, TierSettings
from outrider.telemetry import catalogue as metrics
from outrider.telemetry.exposition import Reading

log = structlog.get_logger()


@dataclass(frozen=True)
class ServerProtection:
    """`credentials` None: no TLS. `health_port` None: none; 0: a free one.

    `certificates`: the files in use, by what for.
    """

    credentials: grpc.ServerCredentials | None = None
    gates: Sequence[AccessInterceptor] = ()
    health_port: int | None = None
    certificates: Mapping[str, str] = field(default_factory=dict)

    def readings(
        self, behind: Mapping[str, int] | None = None, redis_certificate: float | None = None
    ) -> Iterator[Reading]:
        """Calls refused at the gates, and `behind` them by the method; ends of certificates.

        `redis_certificate`: end of the one that Redis shows. On any thread.
        """
        counts = [gate.refusals.by_reason for gate in self.gates]
        at_gates = {reason.value: sum(count[reason.value] for count in counts) for reason in Reason}
        yield Reading.by(metrics.CALLS_REFUSED, {**at_gates, **(behind or {})})
        ends: dict[str, float] = {}
        if redis_certificate is not None:
            ends["redis"] = redis_certificate
        for use, path in self.certificates.items():
            with contextlib.suppress(OSError, ValueError, LookupError):  # in the midst of a change
                ends[use] = expires_at(Path(path).read_bytes())
        yield Reading.by(metrics.CERTIFICATE_EXPIRES_AT, ends)


UNPROTECTED = ServerProtection()


def tier_protection(settings: TierSettings, host: str) -> ServerProtection:
    """Of a model service: only callers with one of the names. Raises ConfigError."""
    gates = []
    if settings.tls_client_ca is not None:
        gates.append(IdentityInterceptor(settings.client_names))
    elif not is_loopback(host):
        log.warning("open_to_all", host=host, why="tls_client_ca is unset: anyone may connect")
    return _protection(settings, gates, None)


def server_protection(
    settings: ServerSettings, gates: Sequence[AccessInterceptor], client_cert: str | None = None
) -> ServerProtection:
    """Of a server that asks its callers for something else than a name. Raises ConfigError.

    `client_cert`: the file of the certificate that it shows to others itself.
    """
    return _protection(settings, gates, client_cert)


def _protection(
    settings: ServerSettings, gates: Sequence[AccessInterceptor], client_cert: str | None
) -> ServerProtection:
    files = {"server": settings.tls_cert, "client": client_cert}
    certificates = {use: path for use, path in files.items() if path is not None}
    return ServerProtection(_credentials(settings), gates, settings.health_port, certificates)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name, which may lead anywhere
        return False


def _credentials(settings: ServerSettings) -> grpc.ServerCredentials | None:
    if settings.tls_cert is None:
        return None
    files = watched_pem(
        ca=settings.tls_client_ca,
        cert=settings.tls_cert,
        key=settings.tls_key,
        ca_name="tls_client_ca",
        cert_name="tls_cert",
    )

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC's threads at each handshake: three looks at the file system."""
        return _configuration(files) if files.refresh() else None

    return grpc.dynamic_ssl_server_credentials(
        _configuration(files),
        renewed,  # type: ignore[arg-type]  # None: as they were
        require_client_authentication=settings.tls_client_ca is not None,
    )


def _configuration(files: WatchedFiles[Pem]) -> grpc.ServerCertificateConfiguration:
    pem = files.current
    assert pem.key is not None, "settings have both or neither"
    assert pem.cert is not None, "settings have both or neither"
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], pem.ca)
