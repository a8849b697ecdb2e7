"""Telemetry settings, a base class for the settings of every program (`services`)."""

from __future__ import annotations

from dataclasses import dataclass

from outrider.settings.addresses import require_url_host
from outrider.settings.fields import require, require_port, setting

DEFAULT_SAMPLE_RATIO = 0.01


@dataclass(frozen=True)
class TelemetrySettings:
    """Metrics and traces. `metrics_port` is opened on the service's `host`."""

    metrics_port: int | None = setting(
        None, "port of HTTP /metrics for Prometheus; 0 picks a free one; unset: no metrics"
    )
    metrics_vllm_names: bool = setting(
        False, "expose the metrics under vLLM's names as well, for its dashboards"
    )
    otlp_endpoint: str | None = setting(
        None, "http:// or https:// URL of an OTLP/gRPC collector for traces; unset: no traces"
    )
    trace_sample_ratio: float | None = setting(
        None,
        "share of requests to trace where the client has not decided; "
        f"unset: {DEFAULT_SAMPLE_RATIO}",
    )

    def check_telemetry(self, *, has_http: bool = False) -> None:
        """Checks these settings. `has_http`: HTTP has /metrics, too. Raises ConfigError."""
        port, ratio, endpoint = self.metrics_port, self.trace_sample_ratio, self.otlp_endpoint
        if port is not None:
            require_port(port, "metrics_port")
        has_port = not self.metrics_vllm_names or has_http or port is not None
        require(has_port, "metrics_vllm_names", "needs metrics_port, or the orchestrator's HTTP")
        is_url = endpoint is None or endpoint.startswith(("http://", "https://"))
        require(is_url, "otlp_endpoint", f"{endpoint!r} is neither http:// nor https://")
        if endpoint is not None:
            require_url_host(endpoint, "otlp_endpoint")
        if ratio is not None:
            require(endpoint is not None, "trace_sample_ratio", "needs otlp_endpoint")
            require(0 <= ratio <= 1, "trace_sample_ratio", f"{ratio:g} is not in [0, 1]")
