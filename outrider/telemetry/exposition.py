"""`/metrics`: readings put into Prometheus' form at each scrape, on a thread and port of their own.

Programs keep plain numbers and give a source that reads them, so that counting costs them next to
nothing and no scrape holds up the event loop. Knows no number's meaning.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

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
from outrider.settings.telemetry import TelemetrySettings
from outrider.telemetry.catalogue import PREFIX, VLLM_PREFIX, Metric, MetricKind
from outrider.telemetry.distribution import Distribution
from outrider.telemetry.scrapes import ScrapeServer

log = structlog.get_logger()

PATH = "/metrics"

Value = float | Distribution
# By the values of the metric's labels, in their order.
Values = Mapping[tuple[str, ...], Value]
Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily

_FAMILIES: dict[MetricKind, Callable[..., Family]] = {
    MetricKind.COUNTER: CounterMetricFamily,
    MetricKind.GAUGE: GaugeMetricFamily,
    MetricKind.HISTOGRAM: HistogramMetricFamily,
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
        log.info("metrics", port=self.port)
        try:
            yield
        finally:
            await asyncio.to_thread(server.stop)

    def _listening(self, port: int) -> ScrapeServer:
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_Readings(self._readings, self._vllm_values))

        def answer(accept: str) -> tuple[bytes, str]:
            encode, content_type = choose_encoder(accept)
            return encode(registry), content_type

        server = ScrapeServer(PATH, answer)
        try:
            self.port = server.start(self._host, port)
        except OSError as error:
            where, why = f"{self._host}:{port}", error.strerror or error
            raise ConfigError(f"metrics_port: cannot listen on {where}: {why}") from error
        return server

    def _readings(self) -> Iterable[Reading]:
        return self.source()

    def _vllm_values(self) -> tuple[str, ...] | None:
        # A dashboard chooses by the name: without one there is nothing to show yet.
        return (self.model_name, "0") if self._has_vllm_names and self.model_name else None
