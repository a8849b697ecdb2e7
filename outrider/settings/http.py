"""Settings of the OpenAI-compatible HTTP of the orchestrator; a base class for `security`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from outrider.settings.fields import require, require_port, setting

ANY_ORIGIN = "*"
_ORIGIN = re.compile(r"https?://[^\s/]+")


@dataclass(frozen=True)
class HttpSettings:
    """Where HTTP is served, on the program's `host`, and for whom."""

    http_port: int | None = setting(
        None, "port of OpenAI-compatible HTTP; 0 picks a free one; unset: no HTTP"
    )
    http_allowed_origins: str = setting(
        "", "comma-separated origins whose web pages may use HTTP (CORS); *: any; empty: none"
    )
    served_model_name: str | None = setting(
        None, "names of the model in HTTP, comma-separated; unset: the target's own name"
    )

    http_read_timeout_s: float = setting(
        60.0, "seconds in which the headers of a request must arrive, and then its body"
    )

    def check_http(self) -> None:
        """Checks these settings. Raises ConfigError."""
        if self.http_port is not None:
            require_port(self.http_port, "http_port")
        for name in ("http_allowed_origins", "served_model_name"):
            has_use = not getattr(self, name) or self.http_port is not None
            require(has_use, name, "needs http_port")
        require(self.http_read_timeout_s > 0, "http_read_timeout_s", "must be more than 0")
        for origin in self.allowed_origins:
            is_origin = origin == ANY_ORIGIN or _ORIGIN.fullmatch(origin) is not None
            what = f"{origin!r} is neither * nor scheme://host[:port]"
            require(is_origin, "http_allowed_origins", what)
        if self.served_model_name is not None:
            require(bool(self.served_names), "served_model_name", "is empty; give a name")

    @property
    def allowed_origins(self) -> tuple[str, ...]:
        return _parts(self.http_allowed_origins)

    @property
    def served_names(self) -> tuple[str, ...]:
        return _parts(self.served_model_name or "")


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
