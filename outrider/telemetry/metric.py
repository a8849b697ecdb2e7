"""Definition of a metric: name, kind, labels, meaning, and histogram bounds.

`catalogue` lists the metrics. On `/metrics` names get the prefix `outrider_`, and counters the
suffix `_total`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

PREFIX = "outrider_"
VLLM_PREFIX = "vllm:"


class MetricKind(Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Metric:
    """`vllm`: vLLM's name of the metric, without prefix; None: vLLM has no such metric.

    `bounds`: a histogram's bucket bounds, rising.
    """

    name: str
    kind: MetricKind
    help: str
    labels: tuple[str, ...] = ()
    vllm: str | None = None
    bounds: tuple[float, ...] = ()

    @property
    def exported_name(self) -> str:
        """Name of its samples; for a histogram without _bucket, _sum and _count."""
        return PREFIX + self.name + ("_total" if self.kind is MetricKind.COUNTER else "")


def counter(name: str, help: str, *labels: str, vllm: bool = False) -> Metric:
    return Metric(name, MetricKind.COUNTER, help, labels, name if vllm else None)


def gauge(name: str, help: str, *labels: str, vllm: bool = False) -> Metric:
    return Metric(name, MetricKind.GAUGE, help, labels, name if vllm else None)


def histogram(
    name: str,
    help: str,
    bounds: tuple[float, ...],
    *labels: str,
    vllm: str | None = None,
) -> Metric:
    return Metric(name, MetricKind.HISTOGRAM, help, labels, vllm, bounds)


# vLLM's bounds, so that quantiles can be compared; with one more at the fast end.
FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
TOKEN_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5,
    7.5, 10, 20, 40, 80,
)  # fmt: skip
REQUEST_S = (
    0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480,
    960, 1920, 7680,
)  # fmt: skip
STEP_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25,
    0.5, 1, 2.5, 5, 10,
)  # fmt: skip
NUM_TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))
NUM_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
NUM_BATCH_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
