"""For all tests: hypothesis tries the same examples in every run, however slow the machine is at
that moment, so that a green run stays green.

`pytest --hypothesis-profile=default` explores anew.
"""

from __future__ import annotations

import hypothesis

hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")
