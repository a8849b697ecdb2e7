"""For all tests: hypothesis tries the same examples in every run, so that a green run stays green.

`pytest --hypothesis-profile=default` explores anew.
"""

from __future__ import annotations

import hypothesis

hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")
