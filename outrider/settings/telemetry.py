"""The settings of telemetry, which every program has, for `outrider.settings.services` to take in.

Knows not what they do.
"""

from __future__ import annotations

from dataclasses import dataclass

from outrider.settings.fields import require, require_port, setting

DEFAULT_SAMPLE_RATIO = 0.01


@dataclass(frozen=True)
class TelemetrySettings:
    """`metrics_port` listens on `host`, as the service does."""

    metrics_port: int | None = setting(
        None, "port of HTTP /metrics for Prometheus; 0 picks a free one; unset: none"
    )
    metrics_vllm_names: bool = setting(
        False, "the same metrics under vLLM's names too, for its dashboards"
    )
    otlp_endpoint: str | None = setting(
        None, "http:// or https:// address of an OTLP/gRPC collector of traces; unset: none"
    )
    trace_sample_ratio: float | None = setting(
        None,
        "share of requests that are traced where the caller has not decided; "
        f"unset: {DEFAULT_SAMPLE_RATIO}",
    )

    def check_telemetry(self) -> None:
        """Raises ConfigError."""
        port, ratio, endpoint = self.metrics_port, self.trace_sample_ratio, self.otlp_endpoint
        if port is not None:
            require_port(port, "metrics_port")
        has_port = not self.metrics_vllm_names or port is not None
        require(has_port, "metrics_vllm_names", "needs metrics_port")
        is_url = endpoint is None or endpoint.startswith(("http://", "https://"))
        require(is_url, "otlp_endpoint", f"{endpoint!r} is neither http:// nor https://")
        if ratio is not None:
            require(endpoint is not None, "trace_sample_ratio", "needs otlp_endpoint")
            require(0 <= ratio <= 1, "trace_sample_ratio", f"{ratio:g} is not in [0, 1]")
