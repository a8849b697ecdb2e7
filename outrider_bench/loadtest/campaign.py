"""A load test: phases with speculation and without it in turn, or a search for a rate.

Owns which phase comes when and what is kept of each; how a visit is made is for `driver`. What was
measured so far is there at any time, so that a test can be cut short.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from outrider_bench.loadtest.asking import Ask
from outrider_bench.loadtest.driver import Phase, Subject
from outrider_bench.loadtest.plan import Visit, slices, timed, without_times
from outrider_bench.loadtest.records import Record
from outrider_bench.loadtest.stretches import Passes, Probe, Stretch
from outrider_bench.loadtest.sweep import Found, highest_rate


@dataclass(frozen=True)
class Variant:
    """One way to serve the same load."""

    name: str
    ask: Ask


@dataclass(frozen=True)
class Manner:
    """How visits come: `num_callers` in a closed loop, `rate` per second, or at their own times."""

    num_callers: int | None = None
    rate: float | None = None
    burstiness: float = 1.0


def warm_up_callers(visits: Sequence[Visit]) -> int:
    """Of the closed loop that warms up."""
    return max(1, len(visits) // 2)


def expected_s(
    num_variants: int,
    visits: Sequence[Visit],
    manner: Manner,
    repetitions: int,
    visit_s: float | None,
) -> float | None:
    """About how long `Campaign.compare` takes; None: that is not known.

    Of a trace and of an open loop the time in which requests are sent; a system that cannot keep
    up takes longer. Of a closed loop by `visit_s`, the time of one visit, where it was measured.
    """
    if manner.rate is not None:
        return num_variants * sum(len(visit.jobs) for visit in visits) / manner.rate
    parts = slices(visits, repetitions)
    if manner.num_callers is None:
        return num_variants * sum(map(_span_s, parts))
    if visit_s is None:
        return None
    rounds = sum(len(part) / min(manner.num_callers, len(part)) for part in parts)
    return num_variants * rounds * visit_s


def _span_s(visits: Sequence[Visit]) -> float:
    """From the first to the last request, by a trace's times."""
    return max(max(visit.at_s or 0.0, visit.jobs[-1].not_before_s) for visit in visits)


@dataclass
class Campaign:
    """`read_passes` asks the target replicas; `on_phase` is told of each phase before it begins."""

    subject: Subject
    run: str
    seed: int
    read_passes: Callable[[], Awaitable[Passes]] | None = None
    on_phase: Callable[[str, int], None] = lambda name, num_requests: None
    on_end: Callable[[Record], None] = lambda record: None
    stretches: list[Stretch] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    found: dict[str, Found] = field(default_factory=dict)
    _unfinished: list[Stretch] = field(default_factory=list)
    _num_phases: int = 0

    @property
    def all_stretches(self) -> list[Stretch]:
        """Also those of a search, and of one that was cut short."""
        return [*self.stretches, *(probe.stretch for probe in self.probes), *self._unfinished]

    async def warm_up(self, variants: Sequence[Variant], visits: Sequence[Visit]) -> None:
        """Each variant once, in a closed loop; nothing is kept of it."""
        for variant in variants:
            manner = Manner(num_callers=warm_up_callers(visits))
            await self._phase(variant, visits, manner, -1, [])

    async def compare(
        self,
        variants: Sequence[Variant],
        visits: Sequence[Visit],
        manner: Manner,
        repetitions: int,
    ) -> None:
        """The visits in so many slices, each slice by every variant, in both orders in turn."""
        for repetition, part in enumerate(slices(visits, repetitions)):
            ordered = variants if repetition % 2 == 0 else list(reversed(variants))
            for variant in ordered:
                await self._phase(variant, part, manner, repetition, self.stretches)

    async def search(
        self,
        variant: Variant,
        visits: Sequence[Visit],
        start: float,
        attains: Callable[[Sequence[Record]], float],
        least: float,
        burstiness: float,
        precision: float,
    ) -> Found:
        """The highest rate at which at least a share `least` of the requests attains."""

        async def passes(rate: float) -> bool:
            manner = Manner(rate=rate, burstiness=burstiness)
            # Not numbered on: arrivals differ in their rate only.
            await self._phase(variant, visits, manner, 0, self._unfinished)
            stretch = self._unfinished.pop()
            attained = attains(stretch.records)
            probe = Probe(variant.name, rate, attained, attained >= least, stretch)
            self.probes.append(probe)
            return probe.has_passed

        return await highest_rate(passes, start, precision=precision)

    async def _phase(
        self,
        variant: Variant,
        visits: Sequence[Visit],
        manner: Manner,
        repetition: int,
        kept: list[Stretch],
    ) -> None:
        if manner.rate is not None:
            # The same arrivals for every variant of a repetition.
            seed = self.seed + repetition + 1
            visits = timed(visits, manner.rate, manner.burstiness, seed)
        self.on_phase(variant.name, sum(len(visit.jobs) for visit in visits))
        before = await self.read_passes() if self.read_passes else None
        number, self._num_phases = self._num_phases, self._num_phases + 1
        phase = Phase(
            self.subject,
            variant.ask,
            number=number,
            seed=self.seed,
            run=self.run,
            on_end=self.on_end,
        )
        stretch = Stretch(variant.name, repetition, phase.records, manner.rate)
        kept.append(stretch)
        try:
            if manner.num_callers is not None:
                await phase.closed_loop(iter(without_times(visits)), manner.num_callers)
            else:
                await phase.open_loop(visits)
        finally:
            stretch.duration_s = phase.now_s
        if self.read_passes is not None and before is not None:
            stretch.passes = (await self.read_passes()).since(before)
