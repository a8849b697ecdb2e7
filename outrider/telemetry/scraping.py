"""Client side of `/metrics`: scrapes of a program, and rates and quantiles between two scrapes."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from math import inf, nan

from prometheus_client.parser import text_string_to_metric_families

from outrider.errors import Unavailable

TIMEOUT_S = 5.0
# A program has some 300 lines.
_MAX_BYTES = 8 << 20

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Scrape:
    """All samples of one program. `taken_at`: seconds of the monotonic clock."""

    address: str
    taken_at: float
    samples: Mapping[str, Mapping[Labels, float]]

    @classmethod
    def of(cls, address: str) -> Scrape:
        """Scrapes host:port; blocks for at most TIMEOUT_S. Raises Unavailable."""
        url = f"http://{address}/metrics"
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
                text = answer.read(_MAX_BYTES).decode()
            return cls(address, time.monotonic(), _parsed(text))
        except HTTPException as error:
            raise Unavailable(
                f"no metrics at {address}: not an HTTP server; use the program's metrics_port"
            ) from error
        except (OSError, ValueError) as error:  # includes HTTP errors and unparsable text
            raise Unavailable(f"no metrics at {address}: {_reason(error)}") from error

    def has(self, name: str) -> bool:
        return name in self.samples

    def find(self, name: str, **labels: str) -> Iterator[tuple[dict[str, str], float]]:
        """The samples that have these labels, each with all its labels."""
        for found, value in self.samples.get(name, {}).items():
            if found >= frozenset(labels.items()):
                yield dict(found), value

    def total(self, name: str, **labels: str) -> float:
        """Sum of the samples that have these labels; 0 without any."""
        return sum(value for _, value in self.find(name, **labels))


def _parsed(text: str) -> dict[str, dict[Labels, float]]:
    samples: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values = samples.setdefault(sample.name, {})
            values[frozenset(sample.labels.items())] = sample.value
    return samples


def _reason(error: Exception) -> str:
    inner = getattr(error, "reason", error)
    return getattr(inner, "strerror", None) or str(inner)


@dataclass(frozen=True)
class Change:
    """Change of a program's samples between two scrapes. A counter that fell was restarted."""

    before: Scrape
    after: Scrape

    @classmethod
    def since_start(cls, scrape: Scrape) -> Change:
        """Change since the program started; rates are means over its lifetime."""
        started_at = scrape.total("process_start_time_seconds")
        age_s = time.time() - started_at if started_at else 0.0
        return cls(Scrape(scrape.address, scrape.taken_at - age_s, {}), scrape)

    @property
    def seconds(self) -> float:
        return self.after.taken_at - self.before.taken_at

    def increase(self, name: str, **labels: str) -> float:
        """Increase of a counter, or of a histogram's _sum, _count or bucket."""
        last, now = self.before.total(name, **labels), self.after.total(name, **labels)
        return now - last if now >= last else now

    def rate(self, name: str, **labels: str) -> float:
        """Increase per second; nan if no time has passed."""
        return self.increase(name, **labels) / self.seconds if self.seconds > 0 else nan

    def ratio(self, part: str, whole: str, **labels: str) -> float:
        """Ratio of the increases of two counters; nan if `whole` has not increased."""
        total = self.increase(whole, **labels)
        return self.increase(part, **labels) / total if total else nan

    def mean(self, name: str, **labels: str) -> float:
        """Mean of a histogram's new observations; nan without any."""
        return self.ratio(f"{name}_sum", f"{name}_count", **labels)

    def quantile(self, name: str, share: float, **labels: str) -> float:
        """Quantile of a histogram, interpolated within a bucket like Prometheus; nan if empty."""
        counts = sorted(
            (float(found["le"]), self.increase(f"{name}_bucket", **labels, le=found["le"]))
            for found, _ in self.after.find(f"{name}_bucket", **labels)
        )
        if not counts or not counts[-1][1]:
            return nan
        wanted, lower, below = share * counts[-1][1], 0.0, 0.0
        for bound, count in counts:
            if count >= wanted:
                if bound == inf:
                    return lower
                inside = (wanted - below) / (count - below) if count > below else 1.0
                return lower + inside * (bound - lower)
            lower, below = bound, count
        return lower
