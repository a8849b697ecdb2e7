"""Load test: alternating phases with and without speculation, or a search for the highest rate.

Owns the order of phases and their results; `driver` runs a phase. Results are available at any
time, so that a test can be interrupted.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from outrider_bench.loadtest.driver import LoadedOrchestrators, Phase
from outrider_bench.loadtest.phase_results import Passes, PhaseResult, Probe
from outrider_bench.loadtest.plan import Conversation, slices, timed, without_times
from outrider_bench.loadtest.records import Record
from outrider_bench.loadtest.requests import RequestOptions
from outrider_bench.loadtest.sweep import SearchResult, highest_rate


@dataclass(frozen=True)
class Variant:
    """Options to serve the same load with."""

    name: str
    options: RequestOptions


@dataclass(frozen=True)
class LoadPattern:
    """Arrival of conversations: a closed loop of `num_clients`, `rate` per second, or a trace.

    With both, `num_clients` is the number of conversations that run at a time.
    """

    num_clients: int | None = None
    rate: float | None = None
    burstiness: float = 1.0


def warm_up_clients(conversations: Sequence[Conversation]) -> int:
    """Number of clients of the warm-up's closed loop."""
    return max(1, len(conversations) // 2)


def expected_s(
    num_variants: int,
    conversations: Sequence[Conversation],
    pattern: LoadPattern,
    repetitions: int,
    conversation_s: float | None,
) -> float | None:
    """Expected seconds of `Campaign.compare`; None: unknown.

    For a trace or an open loop: the time in which requests are sent; an overloaded system takes
    longer. For a closed loop: from `conversation_s`, the measured time of one conversation.
    """
    if pattern.rate is not None:
        return num_variants * sum(len(c.jobs) for c in conversations) / pattern.rate
    parts = slices(conversations, repetitions)
    if pattern.num_clients is None:
        return num_variants * sum(map(_span_s, parts))
    if conversation_s is None:
        return None
    rounds = sum(len(part) / min(pattern.num_clients, len(part)) for part in parts)
    return num_variants * rounds * conversation_s


def _span_s(conversations: Sequence[Conversation]) -> float:
    """Seconds to the last request, by a trace's times."""
    return max(max(c.at_s or 0.0, c.jobs[-1].not_before_s) for c in conversations)


@dataclass
class Campaign:
    """Phases of one load test.

    `read_passes`: reads the counters of the target replicas. `on_phase`: called before each phase.
    """

    orchestrators: LoadedOrchestrators
    run: str
    seed: int
    read_passes: Callable[[], Awaitable[Passes]] | None = None
    on_phase: Callable[[str, int], None] = lambda name, num_requests: None
    on_end: Callable[[Record], None] = lambda record: None
    results: list[PhaseResult] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    searches: dict[str, SearchResult] = field(default_factory=dict)
    _unfinished: list[PhaseResult] = field(default_factory=list)
    _num_phases: int = 0

    @property
    def all_results(self) -> list[PhaseResult]:
        """Results including those of a search and of an interrupted phase."""
        return [*self.results, *(probe.result for probe in self.probes), *self._unfinished]

    async def warm_up(
        self, variants: Sequence[Variant], conversations: Sequence[Conversation]
    ) -> None:
        """Runs each variant once, in a closed loop. Discards the results."""
        for variant in variants:
            pattern = LoadPattern(num_clients=warm_up_clients(conversations))
            await self._phase(variant, conversations, pattern, -1, [])

    async def compare(
        self,
        variants: Sequence[Variant],
        conversations: Sequence[Conversation],
        pattern: LoadPattern,
        repetitions: int,
    ) -> None:
        """Runs each of `repetitions` slices with every variant, in alternating order."""
        for repetition, part in enumerate(slices(conversations, repetitions)):
            ordered = variants if repetition % 2 == 0 else list(reversed(variants))
            for variant in ordered:
                await self._phase(variant, part, pattern, repetition, self.results)

    async def search(
        self,
        variant: Variant,
        conversations: Sequence[Conversation],
        start: float,
        attained_share: Callable[[Sequence[Record]], float],
        min_share: float,
        burstiness: float,
        precision: float,
    ) -> SearchResult:
        """Searches the highest rate at which a share `min_share` of the requests meets the SLO."""

        async def is_attained(rate: float) -> bool:
            pattern = LoadPattern(rate=rate, burstiness=burstiness)
            # The same seed for all rates: arrivals differ in their rate only.
            await self._phase(variant, conversations, pattern, 0, self._unfinished)
            result = self._unfinished.pop()
            attained = attained_share(result.records)
            probe = Probe(variant.name, rate, attained, attained >= min_share, result)
            self.probes.append(probe)
            return probe.has_passed

        return await highest_rate(is_attained, start, precision=precision)

    async def _phase(
        self,
        variant: Variant,
        conversations: Sequence[Conversation],
        pattern: LoadPattern,
        repetition: int,
        results: list[PhaseResult],
    ) -> None:
        if pattern.rate is not None:
            # The same arrivals for every variant of a repetition.
            seed = self.seed + repetition + 1
            conversations = timed(conversations, pattern.rate, pattern.burstiness, seed)
        self.on_phase(variant.name, sum(len(c.jobs) for c in conversations))
        before = await self.read_passes() if self.read_passes else None
        number, self._num_phases = self._num_phases, self._num_phases + 1
        phase = Phase(
            self.orchestrators,
            variant.options,
            number=number,
            seed=self.seed,
            run=self.run,
            on_end=self.on_end,
        )
        result = PhaseResult(variant.name, repetition, phase.records, pattern.rate)
        results.append(result)
        try:
            if pattern.num_clients is not None and pattern.rate is None:
                await phase.closed_loop(iter(without_times(conversations)), pattern.num_clients)
            else:
                await phase.open_loop(conversations, pattern.num_clients)
        finally:
            result.duration_s = phase.now_s
        if self.read_passes is not None and before is not None:
            result.passes = (await self.read_passes()).since(before)
