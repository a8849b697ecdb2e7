"""Every metric there is: its name, kind, labels, meaning, and what vLLM calls the same thing.

The one list that dashboards, alerts and documents are checked against. Knows no values.
On `/metrics` each name has `outrider_` before it, and counters `_total` behind it, as usual.
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
    """`vllm`: vLLM's name of the same, without its prefix; None: it has none.

    `bounds`: of a histogram's buckets, rising.
    """

    name: str
    kind: MetricKind
    help: str
    labels: tuple[str, ...] = ()
    vllm: str | None = None
    bounds: tuple[float, ...] = ()

    @property
    def exported_name(self) -> str:
        """As a sample of it is called; of a histogram without _bucket, _sum and _count."""
        return PREFIX + self.name + ("_total" if self.kind is MetricKind.COUNTER else "")


def _counter(name: str, help: str, *labels: str, vllm: bool = False) -> Metric:
    return Metric(name, MetricKind.COUNTER, help, labels, name if vllm else None)


def _gauge(name: str, help: str, *labels: str, vllm: bool = False) -> Metric:
    return Metric(name, MetricKind.GAUGE, help, labels, name if vllm else None)


def _histogram(
    name: str,
    help: str,
    bounds: tuple[float, ...],
    *labels: str,
    vllm: str | None = None,
) -> Metric:
    return Metric(name, MetricKind.HISTOGRAM, help, labels, vllm, bounds)


# vLLM's, so that quantiles of both can be laid side by side; one more at the fast end.
_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
_TOKEN_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5,
    7.5, 10, 20, 40, 80,
)  # fmt: skip
_REQUEST_S = (
    0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480,
    960, 1920, 7680,
)  # fmt: skip
_STEP_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25,
    0.5, 1, 2.5, 5, 10,
)  # fmt: skip
_NUM_TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))
_NUM_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
_NUM_BATCH_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

# --- Of the orchestrator: requests ---
NUM_REQUESTS_RUNNING = _gauge(
    "num_requests_running", "Requests that generate now (streams).", vllm=True
)
NUM_REQUESTS_WAITING = _gauge(
    "num_requests_waiting", "Requests that wait for their turn, or for room.", vllm=True
)
REQUESTS = _counter("requests", "Calls of Generate that have ended, by gRPC status.", "status")
REQUEST_SUCCESS = _counter(
    "request_success",
    "Requests that have begun to generate and ended well: stop, length, or abort (the caller left, "
    "or the server was stopping).",
    "finished_reason",
    vllm=True,
)
UNREAD_STREAMS = _counter(
    "unread_streams",
    "Streams that ended because their client had not read for write_timeout_s; CANCELLED, too.",
)
PROMPT_TOKENS = _counter(
    "prompt_tokens", "Context tokens of requests that have begun to generate.", vllm=True
)
GENERATION_TOKENS = _counter(
    "generation_tokens", "Tokens generated here and sent: the sum of tokens_total.", vllm=True
)
TOKENS = _counter(
    "tokens",
    "Tokens generated here and sent: accepted (of the draft), recovered (in place of a rejected "
    "one), bonus (after a whole block), plain (in a round without draft).",
    "origin",
)
REPLAYED_TOKENS = _counter(
    "replayed_tokens", "Tokens that a resumed call was sent from the record, generated before."
)
TIME_TO_FIRST_TOKEN = _histogram(
    "time_to_first_token_seconds",
    "From the call to its first chunk.",
    _FIRST_TOKEN_S,
    vllm="time_to_first_token_seconds",
)
INTER_TOKEN_LATENCY = _histogram(
    "inter_token_latency_seconds",
    "From one chunk of a stream to its next, whatever number of tokens it has.",
    _TOKEN_S,
    vllm="inter_token_latency_seconds",
)
TIME_PER_OUTPUT_TOKEN = _histogram(
    "request_time_per_output_token_seconds",
    "Of a whole request: time after its first chunk by tokens after it.",
    _TOKEN_S,
    vllm="request_time_per_output_token_seconds",
)
E2E_REQUEST_LATENCY = _histogram(
    "e2e_request_latency_seconds",
    "From the call to its last chunk.",
    _REQUEST_S,
    vllm="e2e_request_latency_seconds",
)
REQUEST_QUEUE_TIME = _histogram(
    "request_queue_time_seconds",
    "From the call to its first row: turn, session and replica.",
    _REQUEST_S,
    vllm="request_queue_time_seconds",
)
REQUEST_PROMPT_TOKENS = _histogram(
    "request_prompt_tokens",
    "Context tokens of a request.",
    _NUM_TOKENS,
    vllm="request_prompt_tokens",
)
REQUEST_GENERATION_TOKENS = _histogram(
    "request_generation_tokens",
    "Tokens of a request that has ended well.",
    _NUM_TOKENS,
    vllm="request_generation_tokens",
)

# --- Of the orchestrator: speculation ---
NUM_DRAFTS = _counter("spec_decode_num_drafts", "Rounds with draft tokens.", vllm=True)
NUM_DRAFT_TOKENS = _counter(
    "spec_decode_num_draft_tokens", "Draft tokens that were verified.", vllm=True
)
NUM_ACCEPTED_TOKENS = _counter(
    "spec_decode_num_accepted_tokens", "Draft tokens that stood.", vllm=True
)
NUM_ACCEPTED_PER_POS = _counter(
    "spec_decode_num_accepted_tokens_per_pos",
    "Rounds in which the draft token at this position stood; from 0.",
    "position",
    vllm=True,
)
NUM_REJECTED_TOKENS = _counter(
    "spec_decode_num_rejected_tokens",
    "Draft tokens that were judged and did not stand, at most one a round: acceptance is accepted "
    "by accepted and rejected.",
)
ROUNDS = _counter("rounds", "Rounds by their number of draft tokens.", "gamma")
LOOKAHEAD_ROUNDS = _counter(
    "lookahead_rounds",
    "Rounds that wanted a proposal: hit, it was here when the verdict came; miss.",
    "outcome",
)
GAMMA = _gauge("gamma", "Draft tokens of the last round, mean over the running requests.")
LOOKAHEAD_HIT_RATE = _gauge(
    "lookahead_hit_rate", "Share of the last hundred or so wanted proposals that were here in time."
)
DRAFT_ROUND_TRIP = _histogram(
    "draft_round_trip_seconds", "From a commit to its proposal, where it was waited for.", _STEP_S
)
VERIFY_ROUND_TRIP = _histogram(
    "verify_round_trip_seconds", "From a row to its verdict, prompts left out.", _STEP_S
)

# --- Of the orchestrator: what it depends on ---
REPLICAS = _gauge(
    "replicas",
    "Replicas as the orchestrator sees them: ready, draining, stuck, failing, starting, silent "
    "(has not answered in time), refused (does not fit), away (no connection).",
    "tier",
    "state",
)
REPLICA_GENERATIONS = _gauge(
    "replica_generations", "Generations of this orchestrator at a replica.", "tier", "replica"
)
REDIS_UP = _gauge("redis_up", "1 while Redis has answered last; 0: what is owed waits for it.")

# --- Of both model services ---
REPLICA_STATE = _gauge("replica_state", "1 at the state that the replica is in.", "tier", "state")
KV_CACHE_USAGE = _gauge(
    "kv_cache_usage_perc",
    "Share of the KV cache that open generations hold; what can be freed does not count.",
    "tier",
    vllm=True,
)
KV_CACHE_CAPACITY_TOKENS = _gauge("kv_cache_capacity_tokens", "Room of the KV cache.", "tier")
OPEN_GENERATIONS = _gauge("open_generations", "Generations open at the replica.", "tier")
IDLE_SESSIONS = _gauge("idle_sessions", "Sessions whose KV is kept for a next turn.", "tier")
PREFILL_TOKENS = _counter("prefill_tokens", "Context tokens run through the model.", "tier")
PREFIX_CACHE_QUERIES = _counter(
    "prefix_cache_queries", "Context tokens looked up in the prefix cache.", "tier", vllm=True
)
PREFIX_CACHE_HITS = _counter("prefix_cache_hits", "Those that were found in it.", "tier", vllm=True)
BATCH_ROWS = _histogram("batch_rows", "Sequences of a forward pass.", _NUM_ROWS, "tier")
BATCH_TOKENS = _histogram(
    "batch_tokens",
    "Tokens of a forward pass.",
    _NUM_BATCH_TOKENS,
    "tier",
    vllm="iteration_tokens_total",
)
STEP_SECONDS = _histogram(
    "step_seconds", "Forward pass with what is drawn from it.", _STEP_S, "tier"
)
FAILURES = _counter(
    "failures", "Generations that failed at the replica, by reason.", "tier", "reason"
)

# --- Of one of them ---
WAITING_ROWS = _gauge("waiting_rows", "Rows at the target that are not answered yet.")
NUM_PREEMPTIONS = _counter(
    "num_preemptions", "Generations that lost their room to more urgent or earlier ones.", vllm=True
)
DRAFT_QUEUE = _gauge("draft_queue", "Generations that wait for draft tokens.")

# --- Of all three ---
CALLS_REFUSED = _counter(
    "calls_refused",
    "Calls that were refused for want of rights or room. Before their method, and in no other "
    "metric: no_key or unknown_key, over_limit (of the key), identity (a certificate's name that "
    "may not call). By the method, and in requests_total, too: over_sessions (of the key), "
    "queue_full, displaced (by a more urgent one), deadline (sure to pass while it waits).",
    "reason",
)

CERTIFICATE_EXPIRES_AT = _gauge(
    "certificate_expires_at_seconds",
    "When the certificate in use ends, Unix time: server, what callers are shown; client, what the "
    "orchestrator shows the tiers; redis, what Redis showed the orchestrator when it last "
    "connected. None without TLS.",
    "use",
)

CATALOGUE: tuple[Metric, ...] = tuple(
    value for value in list(globals().values()) if isinstance(value, Metric)
)
BY_NAME = {metric.name: metric for metric in CATALOGUE}
