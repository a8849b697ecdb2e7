"""`/metrics`: converts readings to Prometheus' format at each scrape, on its own thread and port.

Programs keep plain numbers and provide a source that reads them. Counting is cheap, and a scrape
never blocks the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
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
from outrider.telemetry.distribution import Distribution
from outrider.telemetry.metric import PREFIX, VLLM_PREFIX, Metric, MetricKind
from outrider.telemetry.scrapes import ScrapeServer

log = structlog.get_logger()

PATH = "/metrics"

Value = float | Distribution
# Values by label values, in the order of the metric's labels.
Values = Mapping[tuple[str, ...], Value]
Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily

_FAMILIES: dict[MetricKind, Callable[..., Family]] = {
    MetricKind.COUNTER: CounterMetricFamily,
    MetricKind.GAUGE: GaugeMetricFamily,
    MetricKind.HISTOGRAM: HistogramMetricFamily,
}


@dataclass(frozen=True)
class Reading:
    """Current values of a metric."""

    metric: Metric
    values: Values

    @classmethod
    def one(cls, metric: Metric, value: Value) -> Reading:
        """Reading of a metric without labels."""
        return cls(metric, {(): value})

    @classmethod
    def by(cls, metric: Metric, values: Mapping[str, Value]) -> Reading:
        """Reading of a metric with one label."""
        return cls(metric, {(label,): value for label, value in values.items()})


# Called on the scraper's thread: may only read data that any thread may read.
Source = Callable[[], Iterable[Reading]]


_VLLM_LABELS = ("model_name", "engine")


class _Readings(Collector):
    """Adapter from a source to prometheus-client. `vllm_values`: values of vLLM's labels."""

    def __init__(self, source: Source, vllm_values: Callable[[], tuple[str, ...] | None]) -> None:
        self._source = source
        self._vllm_values = vllm_values

    def describe(self) -> Iterable[Family]:
        return ()  # prometheus-client would otherwise read the source before the first scrape

    def collect(self) -> Iterator[Family]:
        values = self._vllm_values()
        for reading in self._source():
            metric = reading.metric
            yield _family(PREFIX + metric.name, reading, (), ())
            if values is not None and metric.vllm is not None:
                yield _family(VLLM_PREFIX + metric.vllm, reading, _VLLM_LABELS, values)


def _family(
    name: str, reading: Reading, extra_labels: Sequence[str], extra_values: Sequence[str]
) -> Family:
    metric = reading.metric
    family = _FAMILIES[metric.kind](name, metric.help, labels=[*extra_labels, *metric.labels])
    for labels, value in reading.values.items():
        label_values = [*extra_values, *labels]
        if isinstance(family, HistogramMetricFamily):
            assert isinstance(value, Distribution), f"{name} is a histogram"
            family.add_metric(label_values, buckets=value.cumulative(), sum_value=value.sum)
        else:
            assert not isinstance(value, Distribution), f"{name} is not a histogram"
            family.add_metric(label_values, value)
    return family


class Exposition:
    """`/metrics` of one program. There are no values until `source` is set.

    `model_name` is the label by which vLLM's dashboards select.
    """

    def __init__(self, host: str, settings: TelemetrySettings) -> None:
        self._host = host
        self._configured_port = settings.metrics_port
        self._has_vllm_names = settings.metrics_vllm_names
        self.source: Source = tuple
        self.model_name = ""
        # The port it listens on; None: no /metrics, so nothing needs to be counted.
        self.port: int | None = None

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Listens for the time of a block. Raises ConfigError if the port is not available."""
        if self._configured_port is None:
            yield
            return
        server = self._listening(self._configured_port)
        log.info("metrics", port=self.port)
        try:
            yield
        finally:
            await asyncio.to_thread(server.stop)

    def _listening(self, port: int) -> ScrapeServer:
        server = ScrapeServer(PATH, self.answer)
        try:
            self.port = server.start(self._host, port)
        except OSError as error:
            where, why = f"{self._host}:{port}", error.strerror or error
            raise ConfigError(f"metrics_port: cannot listen on {where}: {why}") from error
        return server

    def answer(self, accept: str) -> tuple[bytes, str]:
        """Body and content type for a scraper's Accept header. Takes milliseconds; any thread."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    @functools.cached_property
    def _registry(self) -> CollectorRegistry:
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_Readings(self._readings, self._vllm_values))
        return registry

    def _readings(self) -> Iterable[Reading]:
        return self.source()

    def _vllm_values(self) -> tuple[str, ...] | None:
        # vLLM's dashboards select by model name, so there is nothing to show without it.
        return (self.model_name, "0") if self._has_vllm_names and self.model_name else None
