"""The other end of `/metrics`: what programs say of themselves, and how it changed between twice.

Knows the format, rates and quantiles; no metric's meaning.
"""

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
# Of a program's own: some 300 lines.
_MAX_BYTES = 8 << 20

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Scrape:
    """All samples of one program; `taken_at`: seconds of the monotonic clock."""

    address: str
    taken_at: float
    samples: Mapping[str, Mapping[Labels, float]]

    @classmethod
    def of(cls, address: str) -> Scrape:
        """Asks host:port; blocks for TIMEOUT_S at most. Raises Unavailable."""
        url = f"http://{address}/metrics"
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
                text = answer.read(_MAX_BYTES).decode()
            return cls(address, time.monotonic(), _parsed(text))
        except HTTPException as error:
            raise Unavailable(f"no metrics at {address}: not HTTP; is it metrics_port?") from error
        except (OSError, ValueError) as error:  # also of HTTP's errors, and of what is no metrics
            raise Unavailable(f"no metrics at {address}: {_reason(error)}") from error

    def has(self, name: str) -> bool:
        return name in self.samples

    def find(self, name: str, **labels: str) -> Iterator[tuple[dict[str, str], float]]:
        """The samples that have these labels, with all of theirs."""
        for found, value in self.samples.get(name, {}).items():
            if found >= frozenset(labels.items()):
                yield dict(found), value

    def total(self, name: str, **labels: str) -> float:
        """The sum of those; 0 without any."""
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
    """Of one program, from one scrape to a later one. Counters that fell have begun anew."""

    before: Scrape
    after: Scrape

    @classmethod
    def since_start(cls, scrape: Scrape) -> Change:
        """All that the program has counted: rates are means of its life."""
        started_at = scrape.total("process_start_time_seconds")
        age_s = time.time() - started_at if started_at else 0.0
        return cls(Scrape(scrape.address, scrape.taken_at - age_s, {}), scrape)

    @property
    def seconds(self) -> float:
        return self.after.taken_at - self.before.taken_at

    def increase(self, name: str, **labels: str) -> float:
        """Of a counter, or of a histogram's _sum, _count or a bucket."""
        last, now = self.before.total(name, **labels), self.after.total(name, **labels)
        return now - last if now >= last else now

    def rate(self, name: str, **labels: str) -> float:
        """A second; nan where no time has passed."""
        return self.increase(name, **labels) / self.seconds if self.seconds > 0 else nan

    def ratio(self, part: str, whole: str, **labels: str) -> float:
        """Of two counters' increases; nan where the whole has none."""
        total = self.increase(whole, **labels)
        return self.increase(part, **labels) / total if total else nan

    def mean(self, name: str, **labels: str) -> float:
        """Of what a histogram has got; nan without any."""
        return self.ratio(f"{name}_sum", f"{name}_count", **labels)

    def quantile(self, name: str, share: float, **labels: str) -> float:
        """Of a histogram, even within a bucket, as Prometheus has it; nan without any."""
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
