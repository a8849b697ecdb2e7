"""`/metrics`: readings put into Prometheus' form at each scrape, on a thread and port of their own.

Programs keep plain numbers and give a source that reads them, so that counting costs them next to
nothing and no scrape holds up the event loop. Knows no number's meaning.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET, AF_INET6
from typing import Any
from urllib.parse import urlsplit

import structlog
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from outrider.errors import ConfigError
from outrider.telemetry.catalogue import PREFIX, VLLM_PREFIX, Kind, Metric
from outrider.telemetry.distribution import Distribution
from outrider.telemetry.settings import TelemetrySettings

log = structlog.get_logger()

PATH = "/metrics"
# A scraper that connects and says nothing keeps its thread no longer.
_REQUEST_TIMEOUT_S = 10.0
# A Prometheus or two, their neighbours' and a person.
_MAX_SCRAPES = 16

Value = float | Distribution
# By the values of the metric's labels, in their order.
Values = Mapping[tuple[str, ...], Value]
Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily

_FAMILIES: dict[Kind, Callable[..., Family]] = {
    Kind.COUNTER: CounterMetricFamily,
    Kind.GAUGE: GaugeMetricFamily,
    Kind.HISTOGRAM: HistogramMetricFamily,
}


@dataclass(frozen=True)
class Reading:
    """What a metric is now."""

    metric: Metric
    values: Values

    @classmethod
    def one(cls, metric: Metric, value: Value) -> Reading:
        """Of a metric without labels."""
        return cls(metric, {(): value})

    @classmethod
    def by(cls, metric: Metric, values: Mapping[str, Value]) -> Reading:
        """Of a metric with one label."""
        return cls(metric, {(label,): value for label, value in values.items()})


# Called on the scraper's thread: must only read what may be read on any.
Source = Callable[[], Iterable[Reading]]


_VLLM_LABELS = ("model_name", "engine")


class _Readings(Collector):
    """A source as the client library wants it; `vllm_values` are of vLLM's labels."""

    def __init__(self, source: Source, vllm_values: Callable[[], tuple[str, ...] | None]) -> None:
        self._source = source
        self._vllm_values = vllm_values

    def describe(self) -> Iterable[Family]:
        return ()  # nothing is read before the first scrape

    def collect(self) -> Iterator[Family]:
        values = self._vllm_values()
        for reading in self._source():
            metric = reading.metric
            yield _family(PREFIX + metric.name, reading, (), ())
            if values is not None and metric.vllm is not None:
                yield _family(VLLM_PREFIX + metric.vllm, reading, _VLLM_LABELS, values)


def _family(name: str, reading: Reading, more: Sequence[str], more_values: Sequence[str]) -> Family:
    metric = reading.metric
    family = _FAMILIES[metric.kind](name, metric.help, labels=[*more, *metric.labels])
    for labels, value in reading.values.items():
        shown = [*more_values, *labels]
        if isinstance(family, HistogramMetricFamily):
            assert isinstance(value, Distribution), f"{name} is a histogram"
            family.add_metric(shown, buckets=value.cumulative(), sum_value=value.sum)
        else:
            assert not isinstance(value, Distribution), f"{name} is no histogram"
            family.add_metric(shown, value)
    return family


class _Handler(BaseHTTPRequestHandler):
    """GET /metrics, and nothing else."""

    registry: CollectorRegistry
    timeout = _REQUEST_TIMEOUT_S
    server_version = "outrider"
    sys_version = ""

    def do_GET(self) -> None:
        if urlsplit(self.path).path != PATH:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        encode, content_type = choose_encoder(self.headers.get("Accept") or "")
        body = encode(self.registry)
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """A scrape is no event."""


class _Server(ThreadingHTTPServer):
    """So many scrapes at a time; who is one too many is hung up on."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[_Handler]) -> None:
        self._places = threading.BoundedSemaphore(_MAX_SCRAPES)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """A scraper that went away in the midst is its own affair."""


class Exposition:
    """`/metrics` of one program. `source` may come later: nothing is told till then.

    `model_name` is what vLLM's dashboards choose by.
    """

    def __init__(self, host: str, settings: TelemetrySettings) -> None:
        self._host = host
        self._wanted_port = settings.metrics_port
        self._has_vllm_names = settings.metrics_vllm_names
        self.source: Source = tuple
        self.model_name = ""
        # What it listens on; None: there is none, and nobody reads what would be counted.
        self.port: int | None = None

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Listens for the time of a block. Raises ConfigError if the port cannot be had."""
        if self._wanted_port is None:
            yield
            return
        server = self._listening(self._wanted_port)
        self.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        thread.start()
        log.info("metrics", port=self.port)
        try:
            yield
        finally:
            await asyncio.to_thread(server.shutdown)
            server.server_close()
            thread.join()

    def _listening(self, port: int) -> ThreadingHTTPServer:
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_Readings(self._readings, self._vllm_values))
        handler = type("_Scrape", (_Handler,), {"registry": registry})
        family = AF_INET6 if ":" in self._host else AF_INET
        kind = type("_Server", (_Server,), {"address_family": family})
        try:
            server: ThreadingHTTPServer = kind((self._host.strip("[]"), port), handler)
        except OSError as error:
            where, why = f"{self._host}:{port}", error.strerror or error
            raise ConfigError(f"metrics_port: cannot listen on {where}: {why}") from error
        return server

    def _readings(self) -> Iterable[Reading]:
        return self.source()

    def _vllm_values(self) -> tuple[str, ...] | None:
        # A dashboard chooses by the name: without one there is nothing to show yet.
        return (self.model_name, "0") if self._has_vllm_names and self.model_name else None
