"""gRPC channels: without TLS or with TLS, with a client certificate, with an API key.

The only module that opens channels; the orchestrator opens its channels to the replicas here too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from outrider.errors import ConfigError
from outrider.runtime.grpc_options import CLIENT_CHANNEL_OPTIONS, TIER_CHANNEL_OPTIONS
from outrider.security.files import WatchedFiles, read_secret
from outrider.security.keys import check_key
from outrider.security.pem import Pem, watched_pem
from outrider.settings.addresses import is_loopback

OpenChannel = Callable[[str], grpc.aio.Channel]
Options = Sequence[tuple[str, Any]]

# By default gRPC shares one connection between all channels to an address.
_SPREAD: Options = (
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.use_local_subchannel_pool", 1),
)

KEY_HEADER = "authorization"


def open_plain(endpoint: str) -> grpc.aio.Channel:
    """A channel to a model service, without TLS: for one machine and for trusted networks."""
    return grpc.aio.insecure_channel(endpoint, options=TIER_CHANNEL_OPTIONS)


class TlsChannels:
    """Opens channels with TLS. Each channel uses the present contents of the PEM files."""

    def __init__(
        self,
        files: WatchedFiles[Pem],
        server_name: str | None = None,
        options: Options = TIER_CHANNEL_OPTIONS,
    ) -> None:
        """`server_name`: DNS name expected in the server's certificate; None: the endpoint's."""
        self.files = files
        self._server_name = server_name
        self._options = options

    def open(self, endpoint: str, api_key: str | None = None) -> grpc.aio.Channel:
        """A channel that sends `api_key` with each request."""
        pem = self.files.current
        options: list[tuple[str, Any]] = list(self._options)
        if self._server_name is not None:
            options.append(("grpc.ssl_target_name_override", self._server_name))
        credentials = grpc.ssl_channel_credentials(pem.ca, pem.key, pem.cert)
        if api_key is not None:
            credentials = grpc.composite_channel_credentials(
                credentials, grpc.access_token_call_credentials(api_key)
            )
        return grpc.aio.secure_channel(endpoint, credentials, options=options)


@dataclass(frozen=True)
class Access:
    """Credentials for an orchestrator: paths of PEM files, and the API key itself."""

    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    api_key: str | None = field(default=None, repr=False)


def open_channel(
    endpoint: str, access: Access | None = None, *, is_spread: bool = False
) -> grpc.aio.Channel:
    """A channel to an orchestrator. Use it as a context manager, or close it.

    `is_spread`: opens its own connections, to all addresses of the endpoint's name (round robin).
    Raises ConfigError for unusable files, and if the key would be sent in plain text.
    """
    return channel_opener(endpoint, access, is_spread=is_spread)()


def channel_opener(
    endpoint: str, access: Access | None = None, *, is_spread: bool = False
) -> Callable[[], grpc.aio.Channel]:
    """Function that opens a channel to an orchestrator, on the event loop that it is called on.

    The files are read and checked here. Raises ConfigError, as `open_channel`.
    """
    access = access or Access()
    options = (*CLIENT_CHANNEL_OPTIONS, *(_SPREAD if is_spread else ()))
    key = access.api_key
    if access.tls_ca is None:
        _check_plain(endpoint, access)
        return lambda: grpc.aio.insecure_channel(
            endpoint, options=options, interceptors=None if key is None else _with_key(key)
        )
    if (access.tls_cert is None) != (access.tls_key is None):
        raise ConfigError("--tls-cert, --tls-key: give both or neither")
    files = watched_pem(
        ca=access.tls_ca,
        cert=access.tls_cert,
        key=access.tls_key,
        ca_name="--tls-ca",
        cert_name="--tls-cert",
    )
    channels = TlsChannels(files, options=options)
    return lambda: channels.open(endpoint, key)


def read_key(path: str) -> str:
    """The API key in a file. Raises ConfigError."""
    return check_key(read_secret(path, "--api-key-file"), "--api-key-file")


def _check_plain(endpoint: str, access: Access) -> None:
    if access.tls_cert is not None or access.tls_key is not None:
        raise ConfigError("--tls-cert, --tls-key: need --tls-ca")
    host = endpoint.removeprefix("dns:///").rpartition(":")[0]
    is_local = endpoint.startswith("unix:") or is_loopback(host)
    if access.api_key is not None and not is_local:
        raise ConfigError(
            f"--tls-ca: is required: the key would be sent to {endpoint} in plain text"
        )


def _with_key(api_key: str) -> list[Any]:
    metadata = ((KEY_HEADER, f"Bearer {api_key}"),)
    return [_UnaryKey(metadata), _StreamKey(metadata)]


class _UnaryKey(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]
    """Adds the API key. gRPC's own call credentials require TLS; this serves local endpoints."""

    def __init__(self, metadata: tuple[tuple[str, str], ...]) -> None:
        self._metadata = metadata

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return await continuation(_added(details, self._metadata), request)


class _StreamKey(grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    """Adds the API key to streaming requests."""

    def __init__(self, metadata: tuple[tuple[str, str], ...]) -> None:
        self._metadata = metadata

    async def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return await continuation(_added(details, self._metadata), request)


def _added(details: Any, metadata: tuple[tuple[str, str], ...]) -> Any:
    return details._replace(metadata=grpc.aio.Metadata(*(details.metadata or ()), *metadata))
